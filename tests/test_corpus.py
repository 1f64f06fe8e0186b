"""Corpora: every way in gives the same texts, whatever their size; shards hold each exactly once."""

import gzip
import io
import json
import os
import re
import sys
import tracemalloc
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from pyarrow import parquet

from philens import findings
from philens.scoring import corpus as corpus_module
from philens.scoring import shards
from philens.scoring.corpus import Corpus, Document
from philens.scoring.scores import TokenScores
from philens.scoring.shards import Progress, chunks, write_shards
from philens.support.errors import InputError, OutputError
from philens.support.processes import ALONE, Rank

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write(name: str, content: str | bytes) -> str:
    Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return name


def write_records(name: str, records: Sequence[Any]) -> str:
    if name.endswith(".parquet"):
        pd.DataFrame(records).to_parquet(name)
        return name
    return write(name, "".join(json.dumps(record) + "\n" for record in records))


def pairs(*inputs: str, **options: Any) -> list[tuple[str, Any]]:
    return [(document.id, document.content) for document in Corpus(inputs, **options)]


def error_of(*inputs: str, **options: Any) -> str:
    with pytest.raises(InputError) as caught:
        pairs(*inputs, **options)
    message = str(caught.value)
    assert re.fullmatch(r"[^\n]+\.", message), message
    return message


def test_text_files_whole_or_by_line() -> None:
    text = "\ufeffone\r\n\n  \ntwo é\x0b\x85 three\u2028\nno end"
    write("a.txt", text)
    write("b", "b\n")
    write("empty.txt", "")
    assert pairs("a.txt", "b", "empty.txt") == [("a.txt", text[1:]), ("b", "b\n")]
    lines = [
        ("a.txt:1", "one"),
        ("a.txt:4", "two é\x0b\x85 three\u2028"),
        ("a.txt:5", "no end"),
        ("b:1", "b"),
    ]
    assert pairs("a.txt", "b", by="line") == lines
    corpus = Corpus(["a.txt", "b"], by="line")
    assert all(document.content for document in corpus)
    assert corpus.skipped == 2
    assert corpus.size == sum(Path(name).stat().st_size for name in ("a.txt", "b"))
    assert [document.end for document in corpus][-1] == corpus.size
    assert [document.id for document in corpus] == [name for name, _ in lines]  # again from the start
    assert pairs("a.txt", "b", by="line", limit=2) == lines[:2]


def test_standard_input_and_pipes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"one\ntwo\n")))
    assert pairs("-", by="line") == [("-:1", "one"), ("-:2", "two")]
    read, put = os.pipe()
    os.write(put, b"piped")
    os.close(put)
    corpus = Corpus([f"/dev/fd/{read}"])
    assert corpus.size is None
    assert [document.content for document in corpus] == ["piped"]
    os.close(read)


@pytest.mark.parametrize("by", ["file", "line"])
def test_long_texts_become_several_documents(by: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus_module, "MAX_CHARACTERS", 10)
    long = "ééé" * 7 + "日" * 4
    text = f"ab\ncdef\nghijkl\n{long}\nend\n"
    write("a.txt", text)
    found = pairs("a.txt", by=by)
    assert "".join(content for _, content in found) == (text if by == "file" else text.replace("\n", ""))
    assert max(len(content) for _, content in found) <= 10
    assert len({name for name, _ in found}) == len(found)
    for name, content in found:
        place = [int(number) for number in name.split(":")[1:]]
        line = text.splitlines(keepends=True)[place[0] - 1]
        assert (line[place[1] - 1 :] if len(place) > 1 else line).startswith(content.split("\n")[0])
    if by == "file":
        assert found[:2] == [("a.txt:1", "ab\ncdef\n"), ("a.txt:3", "ghijkl\n")]
    else:
        assert found[:3] == [("a.txt:1", "ab"), ("a.txt:2", "cdef"), ("a.txt:3", "ghijkl")]
    for name in ("a.jsonl", "a.parquet"):
        write_records(name, [{"text": "short"}, {"text": text}])
        found = pairs(name)
        assert found[:3] == [
            (f"{name}:1", "short"),
            (f"{name}:2:1", "ab\ncdef\n"),
            (f"{name}:2:9", "ghijkl\n"),
        ]
        assert "".join(content for _, content in found[1:]) == text
        assert max(len(content) for _, content in found) <= 10


