"""Real text as training data: sources, chats, the stream, and runs on it."""

import gzip
import json
import os
import signal
import sysconfig
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from philens.bases import hub
from philens.bases.tokenizer import SPECIAL_TOKENS, byte_tokenizer, character_tokenizer, train_bpe
from philens.support.errors import AdapterError, ConfigError, InputError, PhilensError, RecipeError
from philens.tasks.automata import TaskConfig, generate
from philens.tasks.chat import encode_chat
from philens.tasks.packing import PackedRows, SingleRows
from philens.tasks.sources import PROMPT, TextFiles, TextPart, _open_hub, installed_files, open_source
from philens.tasks.text import HELD_OUT, TextMixture, is_held_out
from philens.training.build import evaluation_documents, load_tokenizer, start_model
from philens.training.folder import RunFolder
from philens.training.opening import finished_model, load_run
from philens.training.recipe import Recipe
from philens.training.trainer import PHiTrainer, train, training_rows
from tiny import tiny_recipe

WORDS = ["the", "a", "of", "model", "token", "layer", "phi", "reads", "writes", "state", "text", "new", "old"]


@pytest.fixture(autouse=True)
def _caches(tmp_path_factory, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))


def sentence(error) -> str:
    message = str(error.value)
    assert "\n" not in message
    assert message.endswith(".")
    return message


def prose(number: int, words: int = 12) -> str:
    rng = np.random.default_rng(number)
    return " ".join(rng.choice(WORDS, words)) + f" {number}.\n"


