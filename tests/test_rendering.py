"""What a user chooses of how texts are put: variables of the chat template, what the system says, BOS."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import philens
from conftest import make_llama
from philens import cli
from philens.bases.tokenizer import byte_tokenizer, character_tokenizer
from philens.explore.models import Explored, Job
from philens.reasoning.problems import PROMPTS, load_problems
from philens.reasoning.sampling import prompt_ids, read_rendering, solve
from philens.reasoning.solutions import measure_replies
from philens.scoring.score import score
from philens.scoring.streaming import stream
from philens.scoring.texts import tokenize
from philens.support.errors import ConfigError, InputError
from philens.support.typed import pairs
from philens.tasks.chat import render
from philens.tasks.rendering import Rendering, rendering_of, with_rendering
from philens.training.build import start_model, text_mixture
from philens.training.recipe import from_plain, load_recipe, plain
from philens.training.source import ModelSource
from test_chat import CHAT, many_parts
from test_score import lens_of
from test_solutions import LLAMA_3, llama_3

# As Qwen 3's: an empty thought where there is to be none.
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
    "{% endif %}{% if effort is defined %}{{ effort }}{% endif %}"
)
GENERATION = (
    "{% for m in messages %}{{ m['role'] }}: {% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}\n"
    "{% endfor %}"
)
WITHOUT_SYSTEM = "{% for m in messages if m['role'] != 'system' %}{{ m['content'] }}.{% endfor %}"
QUESTION = CHAT[:1]
Tokenizer = Any


def tokenizer_of(template: str | None = THINKING) -> Tokenizer:
    """One that has a BOS and puts none, as GPT-2's and Qwen's neighbours."""
    tokenizer = many_parts(*["<|endoftext|>"] * 4)
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture
def tokenizer() -> Tokenizer:
    return tokenizer_of()


@pytest.fixture(scope="module")
def lens() -> philens.PHiModel:
    return lens_of(make_llama(vocab_size=len(tokenizer_of())))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base model, its tokenizer, and an adapter."""
    folder = tmp_path_factory.mktemp("model")
    lens = lens_of(make_llama(vocab_size=len(tokenizer_of())))
    lens.base.save_pretrained(folder / "model")  # pyright: ignore[reportCallIssue]
    tokenizer_of().save_pretrained(folder / "model")
    lens.save_pretrained(folder / "adapter")
    return folder