def test_an_endless_input_gives_documents_all_the_time() -> None:
    documents = iter(Corpus(["/dev/zero"]))
    tracemalloc.start()
    for _ in range(3):
        assert len(next(documents).content) == corpus_module.MAX_CHARACTERS
    assert tracemalloc.get_traced_memory()[1] < 8 * corpus_module.MAX_CHARACTERS
    tracemalloc.stop()


@pytest.mark.parametrize("line", [b"x" * 999 + b"\n", b"x" * 1000], ids=["lines", "no line"])
@pytest.mark.parametrize("by", ["file", "line"])
def test_memory_does_not_grow_with_the_file(line: bytes, by: Any) -> None:
    with open("big.txt", "wb") as file:
        for _ in range(120):
            file.write(line * 100)
    tracemalloc.start()
    characters = sum(len(document.content) for document in Corpus(["big.txt"], by=by))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert characters == 12_000_000 - 12_000 * (by == "line" and line.endswith(b"\n"))
    assert peak < 7 * corpus_module.MAX_CHARACTERS


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.parquet"])
def test_records(name: str) -> None:
    texts = ["one", " \n", None, "two\nlines é", ""]
    write_records(name, [{"text": text, "n": number} for number, text in enumerate(texts)])
    expected = [(f"{name}:1", "one"), (f"{name}:4", "two\nlines é")]
    assert pairs(name) == expected
    corpus = Corpus([name])
    assert [document.end for document in corpus][-1] <= (corpus.size or 0)
    assert corpus.skipped == 3
    assert error_of(name, field="body") == (
        f"{name}{'' if name.endswith('parquet') else ' line 1'} has no field 'body'; it has 'text', 'n': "
        "choose one with --field."
    )
    assert "field 'n' must be text, or a list of messages with role and content, not '0'." in error_of(
        name, field="n"
    )
    write_records(name, [{"messages": CHAT}, {"messages": []}])
    assert pairs(name) == [(f"{name}:1", CHAT)]
    write_records(name, [{"turns": CHAT, "text": "no"}])
    assert pairs(name, field="turns") == [(f"{name}:1", CHAT)]
    write_records(name, [{"messages": [{"role": "user", "content": 3}]}])
    where = "a.parquet row 1" if name.endswith("parquet") else f"{name} line 1"
    assert error_of(name).startswith(f"{where} has a content that is no text in message 1 (3); give text, ")
    parts = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    write_records(name, [{"messages": parts}])
    assert pairs(name) == [(f"{name}:1", parts)]