def write_jsonl(path: Path, rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def documents_of(part: TextPart | str, **options) -> list:
    source = open_source(TextPart(part, **options) if isinstance(part, str) else part)
    return [source[index] for index in range(len(source))]


def chat(*contents: str) -> list[dict[str, str]]:
    roles = ("user", "assistant") * len(contents)
    return [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]


# Sources


@pytest.mark.parametrize(
    "text", ["line of some words\n" * 9000, "ü€😀" * 30_000, "x" * 70_000 + "\r\n\n" * 9]
)
def test_pieces_of_a_long_file_are_the_file(tmp_path, text):
    path = tmp_path / "long.txt"
    path.write_bytes(text.encode())
    empty = tmp_path / "empty.txt"
    empty.touch()
    files = TextFiles([empty, path, path])
    pieces = [files[index] for index in range(len(files))]
    assert "".join(pieces) == text + text
    assert len(pieces) == 2 * -(-len(text.encode()) // TextFiles.PIECE) > 4
    assert all(len(piece.encode()) < 1.2 * TextFiles.PIECE for piece in pieces)
    if text.startswith("line"):
        assert all(piece.startswith("line") for piece in pieces)


def test_files_that_are_no_text(tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"abc\xe9def")
    source = open_source(TextPart(str(tmp_path / "latin.txt")))
    with pytest.raises(InputError, match=r"latin.txt is not text in UTF-8 \(byte 3\)") as error:
        source[0]
    sentence(error)


def test_tables_of_every_kind(tmp_path):
    texts = [prose(i) for i in range(5)]
    rows = [{"text": text, "n": i} for i, text in enumerate(texts)]
    (tmp_path / "list.json").write_text(json.dumps(rows, indent=1))
    pd.DataFrame(rows).to_parquet(tmp_path / "a.parquet")
    write_jsonl(tmp_path / "a.jsonl", rows)
    pd.DataFrame(rows).to_csv(tmp_path / "a.csv", index=False)
    pd.DataFrame(rows).to_csv(tmp_path / "a.tsv", index=False, sep="\t")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    for name in ("list.json", "a.parquet", "a.jsonl", "a.csv", "a.tsv", "a.jsonl.gz"):
        assert documents_of(str(tmp_path / name)) == texts
    assert documents_of(str(tmp_path / "a.jsonl"), documents=2) == texts[:2]

    pairs = [("why?", "so"), ("how?", "thus")]
    for names in (("user", "assistant"), ("problem", "solution"), ("question", "answer")):
        path = write_jsonl(tmp_path / f"{names[0]}.jsonl", [dict(zip(names, pair)) for pair in pairs])  # noqa: B905
        assert documents_of(str(path)) == [chat(*pair) for pair in pairs]
    path = write_jsonl(tmp_path / "own.jsonl", [{"q": q, "text": "no", "a": a} for q, a in pairs])
    assert documents_of(str(path), user="q", assistant="a") == [chat(*pair) for pair in pairs]
    assert documents_of(str(path), text="a") == ["so", "thus"]
    path = write_jsonl(tmp_path / "chats.jsonl", [{"messages": chat(*pair), "id": 1} for pair in pairs])
    assert documents_of(str(path)) == [chat(*pair) for pair in pairs]


def test_folders(tmp_path):
    # The layout of MATH: a JSON object a file, in a folder for each subject.
    for number, subject in enumerate(("algebra", "geometry", "algebra")):
        (tmp_path / "math" / subject).mkdir(parents=True, exist_ok=True)
        row = {"problem": f"p{number}", "level": "Level 1", "solution": f"s{number}", "type": subject}
        (tmp_path / "math" / subject / f"{number}.json").write_text(json.dumps(row, indent=2))
    assert documents_of(str(tmp_path / "math")) == [chat(f"p{n}", f"s{n}") for n in (0, 2, 1)]
    assert documents_of(str(tmp_path / "math"), files=["geometry/*.json"]) == [chat("p1", "s1")]

    mixed = tmp_path / "mixed"
    (mixed / "sub").mkdir(parents=True)
    (mixed / "b.py").write_text("b = 1\n")
    (mixed / "sub" / "a.md").write_text("# a\n")
    (mixed / "picture.png").write_bytes(b"\x89PNG")
    assert documents_of(str(mixed)) == ["b = 1\n", "# a\n"]
    write_jsonl(mixed / "c.jsonl", [{"text": "c"}])
    with pytest.raises(InputError, match=r"files of different kinds \(\.jsonl, \.md, \.py\)") as error:
        documents_of(str(mixed))
    sentence(error)
    assert documents_of(str(mixed), files=["**/*.md", "*.py"]) == ["b = 1\n", "# a\n"]
    assert documents_of(str(mixed), files=["*.jsonl"]) == ["c"]


def test_what_cannot_be_read(tmp_path):
    (tmp_path / "nothing").mkdir()
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "empty.txt").touch()
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"text"))
    (tmp_path / "a.jsonl.zst").write_bytes(b"x")
    (tmp_path / "broken.jsonl").write_text('{"text": "a"}\n{"text": "b"\n{"text": "c"}\n')
    (tmp_path / "broken.json").write_text('{"text": "a"')
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 no")
    write_jsonl(tmp_path / "fields.jsonl", [{"body": "a", "title": "b"}])
    write_jsonl(tmp_path / "number.jsonl", [{"text": 7}])
    cases = [
        ("nothing", {}, "nothing has no file that is text, JSON, CSV or parquet"),
        ("nothing", {"files": ["*.py", "*.md"]}, r"has no file that is \*.py or \*.md"),
        ("empty.jsonl", {}, "empty.jsonl is empty; give a file"),
        ("a.txt.gz", {}, r"a\.txt\.gz is compressed, and training reads of that only tables in \.gz; unpack"),
        ("a.jsonl.zst", {}, r"a\.jsonl\.zst is compressed, and training reads of that only tables in \.gz"),
        ("empty.txt", {}, "empty.txt is empty; give a source with at least one document"),
        ("broken.jsonl", {}, "Line 2 of .*broken.jsonl is not a JSON object; correct it"),
        ("broken.json", {}, "broken.json is not a JSON object"),
        ("broken.parquet", {}, "broken.parquet cannot be read as parquet"),
        ("fields.jsonl", {}, "none of the fields that are known; it has body, title: name one as text"),
        ("fields.jsonl", {"text": "txt"}, "has no field 'txt'; it has body, title"),
        ("fields.jsonl", {"user": "body", "assistant": "reply"}, "has no field 'reply'"),
        ("fields.jsonl", {"files": ["*"]}, "files chooses among the files of a folder"),
        ("number.jsonl", {}, "The field text of document 0 of .* is neither text nor a list of messages"),
        ("missing.jsonl", {}, "There is no file or folder .*missing.jsonl"),
    ]
    for name, options, message in cases:
        with pytest.raises(PhilensError, match=message) as error:
            documents_of(str(tmp_path / name), **options)
        sentence(error)
    with pytest.raises(InputError, match=r"openai/gsm8k.*|gsm8k is neither a file or folder nor") as error:
        documents_of("gsm8k")  # tests have no network
    assert "give a local copy" in sentence(error)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": ""}, "source must be given"),
        ({"weight": -1}, "weight must be a finite number of at least 0, not -1"),
        ({"documents": 0}, "documents must be at least 1, not 0"),
        ({"user": "a"}, "give both fields"),
        ({"text": "a", "messages": "b"}, "Give one of text, messages, and user with assistant"),
        ({"streaming": True}, "streaming needs documents"),
    ],
)
def test_parts_that_say_too_much_or_too_little(options, message):
    with pytest.raises(ConfigError, match=message) as error:
        TextPart(**({"source": "x"} | options))
    sentence(error)