@pytest.fixture
def command(model: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    def command(*words: Any) -> tuple[int, str, str]:
        code = cli.main([*map(str, words), "--model", str(model)])
        return code, *capsys.readouterr()

    return command


# What is chosen.


def test_values_are_read_as_yaml() -> None:
    found = pairs(
        [
            "enable_thinking=false",
            "n=3",
            "x=1e-1",
            "a=b=c",
            "date=2025-02-01",
            "quoted='no'",
            "list=[1, two]",
        ],
        "--chat-option",
    )
    assert found == {
        "enable_thinking": False,
        "n": 3,
        "x": "1e-1",
        "a": "b=c",
        "date": "2025-02-01",
        "quoted": "no",
        "list": [1, "two"],
    }
    assert pairs(["open=[", "empty="], "--chat-option") == {"open": "[", "empty": None}
    for bad in ("enable_thinking", "=false"):
        with pytest.raises(ConfigError, match=r"^--chat-option must be KEY=VALUE, not '"):
            pairs([bad], "--chat-option")


def test_nothing_chosen_is_the_tokenizer_itself(tokenizer: Tokenizer) -> None:
    assert with_rendering(tokenizer, Rendering()) is tokenizer
    kept = with_rendering(tokenizer, Rendering(system="Be brief."))
    assert with_rendering(kept, Rendering()) is kept
    assert rendering_of(tokenizer) == Rendering()
    assert rendering_of(kept) == Rendering(system="Be brief.")
    assert tokenizer.chat_template == THINKING


@pytest.mark.parametrize(
    ("made", "rendering", "sentence"),
    [
        (
            tokenizer_of,
            Rendering({"thinking": False}),
            "no variable 'thinking'; those that it has are: effort, ",
        ),
        (tokenizer_of, Rendering({"messages": []}), "no variable 'messages'; those"),
        (lambda: tokenizer_of("{{ bos_token }}"), Rendering({"bos_token": "a"}), "that it has are: none"),
        (character_tokenizer, Rendering({"enable_thinking": False}), "has no chat template, whose variables"),
        (character_tokenizer, Rendering(bos=True), "has no BOS to put before texts; leave bos out"),
    ],
)
def test_what_a_tokenizer_does_not_have(made: Any, rendering: Rendering, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        with_rendering(made(), rendering)
    lens = lens_of(make_llama(vocab_size=300))
    with pytest.raises(ConfigError, match=sentence):
        score(lens, made(), [CHAT], **rendering.record())


def test_a_variable_that_the_template_sets_by_itself_is_one() -> None:
    """Llama 3's asks whether it was given."""
    dated = with_rendering(llama_3(), Rendering({"date_string": "1 May 2026"}))
    assert "Today Date: 1 May 2026" in render(dated, QUESTION, "a chat")
    assert "strftime_now" in LLAMA_3  # which nobody may set
    with pytest.raises(ConfigError, match=r"'strftime_now'; those that it has are: date_string\."):
        with_rendering(llama_3(), Rendering({"strftime_now": "1"}))


# Scores.


def test_chat_options_reach_the_template(lens: Any, tokenizer: Tokenizer) -> None:
    plain, chosen = (
        score(lens, tokenizer, [CHAT], metrics=["phi"], chat_options=options)[0]
        for options in (None, {"effort": "low"})
    )
    assert chosen.text == plain.text + "low"
    assert [tuple(span) for span in chosen.spans] == [tuple(span) for span in plain.spans]
    assert chosen.provenance["chat_options"] == {"effort": "low"}
    assert "chat_options" not in plain.provenance
    assert chosen.provenance | {"chat_options": None} == plain.provenance | {"chat_options": None}


def test_what_the_system_says_comes_first_where_it_says_nothing(lens: Any, tokenizer: Tokenizer) -> None:
    own = [{"role": "system", "content": "Own."}, *CHAT]
    first, second = score(lens, tokenizer, [CHAT, own], metrics=["phi"], system="Be brief.")
    assert first.text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n2 + 3?")
    assert [span.name for span in first.spans] == ["system", "user", "assistant"]
    assert [first.text[start:end] for _, start, end in first.spans] == ["Be brief.", "2 + 3?", "It is 5."]
    assert "Be brief" not in second.text
    assert first.provenance["system"] == "Be brief."
    assert len(CHAT) == 2


def test_what_has_no_place_for_it_is_refused(lens: Any, tokenizer: Tokenizer) -> None:
    for options in ({"system": "Be brief."}, {"chat_options": {"effort": 1}}):
        with pytest.raises(
            InputError, match=r"^texts\[0\] is plain text, and system and chat options are for"
        ):
            score(lens, tokenizer, ["a text"], **options)
        with pytest.raises(InputError, match=r"is plain text, and system and chat options are for chats"):
            philens.rank(lens, tokenizer, "2 + 3 = ", ["5", "6"], **options)
    tokenizer.chat_template = WITHOUT_SYSTEM
    with pytest.raises(InputError, match=r"leaves out what the system says in texts\[0\]; leave out system"):
        score(lens, tokenizer, [CHAT], system="Be brief.")
    assert score(lens, tokenizer, [CHAT], metrics=["phi"])[0].text == "2 + 3?.It is 5.."


def test_bos_before_what_begins_without_it(lens: Any, tokenizer: Tokenizer) -> None:
    bos = tokenizer.bos_token_id
    texts = ["a text", f"{tokenizer.bos_token}a text", CHAT]
    plain = score(lens, tokenizer, texts)
    found = score(lens, tokenizer, texts, bos=True)
    for before, after, added in zip(plain, found, (1, 0, 1), strict=True):
        assert after.token_ids[0] == bos
        np.testing.assert_array_equal(after.token_ids[added:], before.token_ids)
        np.testing.assert_array_equal(after.offsets[added:], before.offsets)
        assert after.text == before.text == "".join(after.pieces())
        assert after.provenance["bos"] is True
        assert after.provenance["bos_rule"] == "texts, chats and later windows begin with BOS"
    # Its scores are those of a text that brings BOS itself.
    np.testing.assert_allclose(found[0].phi, found[1].phi, atol=1e-5)
    assert np.isnan(plain[0].surprisal[0])
    assert np.isfinite(found[0].surprisal[1])
    assert [
        tokenize(with_rendering(tokenizer, Rendering(bos=True)), one, "it").leading for one in texts[:2]
    ] == [
        1,
        1,
    ]


def test_a_tokenizer_that_puts_bos_first_puts_it_once() -> None:
    lens = lens_of(make_llama(vocab_size=len(byte_tokenizer())))
    for text in ("a text", CHAT):
        plain, found = (score(lens, byte_tokenizer(), [text], bos=bos)[0] for bos in (False, True))
        np.testing.assert_array_equal(plain.token_ids, found.token_ids)


def test_windows_begin_with_bos(lens: Any, tokenizer: Tokenizer) -> None:
    text = "one two three four five six seven eight"
    (found,) = score(lens, tokenizer, [text], window=12, bos=True)
    written = f"{tokenizer.bos_token}{text}"
    (same,) = score(lens, tokenizer, [written], window=12)
    np.testing.assert_allclose(found.phi, same.phi, atol=1e-5)


# Replies.


def test_replies_are_read_as_they_were_asked_for(lens: Any, tokenizer: Tokenizer) -> None:
    """The prompt is the one that a model has when it writes: options, system and BOS in it, each once."""
    chosen = {"chat_options": {"enable_thinking": False}, "system": "Be brief.", "bos": True}
    table = philens.rank(lens, tokenizer, QUESTION, ["5", "6"], **chosen)
    prompt = (
        "<|endoftext|><|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n2 + 3?<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )
    by_hand = measure_replies(lens, tokenizer, [prompt] * 2, ["5", "6"])
    ranked = table.sort_values("candidate")
    np.testing.assert_allclose(ranked["phi_mean"], by_hand["phi_mean"], atol=1e-5)
    np.testing.assert_allclose(ranked["surprisal_mean"], by_hand["surprisal_mean"], atol=1e-5)
    assert list(ranked["tokens"]) == [1, 1]
    directly = measure_replies(lens, tokenizer, [QUESTION] * 2, ["5", "6"], **chosen)
    np.testing.assert_allclose(directly["phi_mean"], by_hand["phi_mean"], atol=1e-5)
    reward = philens.PHiReward(lens, tokenizer, **chosen)
    answers = [[{"role": "assistant", "content": text}] for text in "56"]
    np.testing.assert_allclose(reward([QUESTION] * 2, answers), by_hand["phi_mean"], atol=1e-5)
    assert reward([QUESTION], answers[:1]) != philens.PHiReward(lens, tokenizer)([QUESTION], answers[:1])
    with pytest.raises(ConfigError, match="no variable 'thinking'"):  # before any training
        philens.PHiReward(lens, tokenizer, chat_options={"thinking": False})
    ids = prompt_ids(with_rendering(tokenizer, Rendering(**chosen)), QUESTION)
    assert ids == tokenizer(prompt, add_special_tokens=False).input_ids


def test_without_a_template_a_system_is_a_message(tokenizer: Tokenizer) -> None:
    tokenizer.chat_template = None
    chosen = with_rendering(tokenizer, Rendering(system="Be brief.", bos=True))
    assert tokenizer.decode(prompt_ids(chosen, QUESTION)) == (
        "<|endoftext|>Be brief.\n\nQuestion: 2 + 3?\nAnswer:"
    )


def test_solutions_and_what_measures_them(model: Path, tmp_path: Path) -> None:
    problems = load_problems("arithmetic", limit=2)
    folder, source = tmp_path / "out", ModelSource(str(model / "model"))
    options: dict[str, Any] = {"prompt": PROMPTS["arithmetic"], "samples": 1, "max_new_tokens": 3}
    chosen: dict[str, Any] = {"chat_options": {"enable_thinking": False}, "system": "Be brief."}
    solve(source, problems, folder, **options, **chosen)
    record = json.loads((folder / "solve.json").read_text())
    example = record["prompt"]["example"]
    assert example.startswith("<|im_start|>system\nBe brief.<|im_end|>\n")
    assert example.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert record["settings"].items() >= chosen.items()
    assert read_rendering(folder) == Rendering(**chosen)
    assert read_rendering(folder / "solutions.jsonl") == Rendering()
    with pytest.raises(philens.PhilensError, match="was begun with another chat options"):
        solve(source, problems, folder, **options, system="Be brief.")


# Writing on.


def test_a_model_writes_on_after_bos(lens: Any, tokenizer: Tokenizer) -> None:
    chosen = with_rendering(tokenizer, Rendering(bos=True))
    pieces: list[str] = []
    options: dict[str, Any] = {"max_new_tokens": 2, "do_sample": False}
    generation = stream(lens, chosen, "abc", lambda piece, *_: pieces.append(piece), **options)
    assert generation.sequences[0, :4].tolist() == [0, *tokenizer("abc").input_ids]
    assert "".join(pieces).startswith("<|endoftext|>abc")
    explored = Explored("tiny", chosen, {"layer": lens})
    text = explored.write("abc", next(iter(explored.points)), 2, Job())
    lens.enable()
    assert text == tokenizer.decode(generation.sequences[0, 1:], skip_special_tokens=True)


# Training.


def trained_on(tmp_path: Path, model: Path, **options: Any) -> tuple[Any, Any]:
    """The first document that a recipe with these options reads, as token ids and which count."""
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": CHAT}) + "\n")
    (tmp_path / "text.txt").write_text("a text")
    overrides = {"model.base": str(model / "model"), "phi.layer": 1, "data.length": 256}
    parts = {"mine": {"source": str(tmp_path / options.pop("source", "chats.jsonl"))}}
    keys = {f"data.rendering.{key}": value for key, value in options.items()}
    recipe = load_recipe(None, overrides | {"data.parts": parts} | keys)
    _, tokenizer = start_model(recipe)
    documents = text_mixture(recipe, tokenizer).documents(np.array([0]))
    return documents.tokens, documents.counted


@pytest.mark.parametrize("template", [THINKING, GENERATION, None])
def test_a_layer_is_trained_on_chats_as_they_are_scored(
    template: str | None, model: Path, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer.chat_template = template
    folder = tmp_path / "model"
    shutil.copytree(model / "model", folder / "model")
    (folder / "model" / "chat_template.jinja").unlink()
    tokenizer.save_pretrained(folder / "model")
    chosen: dict[str, Any] = {"system": "Be brief.", "bos": "true"}
    if template == THINKING:
        chosen["chat_options.effort"] = "low"
    plain, _ = trained_on(tmp_path, folder)
    found, counted = trained_on(tmp_path, folder, **chosen)
    text = tokenizer.decode(found)
    assert text.startswith("<|endoftext|>")
    assert text.count("Be brief.") == 1
    assert "Be brief." not in tokenizer.decode(plain)
    assert tokenizer.decode(found[counted]).startswith("It is 5.")
    if template is not None:
        kept = with_rendering(tokenizer, load_rendering(chosen))
        np.testing.assert_array_equal(found, tokenize(kept, CHAT, "it").token_ids)


def load_rendering(chosen: dict[str, str]) -> Rendering:
    keys = {f"data.rendering.{key}": value for key, value in chosen.items()}
    return load_recipe(None, {"data.parts": {"mine": {"source": "chats.jsonl"}}} | keys).data.rendering


def test_what_training_takes_from_the_command_line() -> None:
    chosen = {"chat_options": "{a: 1}", "chat_options.enable_thinking": "false", "system": "Be brief."}
    assert load_rendering(chosen) == Rendering({"a": 1, "enable_thinking": False}, "Be brief.")
    recipe = load_recipe(None, {"data.parts": {"a": {"source": "b"}}, "data.rendering.bos": "true"})
    assert from_plain(plain(recipe), Path("run"), "0.1").data.rendering == Rendering(bos=True)


def test_texts_are_trained_on_after_bos(model: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    ids, counted = trained_on(tmp_path, model, source="text.txt", bos=True)
    assert ids.tolist() == [0, *tokenizer("a text").input_ids, 0]
    assert counted.all()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            {"source": "text.txt", "system": "Be brief."},
            "The text of data.parts is plain text, and system and",
        ),
        ({"chat_options": {"thinking": True}}, "The chat template has no variable 'thinking'; those that"),
        ({"chat_options": "2024-07-26"}, "data.rendering.chat_options must be keys with a value each, what "),
        (
            {"chat_options": "{a: 2024-07-26}"},
            "must be keys with a value each, what JSON can hold, not {'a': ",
        ),
    ],
)
def test_what_training_refuses(options: Any, sentence: str, model: Path, tmp_path: Path) -> None:
    with pytest.raises(philens.PhilensError, match=re.escape(sentence)):
        trained_on(tmp_path, model, **options)


def test_formal_languages_are_no_text() -> None:
    with pytest.raises(philens.PhilensError, match=r"data\.rendering is for text, and formal languages are"):
        load_recipe(None, {"data.rendering.system": "Be brief."})


# Commands.


def test_commands(command: Any, tmp_path: Path) -> None:
    chats = tmp_path / "chats.jsonl"
    chats.write_text(json.dumps({"messages": CHAT}) + "\n")
    chosen = ("--chat-option", "effort=low", "--system", "Be brief.", "--bos")
    code, out, err = command("score", chats, "--format", "jsonl", *chosen)
    assert code == 0, err
    found = json.loads(out)
    assert found["token_ids"][0] == 0
    assert found["text"].endswith("low")
    assert "Be brief." in found["text"]
    own = {"chat_options": {"effort": "low"}, "system": "Be brief.", "bos": True}
    assert found["provenance"].items() >= own.items()
    folder = tmp_path / "scores"
    for words, expected in ((chosen, 0), (chosen, 0), (chosen[:2], 2)):
        code, _, err = command("score", chats, "--format", "jsonl", "--output", folder, *words)
        assert code == expected, err
    assert "was begun with another system ('Be brief.', now None)" in err
    candidates = tmp_path / "candidates.jsonl"
    candidates.write_text(json.dumps({"prompt": QUESTION, "candidates": ["5", "6"]}) + "\n")
    tables = []
    for words in ((), ("--chat-option", "enable_thinking=false")):
        code, out, err = command("rank", candidates, "--format", "jsonl", *words)
        assert code == 0, err
        tables.append([json.loads(line)["phi_mean"] for line in out.splitlines()])
    assert tables[0] != tables[1]
    code, out, err = command("score", "--generate", "abc", "--bos", "--max-new-tokens", 1)
    assert code == 0, err
    assert "<|endoftext|>" in out


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("score chats.jsonl --chat-option thinking=false", "The chat template has no variable 'thinking'"),
        ("score chats.jsonl --chat-option thinking", "--chat-option must be KEY=VALUE, not 'thinking'"),
        ("score a.txt --system Be", "a.txt is plain text, and system and chat options are for chats"),
        ("score --generate a --system Be", "--generate goes on from plain text; leave out --chat-option and"),
        ("rank texts.jsonl --system Be", "is plain text, and system and chat options are for chats"),
        ("solve --problems arithmetic --limit 2 --chat-option a=1", "The chat template has no variable 'a'"),
    ],
)
def test_bad_choices(
    words: str, sentence: str, command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("chats.jsonl").write_text(json.dumps({"messages": CHAT}) + "\n")
    Path("texts.jsonl").write_text(json.dumps({"prompt": "2 + 3 = ", "candidates": ["5", "6"]}) + "\n")
    Path("a.txt").write_text("a text")
    code, out, err = command(*words.split())
    assert code == 2
    assert out == ""
    assert err.startswith("philens: error: ")
    assert sentence in err
    assert err.count("\n") == 1