def test_a_data_set_of_the_hub(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    write_records("data/train.jsonl", [{"text": f"text {number}"} for number in range(5)])
    write_records("data/test.jsonl", [{"text": "held out"}])
    name = f"hub:{folder}"
    assert pairs(name, limit=3) == [(f"{name}:{number + 1}", f"text {number}") for number in range(3)]
    assert pairs(name, split="test") == [(f"{name}:1", "held out")]
    assert "The data set" in error_of(name, split="nothing")
    assert "The data set nobody/nothing cannot be read" in error_of("hub:nobody/nothing")
    assert "has no field 'body'" in error_of(name, field="body")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"caf\xc3\xa9 caf\xe9\n", "a.txt is not UTF-8: byte 10 is 0xe9; if it is text, convert it"),
        (b"line\n\xff", "a.txt is not UTF-8: byte 6 is 0xff;"),
        (b"cut \xc3", "a.txt is not UTF-8: byte 5 is 0xc3;"),
        (b"x" * 20 + b"\xc3\xc3", "a.txt is not UTF-8: byte 21 is 0xc3;"),
    ],
)
def test_text_that_is_not_utf8(content: bytes, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write("a.txt", content)
    assert message in error_of("a.txt")
    monkeypatch.setattr(corpus_module, "MAX_CHARACTERS", 7)
    assert message in error_of("a.txt", by="line")


def test_inputs_that_cannot_be_read() -> None:
    assert "There is nothing to score; give files" in error_of()
    assert error_of("missing") == "There is no file missing; check the path."
    assert error_of(".") == ". is a folder; give the files in it."
    write("a.txt", "a")
    assert "limit must be at least 1, not 0." in error_of("a.txt", limit=0)
    assert "a.txt is read as text and has no fields; --field goes with" in error_of("a.txt", field="text")
    write("a.jsonl", '{"text": "a"}\n{"text": \n')
    assert "a.jsonl line 2 is not JSON (Expecting value" in error_of("a.jsonl")
    write("a.jsonl", "\n[1]\n")
    assert 'a.jsonl line 2 is no record: it must look like {"text": ...}.' in error_of("a.jsonl")
    write("a.jsonl", b'{"text": "\xff"}\n')
    assert "a.jsonl line 1 is not JSON" in error_of("a.jsonl")
    write("a.jsonl", '{"text": "\\ud800"}\n')
    assert "a.jsonl line 1: field 'text' holds half a character" in error_of("a.jsonl")
    write("a.jsonl", "[" * 100_000)
    assert "a.jsonl line 1 is not JSON" in error_of("a.jsonl")
    write("a.jsonl", "{}")
    assert "a.jsonl line 1 has no field 'text'; it has none" in error_of("a.jsonl")
    write("a.parquet", "something else")
    assert "a.parquet cannot be read as Parquet" in error_of("a.parquet")


def test_a_record_of_any_length_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus_module, "MAX_RECORD_BYTES", 1 << 20)
    write("a.jsonl", b"x" * (1 << 20))
    assert "a.jsonl line 1 is longer than 1 MB" in error_of("a.jsonl")


# Shards


def scores_of(text: str, name: str | None = None, **provenance: Any) -> TokenScores:
    """A text with one token a character."""
    place = np.arange(len(text))
    columns = {"phi": np.sqrt(place).astype(np.float32), "surprisal": (place / 3).astype(np.float32)}
    columns["surprisal"][:1] = np.nan
    ids, offsets = np.array([ord(one) for one in text]), np.stack([place, place + 1], 1)
    return TokenScores(text, ids, offsets, columns, (), provenance, name=name)


def score(group: Sequence[Document], model: str = "mine") -> Iterator[TokenScores]:
    """Scores that tell which documents were scored together, as batches would."""
    for document in group:
        text = document.content if isinstance(document.content, str) else "chat"
        versions = {"philens": len(group)}
        yield scores_of(text, name=document.id, model=model, group=group[0].id, versions=versions)


def documents(count: int = 40, start: int = 0) -> Iterator[Document]:
    for number in range(start, start + count):
        yield Document(f"d{number}", f"text {number} " * (number % 5 + 1), number)


FOLDER, OPTIONS = Path("out"), {"metrics": ["phi"], "window": None}
Form = Any


def run(
    form: Form = "jsonl",
    texts: Any = None,
    scorer: Any = None,
    characters: int = 120,
    rank: Rank = ALONE,
    schedule: shards.Schedule | None = None,
    **options: Any,
) -> tuple[Progress, bool]:
    def one_model(group: Sequence[Document]) -> Iterator[TokenScores]:
        for scores in score(group):
            scores.provenance.pop("group")
            yield scores

    texts = list(documents()) if texts is None else texts
    options = OPTIONS | options
    return write_shards(
        FOLDER, texts, scorer or one_model, options, form, characters, rank=rank, schedule=schedule
    )


def parts(form: Form = "jsonl") -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(FOLDER.glob(f"*.{form}"))}