def test_a_streamed_set_is_kept(tmp_path, monkeypatch):
    folder = tmp_path / "owner" / "set"
    folder.mkdir(parents=True)
    path = write_jsonl(folder / "train.jsonl", [{"text": prose(i)} for i in range(30)])
    monkeypatch.chdir(tmp_path)
    part = TextPart("owner/set", streaming=True, documents=20)
    first = _open_hub(part)
    assert [first[i] for i in range(len(first))] == [prose(i) for i in range(20)]
    path.unlink()
    again = _open_hub(part)  # from the cache: nobody is asked
    assert [again[i] for i in range(len(again))] == [prose(i) for i in range(20)]
    with pytest.raises(InputError):
        _open_hub(TextPart("owner/set", streaming=True, documents=21))


def test_installed_text():
    kinds = {kind: installed_files(kind) for kind in ("code", "documentation", "licences")}
    assert sum(map(len, kinds.values())) == len(set(installed_files())) == len(installed_files())
    assert len(kinds["code"]) > 1000
    assert all(path.suffix == ".py" for path in kinds["code"])
    assert Path(sysconfig.get_paths()["stdlib"]).resolve() / "json/decoder.py" in kinds["code"]
    assert any(path.name == "METADATA" for path in kinds["documentation"])
    texts = " ".join(path.read_text("utf-8", "replace") for path in kinds["licences"][:50])
    assert "without warranty" in texts.lower()
    with pytest.raises(ConfigError, match="the kinds code, documentation, licences, not 'poems'"):
        open_source(TextPart("installed", name="poems"))


def test_automata_in_a_chat():
    tasks = TaskConfig(strings=(2, 3))
    source = open_source(TextPart("automata"), tasks, seed=5)
    expected = generate(tasks, 5, "in_context_language", [7]).text(0)
    assert source[7] == chat(PROMPT, expected)
    copies = open_source(TextPart("automata", name="copy"), tasks, seed=5)
    strings = copies[3][1]["content"].split()
    assert strings[0] == strings[1] != strings[2]


# Tokenizers and chats

LLAMA_LIKE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{{ '\\n\\n' + m['content'] | trim }}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{{ '\\n\\n' }}{% endif %}"
)
# Earlier replies are rendered otherwise than the last, as in Qwen3.
THINKING = (
    "{% for m in messages %}<|{{ m['role'] }}|>{% if loop.last and m['role'] == 'assistant' %}<think></think>"
    "{% endif %}{{ m['content'] }}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
REFUSING = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('No system!') }}{% endif %}"


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_byte_level_tokenizers(tmp_path, kind):
    texts = [prose(i) for i in range(300)]
    tokenizer = byte_tokenizer() if kind == "bytes" else train_bpe(texts, 320)
    assert len(tokenizer) == (256 + len(SPECIAL_TOKENS) if kind == "bytes" else 320)
    hard = "héllo \t wörld\n\n  def 😀(x):\r\n a\u0301 \x00 end "
    encoded = tokenizer(hard, return_offsets_mapping=True)
    ids, offsets = encoded.input_ids, encoded.offset_mapping
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids[1:]) == hard
    assert offsets[0] == (0, 0)
    assert {place for start, end in offsets for place in range(start, end)} == set(range(len(hard)))
    assert len({tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}) == 3
    if kind == "bytes":
        assert len(ids) == 1 + len(hard.encode())
    else:
        assert len(tokenizer(texts[0]).input_ids) < 0.7 * len(texts[0])
        again = train_bpe(texts, 320)
        assert again.get_vocab() == tokenizer.get_vocab()
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded(hard).input_ids == ids
    assert loaded.chat_template == tokenizer.chat_template
    with pytest.raises(AdapterError, match="does not hold a tokenizer that can be loaded"):
        load_tokenizer(tmp_path / "none")


CHAT = chat("What is 2 + 2?", "It is 4.\n", " And 3? ", "3 is 3.")


def counted_text(tokenizer, messages=CHAT) -> str:
    tokens, counted = encode_chat(tokenizer, messages)
    assert tokens.dtype == np.int64
    assert tokens.shape == counted.shape
    return tokenizer.decode(tokens[counted])


def test_only_replies_count():
    tokenizer = byte_tokenizer()
    assert counted_text(tokenizer) == "It is 4.\n<|end|>3 is 3.<|end|>"
    whole = tokenizer.decode(encode_chat(tokenizer, CHAT)[0])
    assert whole == tokenizer.apply_chat_template(CHAT, tokenize=False)
    # The same without the marks of what is generated.
    marked = tokenizer.chat_template
    tokenizer.chat_template = marked.replace("{%- generation -%}", "").replace("{%- endgeneration -%}", "")
    assert tokenizer.chat_template != marked
    tokens, counted = encode_chat(tokenizer, CHAT)
    expected, expected_counted = encode_chat(byte_tokenizer(), CHAT)
    assert np.array_equal(tokens, expected)
    assert np.array_equal(counted, expected_counted)
    assert not encode_chat(tokenizer, CHAT[:1])[1].any()


def test_templates_that_change_what_they_render():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = LLAMA_LIKE
    assert counted_text(tokenizer) == "It is 4.<|end|>3 is 3.<|end|>"
    tokenizer.chat_template = THINKING
    assert counted_text(tokenizer) == "It is 4.<think></think>3 is 3.<|end|>"
    assert counted_text(tokenizer, chat("q", "a", "q")[1:]) == "a"
    tokenizer.chat_template = REFUSING
    with pytest.raises(InputError, match=r"refuses a chat of system, user \(No system!\)") as error:
        encode_chat(tokenizer, [{"role": "system", "content": "x"}, *CHAT[:1]])
    sentence(error)
    tokenizer.chat_template = "{% for m in messages %}{{ loop.length }}{{ m['content'] | upper }}{% endfor %}"
    with pytest.raises(InputError, match="changes the assistant's words"):
        encode_chat(tokenizer, CHAT)


def test_the_date_does_not_change_rows():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{{ date_string if date_string is defined else strftime_now('%H %M %S') }}" + LLAMA_LIKE
    )
    assert tokenizer.decode(encode_chat(tokenizer, CHAT)[0]).startswith("26 Jul 2024")


def test_chats_without_a_template():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    tokens, _ = encode_chat(tokenizer, CHAT)
    contents = [message["content"] for message in CHAT]
    assert tokenizer.decode(tokens) == "<|begin|>" + "\n\n".join(contents) + "<|end|>"
    assert counted_text(tokenizer) == "It is 4.\n3 is 3.<|end|>"
    assert counted_text(tokenizer, CHAT[:3]) == "It is 4.\n"
    characters = character_tokenizer()  # neither template nor BOS
    assert counted_text(characters, chat("q", "a")) == "a\x03"


# The stream


@pytest.fixture
def parts(tmp_path):
    write_jsonl(tmp_path / "prose.jsonl", [{"text": prose(i)} for i in range(200)] + [{"text": "  \n"}] * 20)
    write_jsonl(tmp_path / "chats.jsonl", [{"user": f"q{i}", "assistant": prose(i, 40)} for i in range(100)])
    (tmp_path / "book.txt").write_text("".join(prose(i, 20) for i in range(2000)))
    return {
        "prose": TextPart(str(tmp_path / "prose.jsonl"), weight=3),
        "chats": TextPart(str(tmp_path / "chats.jsonl"), weight=1),
        "book": TextPart(str(tmp_path / "book.txt"), weight=2),
        "none": TextPart("no/such", weight=0),
    }


def mixture(parts, length=64, seed=0) -> TextMixture:
    return TextMixture(parts, byte_tokenizer(), length, seed, TaskConfig())