def test_chunks_hold_every_document_once_in_order() -> None:
    groups = list(chunks(documents(), 100))
    assert [document.id for group in groups for document in group] == [f"d{number}" for number in range(40)]
    for group in groups[:-1]:
        lengths = [len(document.content) for document in group]
        assert sum(lengths) >= 100 > sum(lengths[:-1])
    assert [len(group) for group in chunks([Document("c", CHAT, 0)] * 3, 4)] == [1, 1, 1]
    assert list(chunks([], 4)) == []


def test_json_lines_are_token_scores() -> None:
    progress, new = run()
    assert new
    lines = b"".join(parts().values()).decode().splitlines()
    assert len(lines) == progress.documents == 40
    for line, document in zip(lines, documents(), strict=True):
        record, scores = json.loads(line), TokenScores.from_json(line)
        expected = scores_of(str(document.content))
        assert record["id"] == document.id
        assert (scores.name, scores.provenance) == (document.id, {})  # the rest is in the manifest
        assert record["means"] == pytest.approx(expected.means())
        assert scores.text == expected.text
        for name, values in expected.columns.items():
            np.testing.assert_array_equal(scores.columns[name], values)
    assert progress.tokens == sum(len(str(document.content)) for document in documents())
    assert len(parts()) == progress.shards == 8
    manifest = json.loads((FOLDER / "_manifest.json").read_text())
    assert manifest["provenance"] == {"model": "mine"}
    assert manifest["progress"]["documents"] == 40
    assert sorted(path.name for path in FOLDER.iterdir()) == [".lock", "_manifest.json", *parts()]