def test_a_document_depends_on_its_number_alone(parts):
    text = mixture(parts)
    batch = text.documents(np.arange(40))
    assert len(batch) == 40
    other = mixture(parts)
    for index in (39, 3, 17):
        alone = other.documents(np.array([index]))
        assert np.array_equal(alone.tokens, batch.select(index).tokens)
        assert np.array_equal(alone.counted, batch.select(index).counted)
    assert not np.array_equal(mixture(parts, seed=1).documents(np.arange(40)).tokens, batch.tokens)


@pytest.mark.parametrize("kind", [PackedRows, SingleRows])
def test_rows_depend_on_their_number_alone(parts, kind):
    rows = kind(mixture(parts).documents, 64, 24, 4)
    forwards = [rows[r] for r in range(24)]
    fresh = kind(mixture(parts).documents, 64, 24, 4)
    for r in (23, 5, 0, 11):
        assert all(torch.equal(value, forwards[r][name]) for name, value in fresh[r].items())
    labels = torch.stack([row["labels"] for row in forwards])
    ids = torch.stack([row["input_ids"] for row in forwards])
    assert ((labels == ids) | (labels == -100)).all()
    assert (labels == 4).sum() == 0  # what stands before a user's message never counts
    assert (ids == 4).sum() > 0
    assert (labels == 2).sum() > 0  # ends of texts and replies do


def test_parts_come_as_often_as_they_weigh(parts):
    text = mixture(parts)
    assert set(text.sources) == {"prose", "chats", "book"}
    counts = Counter(next(text.drawn(i))[0] for i in range(600))
    assert counts["prose"] == pytest.approx(300, abs=45)
    assert counts["book"] == pytest.approx(200, abs=45)
    assert counts["chats"] == pytest.approx(100, abs=35)
    sample = list(text.sample(5000))
    assert 5000 <= sum(map(len, sample)) < 5000 + 1.2 * TextFiles.PIECE
    assert sample == list(mixture(parts).sample(5000))
    everything = list(mixture({"prose": parts["prose"]}).sample(10**6))
    assert len(everything) == sum(not is_held_out(prose(i)) for i in range(200)) + 20


def test_stretches_of_long_texts(parts):
    text = mixture({"book": parts["book"]})
    whole = Path(parts["book"].source).read_text()
    batch = text.documents(np.arange(60))
    decoded = [text.tokenizer.decode(batch.select(i).tokens) for i in range(60)]
    assert set(batch.lengths) == {64}
    assert len({stretch[:20] for stretch in decoded}) > 50
    for stretch in decoded:
        assert stretch.startswith("<|begin|>")
        assert stretch.removeprefix("<|begin|>").removesuffix("<|end|>") in whole
    assert batch.counted.all()
    # A text that fits is whole, between its begin and its end.
    text = mixture({"prose": parts["prose"]}, length=512)
    one = text.documents(np.array([5]))
    assert text.tokenizer.decode(one.tokens) == f"<|begin|>{next(text.drawn(5))[1]}<|end|>"


def test_the_end_of_a_text_is_read_too():
    text = mixture({"automata": TextPart("automata")}, length=16)
    document = "abcdefghij" * 40
    document = "<" + document + ">"
    stretches = [text.tokenizer.decode(text.encode(document, key)[0]) for key in range(2000)]
    assert 1 <= sum(stretch.startswith("<|begin|><") for stretch in stretches) < 20
    assert 1 <= sum(stretch.endswith("><|end|>") for stretch in stretches) < 20
    starts = Counter(stretch.removeprefix("<|begin|>")[0] for stretch in stretches)
    assert all(140 < starts[letter] < 260 for letter in "abcdefghij")


def test_long_chats_are_cut_at_their_end(parts):
    text = mixture({"chats": parts["chats"]}, length=32)
    tokens, counted = text.encode(chat("q", "a" * 100), 0)
    assert len(tokens) == 32
    assert text.tokenizer.decode(tokens[counted]) == "a" * counted.sum()
    hidden = mixture({"chats": parts["chats"]}, length=4)
    with pytest.raises(
        InputError, match=r"data.parts.chats has no documents in which something counts"
    ) as error:
        hidden.documents(np.arange(2))
    sentence(error)


def test_what_is_held_out_is_never_drawn(parts, tmp_path):
    text = mixture(parts, length=4096)
    drawn = {next(text.drawn(i))[1] for i in range(1500) if isinstance(next(text.drawn(i))[1], str)}
    assert len(drawn) > 150
    assert not any(is_held_out(document) for document in drawn)
    held = [prose(i) for i in range(200) if is_held_out(prose(i))]
    assert 2 <= len(held) <= 25
    batch = text.held_out("prose", 100)
    found = [text.tokenizer.decode(batch.select(i).tokens) for i in range(len(batch))]
    assert sorted(found) == sorted(f"<|begin|>{document}<|end|>" for document in held)
    assert len(text.held_out("prose", 1)) == 1
    assert len(text.held_out("chats", 3)) == 3
    # In a part with few documents every one is needed.
    few = write_jsonl(tmp_path / "few.jsonl", [{"text": held[0]}] * (HELD_OUT - 1))
    text = mixture({"few": TextPart(str(few))})
    assert len(text.held_out("few", 5)) == 0
    assert next(text.drawn(0))[:2] == ("few", held[0])
    endless = mixture({"automata": TextPart("automata")})
    assert len(endless.held_out("automata", 2)) == 2


def test_a_slow_tokenizer_is_refused():
    class Slow:
        is_fast = False

    with pytest.raises(InputError, match="Slow does not say where in a text its tokens are"):
        TextMixture({"automata": TextPart("automata")}, Slow(), 8, 0, TaskConfig())


# Runs