def test_parquet_folders_are_data_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "_ROW_GROUP_TOKENS", 20)
    run("parquet", texts=[*documents(), Document("x", "x", 0)])
    frame = pd.read_parquet(FOLDER)
    assert list(frame.id) == [f"d{number}" for number in range(40)] + ["x"]
    for row in frame.itertuples():
        expected = scores_of(str(row.text))
        np.testing.assert_array_equal(row.phi, expected.phi)
        np.testing.assert_array_equal(row.surprisal, expected.surprisal)
        np.testing.assert_array_equal(row.token_ids, expected.token_ids)
        np.testing.assert_array_equal(np.stack([row.starts, row.ends], 1), expected.offsets)
        assert row.phi_mean == pytest.approx(expected.means()["phi"])
    assert np.isnan(frame.surprisal_mean.iloc[-1])
    origin = json.loads(parquet.read_schema(FOLDER / "part-00000.parquet").metadata[b"philens"])
    assert origin == {"model": "mine", "versions": {"philens": 7}}


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_stopped_anywhere_it_ends_the_same(form: Form, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped before or after every single replacement of a file, or while a shard is written."""
    undisturbed, _ = run(form, characters=300)
    expected, manifest = parts(form), (FOLDER / "_manifest.json").read_text()
    real, stops = os.replace, 0
    for when in ("before", "after"):
        for number in range(3 * undisturbed.shards + 2):
            for path in FOLDER.iterdir():
                path.unlink()
            calls = iter(range(1000))

            def replace(source: Any, target: Any, number: int = number, when: str = when, calls: Any = calls):
                now = next(calls)
                if now == number and when == "before":
                    raise KeyboardInterrupt
                real(source, target)
                if now == number:
                    raise KeyboardInterrupt

            with monkeypatch.context() as patch:
                patch.setattr(findings.os, "replace", replace)
                with pytest.raises(KeyboardInterrupt):
                    run(form, characters=300)
            left = FOLDER / (f".part-00001.{form}.1.tmp" if parts(form) else "._manifest.json.1.tmp")
            left.write_text("half")  # as kill -9 leaves it
            found = {name: content for name, content in parts(form).items() if not name.startswith(".")}
            assert found.items() <= expected.items()
            again, _ = run(form, characters=300)
            stops += 1
            assert again == undisturbed
            assert parts(form) == expected
            assert (FOLDER / "_manifest.json").read_text() == manifest
            assert run(form, characters=300) == (undisturbed, False)
    assert stops == 2 * (3 * undisturbed.shards + 2) == 22


def one_of(number: int, of: int, **options: Any) -> tuple[Progress, bool]:
    """One of several processes, from its beginning to its end."""
    return run(rank=Rank(number, of), **options)


def test_several_processes_in_any_order_write_what_one_writes() -> None:
    expected, _ = run()
    content, manifest = parts(), (FOLDER / "_manifest.json").read_text()
    for order in ([0, 1, 2], [2, 1, 0], [1, 0, 2]):
        for path in FOLDER.iterdir():
            path.unlink()
        reached = [one_of(number, 3) for number in order]
        assert [progress.finished for progress, _ in reached] == [False, False, True]
        assert reached[-1] == (expected, True)  # the last one, whoever it is
        assert parts() == content
        assert (FOLDER / "_manifest.json").read_text() == manifest
        assert not list(FOLDER.glob("_part-*"))
        assert one_of(1, 2) == (expected, False)


def test_one_of_two_that_end_together_says_so() -> None:
    """The other finds its own last shard taken in already."""
    first: list[tuple[Progress, bool]] = []

    def schedule(job: shards.Job, done: shards.Done) -> Iterator[None]:
        yield from shards.one_by_one(job, done, Rank(1, 2))
        first.append(one_of(0, 2))

    reached = run(rank=Rank(1, 2), schedule=schedule)
    assert first == [(reached[0], True)]
    assert reached[0].finished
    assert not reached[1]


def test_shards_before_their_turn_are_known_by_their_input() -> None:
    one_of(1, 3)
    assert sorted(parts()) == ["part-00001.jsonl", "part-00004.jsonl", "part-00007.jsonl"]
    assert json.loads((FOLDER / "_manifest.json").read_text())["progress"]["shards"] == 0
    late = [*list(documents())[:30], *documents(10, start=100)]
    assert "is not the one that out was begun with" in refused(texts=late)
    assert "is not the one that out was begun with" in refused(texts=list(documents(5)))
    assert "another window (None, now 7)" in refused(window=7)
    other = [Document("first", "text", 0), *documents()]
    assert "is not the one that out was begun with" in refused(texts=other)
    assert "another model" in refused(scorer=lambda group: score(group, "other"))
    scored: list[str] = []

    def scorer(group: Sequence[Document]) -> Iterator[TokenScores]:
        scored.append(group[0].id)
        for document in group:
            yield scores_of(str(document.content), model="mine")

    progress, _ = run(scorer=scorer)
    assert (len(scored), progress.shards, progress.documents) == (5, 8, 40)
    (FOLDER / "part-00004.jsonl").unlink()
    assert "out has lost part-00004.jsonl" in refused()


def test_damaged_records() -> None:
    one_of(1, 2)
    (FOLDER / "_part-00001.json").write_text("{}")
    assert "_part-00001.json is damaged" in refused()


def test_a_process_of_an_earlier_command_that_still_writes() -> None:
    messages: list[str] = []

    def scorer(group: Sequence[Document]) -> Iterator[TokenScores]:
        for number, of in ((0, 1), (1, 2), (1, 3)):
            with pytest.raises(OutputError, match="Another process is writing into out") as caught:
                one_of(number, of)
            messages.append(str(caught.value))
        for document in group:
            yield scores_of(str(document.content), model="mine")

    one_of(1, 2, scorer=scorer)
    assert len(messages) == 3 * 4


def test_a_stop_changes_nothing_in_how_documents_are_batched() -> None:
    """Documents of a shard are scored together, however many shards were there."""
    together: dict[str, list[str]] = {}

    def stopping(after: int) -> Any:
        def scorer(group: Sequence[Document]) -> Iterator[TokenScores]:
            nonlocal after
            together.setdefault(group[0].id, [document.id for document in group])
            assert together[group[0].id] == [document.id for document in group]
            if not after:
                raise KeyboardInterrupt
            after -= 1
            for scores in score(group):
                yield scores_of(scores.text)

        return scorer

    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            run(scorer=stopping(2))
    progress, _ = run(scorer=stopping(100))
    assert progress.shards == len(together) == 8


def test_a_finished_folder_asks_for_no_model() -> None:
    run()

    def scorer(group: Sequence[Document]) -> Iterator[TokenScores]:
        raise AssertionError

    assert run(scorer=scorer)[1] is False


def stop_after(shards_done: int, **options: Any) -> None:
    def scorer(group: Sequence[Document]) -> Iterator[TokenScores]:
        nonlocal shards_done
        if not shards_done:
            raise KeyboardInterrupt
        shards_done -= 1
        for document in group:
            yield scores_of(str(document.content), model="mine")

    with pytest.raises(KeyboardInterrupt):
        run(scorer=scorer, **options)


def refused(**options: Any) -> str:
    before = parts()
    with pytest.raises(OutputError) as caught:
        run(**options)
    assert parts() == before
    assert re.fullmatch(r"[^\n]+\.", str(caught.value))
    return str(caught.value)


def test_another_run_is_refused() -> None:
    stop_after(3)
    assert "begun with another window (None, now 7); give the same command again" in refused(window=7)
    assert "another shard characters (120, now 130)" in refused(characters=130)
    assert "another format ('jsonl', now 'parquet')" in refused(form="parquet")
    other = [Document(document.id, "another text", 0) for document in documents()]
    assert "changed within its first 18 documents" in refused(texts=other)
    assert "changed within its first 18 documents" in refused(texts=documents(5))
    renamed = (Document("x" + document.id, document.content, 0) for document in documents())
    assert "changed within" in refused(texts=renamed)
    assert "another model ('mine', now 'other')" in refused(scorer=lambda group: score(group, "other"))
    (FOLDER / "part-00001.jsonl").unlink()
    assert "out has lost part-00001.jsonl" in refused()


def test_what_was_not_read_yet_may_change() -> None:
    """The rows are then those of an undisturbed run over what the input is now."""
    stop_after(3)
    texts = [*list(documents())[:20], *documents(5, start=100)]
    found = [
        json.loads(line)["id"] for line in b"".join((run(texts=texts), parts())[1].values()).splitlines()
    ]
    assert found == [document.id for document in texts]
    texts += documents(30, start=200)
    assert "changed within its first 25 documents" in refused(texts=texts)


def test_nothing_is_lost_with_options_that_failed_at_once() -> None:
    stop_after(0)
    stop_after(0, window=3)
    assert run(window=7)[1]


def test_foreign_and_damaged_folders() -> None:
    FOLDER.mkdir()
    (FOLDER / "part-00000.parquet").write_text("mine")
    assert "out holds other files (part-00000.parquet)" in refused(form="parquet")
    assert (FOLDER / "part-00000.parquet").read_text() == "mine"
    (FOLDER / "part-00000.parquet").unlink()
    run()
    manifest = FOLDER / "_manifest.json"
    text = manifest.read_text()
    for damaged in (
        "{",
        "{}",
        "[]",
        '{"format": 1, "progress": {}, "x": 1}',
        text.replace('"shards"', '"s"'),
    ):
        manifest.write_text(damaged)
        assert "_manifest.json is damaged" in refused()
    manifest.write_text(text.replace('"format": 1', '"format": 2'))
    assert "another version of philens" in refused()
    write("file", "")
    with pytest.raises(OutputError, match="Cannot write"):
        write_shards(Path("file"), documents(), score, {}, "jsonl", 100)
    with pytest.raises(InputError, match="the input has no text"):
        write_shards(Path("empty"), [], score, {}, "jsonl", 100)


def test_two_processes_in_one_folder() -> None:
    messages: list[str] = []

    def scorer(group: Sequence[Document]) -> Iterator[TokenScores]:
        if not messages:
            with pytest.raises(OutputError) as caught:
                run()
            messages.append(str(caught.value))
        for document in group:
            yield scores_of(str(document.content))

    run(scorer=scorer)
    assert messages == ["Another process is writing into out; wait for it or choose another --output."]
    assert run(scorer=scorer)[1] is False  # the lock is gone


def test_only_a_shard_of_documents_is_alive_at_once() -> None:
    alive: weakref.WeakSet[Any] = weakref.WeakSet()
    most = 0

    def many() -> Iterator[Document]:
        nonlocal most
        for number in range(2000):
            document = Document(f"d{number}", "x" * 50, number)
            alive.add(document)
            most = max(most, len(alive))
            yield document

    def scorer(group: Sequence[Document]) -> Iterator[TokenScores]:
        nonlocal most
        for document in group:
            scores = scores_of(str(document.content))
            alive.add(scores.columns["phi"].view(Counted))
            most = max(most, len(alive))
            yield scores

    progress, _ = run(texts=many(), scorer=scorer, characters=5000)
    assert progress.documents == 2000
    assert progress.shards == 20
    assert most < 320  # a hundred documents a shard


class Counted(np.ndarray):
    """An array that can be in a weak set."""

    __hash__ = object.__hash__


# Tables, and what is compressed.


def piped(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))


def packed(name: str, content: bytes) -> str:
    """A file, compressed as its name says."""
    if name.endswith(".gz"):
        content = gzip.compress(content[:3]) + gzip.compress(content[3:])  # several members are one file
    elif name.endswith(".zst"):
        content = pa.compress(content, codec="zstd", asbytes=True)
    return write(name, content)


TABLE = [{"text": 'one, "two"', "n": "1"}, {"text": "three\nlines é", "n": "2"}, {"text": "", "n": "3"}]
CSV = '\ufefftext,n\r\n"one, ""two""",1\r\n"three\nlines é",2\r\n\r\n,3\r\n'.encode()
TSV = 'text\tn\n"one, ""two"""\t1\n"three\nlines é"\t2\n\t3\n'.encode()
LINES_OF_JSON = "".join(json.dumps(row) + "\n" for row in TABLE).encode()
FORMS = {
    "a.csv": CSV,
    "a.tsv": TSV,
    "a.jsonl": LINES_OF_JSON,
    "a.json": json.dumps(TABLE, indent=2).encode(),
    "b.json": json.dumps(TABLE[0]).encode() + b"\n" + json.dumps(TABLE[1], indent=1).encode(),
}


@pytest.mark.parametrize("packing", ["", ".gz", ".zst"])
@pytest.mark.parametrize("form", FORMS)
def test_tables_are_read_as_what_they_are(form: str, packing: str) -> None:
    name = packed(form + packing, FORMS[form])
    expected = [(f"{name}:1", 'one, "two"'), (f"{name}:2", "three\nlines é")]
    assert pairs(name) == expected
    numbers = pairs(name, field="n", limit=2)
    assert numbers == [(f"{name}:1", "1"), (f"{name}:2", "2")]
    assert "has no field 'body'; it has 'text', 'n': choose one with --field." in error_of(name, field="body")
    corpus = Corpus([name])
    assert (corpus.size is None) == bool(packing)
    assert corpus.once is None
    assert len([*corpus]) == len([*corpus]) == 2


@pytest.mark.parametrize("packing", ["", ".gz", ".zst"])
@pytest.mark.parametrize("form", ["a.jsonl", "a.json", "b.json"])
def test_json_from_a_pipe(form: str, packing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    content = Path(packed(f"x{packing}", b"\n " + FORMS[form])).read_bytes()
    piped(monkeypatch, content)
    assert pairs("-") == [("-:1", 'one, "two"'), ("-:2", "three\nlines é")]
    piped(monkeypatch, content)
    assert pairs("-", field="n", limit=1) == [("-:1", "1")]
    read, put = os.pipe()
    os.write(put, content)
    os.close(put)
    assert [text for _, text in pairs(f"/dev/fd/{read}")] == ['one, "two"', "three\nlines é"]
    os.close(read)


@pytest.mark.parametrize(
    "text", ["[1] A note.", "{x} is a set", "{\n  int x;\n}", "[a](b)", "{", "[", "{{ 1 }}", "# [{"]
)
def test_text_from_a_pipe_stays_text(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    piped(monkeypatch, text.encode())
    assert pairs("-") == [("-", text)]
    piped(monkeypatch, text.encode())
    assert "- is read as text and has no fields" in error_of("-", field="text")


def test_texts_in_a_list_and_a_chat_in_a_file() -> None:
    write("a.json", '["one", "two"]')
    assert pairs("a.json") == [("a.json:1", "one"), ("a.json:2", "two")]
    write("a.json", json.dumps(CHAT))
    assert pairs("a.json") == [("a.json:1", CHAT)]
    lines = f"{json.dumps(CHAT)}\n{json.dumps(CHAT[:1])}\n"
    for name, content in [("a.json", lines), ("a.jsonl", lines), ("b.json", json.dumps([CHAT, CHAT[:1]]))]:
        assert pairs(write(name, content)) == [(f"{name}:1", CHAT), (f"{name}:2", CHAT[:1])]
    write("a.json", '["one"] ["two", "three"]\n')
    assert [text for _, text in pairs("a.json")] == ["one", "two", "three"]
    write("a.json", json.dumps([{"messages": CHAT}]))
    assert pairs("a.json") == [("a.json:1", CHAT)]


def test_packed_text(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "one\ntwo é\n" * 2000
    for name in ("a.txt.gz", "a.txt.zst", "a.txt"):
        packed(name, text.encode())
        assert pairs(name) == [(name, text)]
        assert len(pairs(name, by="line")) == 4000
        piped(monkeypatch, Path(name).read_bytes())
        assert pairs("-") == [("-", text)]


def test_json_longer_than_what_is_read_at_once() -> None:
    texts = [f"{number} " + "x" * 9000 for number in range(40)] + ["y" * 300_000]
    write("a.json", json.dumps([{"text": text} for text in texts]))
    tracemalloc.start()
    assert [text for _, text in pairs("a.json")] == texts
    tracemalloc.stop()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b'[{"text": "a"}, {"text"', "a.json record 2 is not JSON (Expecting"),
        ("a.json", b'[{"text": "a"}', "a.json breaks off within its list, after record 1; complete it."),
        ("a.json", b"[1, 2]", 'a.json record 1 is no record: it must look like {"text": ...}.'),
        ("a.json", b"text", "a.json record 1 is not JSON (Expecting value); correct or remove it."),
        ("a.json", b'{"text": "\xff"}', "a.json is not UTF-8 (invalid start byte); convert it"),
        (
            "a.json",
            b'[{"role": "user", "content": "x"}, 3]',
            "a.json record 1 holds 3; a chat is a list of messages",
        ),
        ("a.csv", b"", "a.csv is empty; its first row must name the columns."),
        ("a.csv", b"text,n\none,1,2\n", "a.csv row 1 has 3 fields and the first row names 2; put quotes"),
        ("a.csv", b'text\n"open\n', "a.csv cannot be read as a table (unexpected end of data, after row 0)"),
        ("a.tsv", b"text\n\xff\n", "a.tsv is not UTF-8 (invalid start byte); convert it (iconv -t UTF-8)."),
        ("a.csv", b"id;text\n1;a\n", "a.csv row 1 has no field 'text'; it has 'id;text': choose one"),
        (
            "a.txt.gz",
            gzip.compress(b"text" * 999, mtime=0)[:20],
            "a.txt.gz cannot be unpacked (Compressed file ended",
        ),
        ("a.parquet.gz", b"x", "a.parquet.gz is Parquet, which is compressed in itself, "),
    ],
)
def test_what_is_no_table(name: str, content: bytes, message: str) -> None:
    assert error_of(write(name, content)).startswith(message)


def test_damaged_zstandard() -> None:
    content = pa.compress(b"".join(os.urandom(99) for _ in range(99)), codec="zstd", asbytes=True)
    assert "a.zst cannot be unpacked (" in error_of(write("a.zst", content[: len(content) // 2]))