def text_recipe(folder: Path, **changes) -> Recipe:
    part = {"source": str(folder / "prose.jsonl")}
    values = {
        "data__mixture": {"in_context_language": 1},
        "data__parts": {"prose": part},
        "phi_schedule__start_step": 0,
    }
    values |= {"phi_schedule__warmup_steps": 0, "train__evaluation_documents": 4, "model__tokenizer": "bpe"}
    return tiny_recipe(**(values | {"model__vocab_size": 300, "train__steps": 4} | changes))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Text, a plain base trained on it, and a run with a layer in that base, frozen."""
    folder = tmp_path_factory.mktemp("runs")
    write_jsonl(folder / "prose.jsonl", [{"text": prose(i)} for i in range(200)])
    assert train(text_recipe(folder, phi=None), folder / "base") is not None
    assert (
        train(text_recipe(folder, model__base=str(folder / "base" / "model")), folder / "frozen") is not None
    )
    return folder


def test_a_plain_base(runs):
    folder, recipe = runs / "base", text_recipe(runs, phi=None)
    assert not (folder / "adapter").exists()
    assert not (folder / "checkpoint-4" / "adapter").exists()
    names = {path.name for path in (folder / "model").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"} <= names
    lens = finished_model(folder, recipe)
    assert lens is not None
    assert not lens.enabled
    tokenizer = load_tokenizer(folder / "model")
    config = lens.base.config
    assert config.vocab_size == len(tokenizer) == 300
    assert (config.bos_token_id, config.eos_token_id) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    records = [record for record in RunFolder(folder).metrics() if "surprisal" in record]
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    assert records[0]["loss"] == records[0]["surprisal"] == pytest.approx(np.log(300), abs=0.5)
    assert records[-1]["loss"] < records[0]["loss"]
    assert "phi" not in records[0]
    with pytest.raises(AdapterError, match=r"has no PHi layer; .* --model.base .*base/model\.$") as error:
        load_run(folder)
    sentence(error)


def test_a_layer_in_a_frozen_base(runs):
    folder = runs / "frozen"
    assert not list(folder.glob("**/model"))
    assert not list(folder.glob("**/model.safetensors"))
    assert {path.name for path in folder.iterdir()} >= {
        "adapter",
        "checkpoint-2",
        "checkpoint-4",
        "recipe.yaml",
    }
    lens, recipe = load_run(folder)
    assert recipe.model.base == str(runs / "base" / "model")
    base = finished_model(runs / "base", text_recipe(runs, phi=None))
    assert base is not None
    weights = base.base.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in lens.base.state_dict().items())
    fresh, tokenizer = start_model(recipe)
    assert not any(parameter.requires_grad for parameter in fresh.base.parameters())
    assert all(parameter.requires_grad for parameter in fresh.phi.parameters())
    trained = lens.phi.state_dict()
    assert any(not torch.equal(value, trained[name]) for name, value in fresh.phi.state_dict().items())
    held = evaluation_documents(recipe, tokenizer, 4)
    assert set(held) == {"prose"}
    assert len(held["prose"]) == 4
    assert all(parameter.grad is None for parameter in lens.base.parameters())


def test_a_frozen_base_is_loaded_once(runs, tmp_path, monkeypatch):
    loaded, load = [], hub.load_pretrained
    monkeypatch.setattr(hub, "load_pretrained", lambda *args, **kw: loaded.append(args) or load(*args, **kw))
    base = str(runs / "base" / "model")
    lens = train(text_recipe(runs, model__base=base, data__packing=False), tmp_path / "run")
    assert loaded == [(base,)]
    again, _ = load_run(tmp_path / "run")
    assert len(loaded) == 2
    assert str(lens.base.config) == str(again.base.config)
    assert lens.base.config._attn_implementation == again.base.config._attn_implementation
    parameters = dict(again.named_parameters())
    for name, value in lens.named_parameters():
        assert torch.equal(value, parameters[name])
        assert value.requires_grad == parameters[name].requires_grad
    assert [module.training for module in lens.modules()] == [module.training for module in again.modules()]
    ids = torch.arange(3, 40)[None]
    assert torch.equal(lens(ids).phi, again(ids).phi)


@pytest.mark.parametrize("kind", ["base", "frozen"])
def test_stopped_runs_go_on(runs, kind, tmp_path, monkeypatch):
    options = {"phi": None} if kind == "base" else {"model__base": str(runs / "base" / "model")}
    recipe = text_recipe(runs, **options)
    whole = runs / kind
    compute_loss = PHiTrainer.compute_loss

    def interrupted(self, *args, **kwargs):
        if self.state.global_step == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return compute_loss(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(PHiTrainer, "compute_loss", interrupted)
        assert train(recipe, tmp_path / "run") is None
    # The tokenizer that was made is read again.
    monkeypatch.setattr("philens.bases.tokenizer.train_bpe", None)
    assert train(recipe, tmp_path / "run", resume=True) is not None
    ours, theirs = (
        [r["loss"] for r in RunFolder(folder).metrics() if "loss" in r]
        for folder in (tmp_path / "run", whole)
    )
    assert ours == theirs
    assert train(recipe, tmp_path / "run", resume=True) is not None  # finished
    with pytest.raises(PhilensError, match="seed was 0 and is now 1"):
        train(text_recipe(runs, seed=1, **options), tmp_path / "run", resume=True)


def test_a_base_that_is_trained_is_kept(runs, tmp_path):
    recipe = text_recipe(runs, model__base=str(runs / "base" / "model"), model__frozen=False, train__steps=2)
    assert train(recipe, tmp_path / "run") is not None
    lens, _ = load_run(tmp_path / "run")
    base = finished_model(runs / "base", text_recipe(runs, phi=None))
    assert base is not None
    before = base.base.state_dict()
    assert any(not torch.equal(value, before[name]) for name, value in lens.base.state_dict().items())


def test_bases_and_data_that_do_not_fit(runs, tmp_path):
    recipe = tiny_recipe(model__base=str(runs / "base" / "model"), phi_schedule__start_step=0)
    with pytest.raises(RecipeError, match="does not read characters as formal languages need it"):
        train(recipe, tmp_path / "a")
    parts = {"gone": {"source": "gone.jsonl"}}
    with pytest.raises(InputError, match=r"data.parts.gone: There is no file or folder gone.jsonl"):
        train(text_recipe(runs, data__parts=parts, model__base="no/such"), tmp_path / "b")
    assert not list(tmp_path.iterdir())
    with pytest.raises(AdapterError, match="nowhere"):
        train(text_recipe(runs, model__base=str(tmp_path / "nowhere")), tmp_path / "c")


def test_the_parts_decide_the_rows(runs):
    recipe = text_recipe(runs, data__parts={"prose": {"source": str(runs / "prose.jsonl")}})
    tokenizer = load_tokenizer(runs / "base" / "model")
    rows = training_rows(recipe, tokenizer)
    assert len(rows) == 8  # pyright: ignore[reportArgumentType]
    text = tokenizer.decode(rows[0]["input_ids"])
    assert any(word in text for word in WORDS)
