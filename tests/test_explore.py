"""What is behind the page of `philens explore`: models, jobs, sessions, markup, and the command's errors."""

import base64
import json
import logging
import re
import socket
import sys
import threading
import zlib
from collections.abc import Callable
from dataclasses import asdict, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import philens
from conftest import make_llama, needs_smollm2
from philens import cli
from philens.bases.tokenizer import character_tokenizer
from philens.explore import view
from philens.explore.examples import LEVELS, examples
from philens.explore.link import START, Shown
from philens.explore.models import FORMAL, TEXT, Explored, Job, Stopped, open_all
from philens.explore.record import Record
from philens.explore.session import EXPORTS, NAMES, Session, Sessions, Update
from philens.explore.view import Look
from philens.scoring.parts import steps_of
from philens.scoring.score import score
from philens.show.page import MAX_PARTS
from philens.support.errors import AdapterError, ConfigError, InputError, PhilensError
from philens.support.output import visible
from philens.tasks.automata import TASKS
from philens.training.source import ModelSource
from test_scores import plain
from tiny import OF_A_LAYER

A, B = NAMES
PHI = ["phi", "surprisal"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with layers at several insertion points, as runs and sweeps leave them; and one with two."""
    folder = tmp_path_factory.mktemp("explore")
    base = make_llama()
    base.save_pretrained(folder / "model")
    character_tokenizer().save_pretrained(folder / "model")
    for name, layers in (("layer-10", 2), ("adapter", 1), ("layer-2", 0), ("both", [0, 2])):
        number: dict[str, Any] = (
            {"layers": layers, "mode": "observe"} if name == "both" else {"layer": layers}
        )
        lens = philens.attach(base, philens.PHiConfig(prior_heads=2, **number))
        lens.save_pretrained(folder / name)
        lens.detach()
    return folder


@pytest.fixture(scope="module")
def model(run: Path) -> Explored:
    return Explored.open(ModelSource(str(run)))


def last(updates: Any) -> Update:
    """The last of what a session says."""
    return [*updates][-1]


@needs_smollm2
def test_the_shipped_models_and_their_examples() -> None:
    models = open_all(None)
    assert list(models) == [TEXT, FORMAL]
    assert list(models[TEXT].points) == ["smollm2 (after model.layers.20)"]
    # The formal model was trained with the layer in the path and is none without it.
    assert models[FORMAL].first_metrics == ["phi", "surprisal_with_layer"]
    assert models[TEXT].first_metrics[:2] == PHI
    found = examples()
    assert list(found) == [*LEVELS, *(task.replace("_", " ") for task in TASKS)]
    surprisals = {}
    for name, one in found.items():
        assert one.formal == (name not in LEVELS)
        assert one.about.endswith(".")
        assert 200 < len(one.text) < 1_000
        chosen = models[FORMAL if one.formal else TEXT]
        point = next(iter(chosen.points))
        scores = chosen.read({A: one.text}, point, chosen.first_metrics, Job())[0]
        assert "".join(scores.pieces()) == one.text
        assert not chosen.unknown(scores)
        surprisals[name] = scores.means()[chosen.first_metrics[1]]
    # Known by heart.
    assert surprisals["memorised"] < surprisals["code"] < surprisals["shuffled"]
    assert surprisals["memorized sequences"] < 0.5
    assert surprisals["random"] > 2.5


@pytest.mark.usefixtures("without_smollm2")
def test_without_the_language_model_formal_languages_are_left(caplog: pytest.LogCaptureFixture) -> None:
    assert list(open_all(None)) == [FORMAL]
    assert caplog.messages[0].startswith("Only formal languages can be read: smollm2 is not in the cache")


def test_insertion_points_of_a_run_in_order(model: Explored) -> None:
    assert list(model.points) == [
        "adapter (after model.layers.1)",
        "layer-2 (after model.layers.0)",
        "layer-10 (after model.layers.2)",
    ]
    assert model.metrics("adapter (after model.layers.1)") == OF_A_LAYER
    with pytest.raises(ConfigError, match=r"has no insertion point 'x'; choose adapter"):
        model.metrics("x")


def test_each_point_reads_as_its_layer_alone(run: Path, model: Explored) -> None:
    texts = {A: "the cat sat on the mat", B: "b" * 700}  # longer than the context
    for point, name in zip(model.points, ("adapter", "layer-2", "layer-10"), strict=True):
        alone = philens.load(make_llama(), run / name)
        expected = score(alone, character_tokenizer(), list(texts.values()), metrics=OF_A_LAYER)
        for one, other in zip(model.read(texts, point, OF_A_LAYER, Job()), expected, strict=True):
            assert list(one.columns) == OF_A_LAYER
            for column in OF_A_LAYER:
                np.testing.assert_allclose(one.columns[column], other.columns[column], rtol=1e-4, atol=1e-5)
            assert one.provenance["insertion_point"] == point


def test_each_layer_of_an_adapter_with_several_is_a_point(run: Path) -> None:
    both = Explored.open(ModelSource(str(run / "model")), [str(run / "both")])
    assert list(both.points) == ["both (after model.layers.0)", "both (after model.layers.2)"]
    assert "surprisal_with_layer" not in both.metrics("both (after model.layers.0)")
    lens = philens.load(make_llama(), run / "both")
    expected = score(lens, character_tokenizer(), "the cat sat")[0]
    for point, path in zip(both.points, lens.module_paths, strict=True):
        found = both.read({A: "the cat sat"}, point, PHI, Job())[0]
        assert list(found.columns) == PHI
        np.testing.assert_allclose(found.phi, expected.columns[f"phi@{path}"], rtol=1e-4, atol=1e-5)


def test_adapters_named_and_those_of_a_sweep(run: Path) -> None:
    named = Explored.open(ModelSource(str(run / "model")), [str(run / "layer-2"), str(run / "both")])
    assert [point.split()[0] for point in named.points] == ["layer-2", "both", "both"]
    swept = Explored.open(ModelSource(str(run / "model")), [str(run)])
    assert [point.split()[0] for point in swept.points] == ["adapter", "layer-2", "layer-10"]
    with pytest.raises(AdapterError):
        Explored.open(ModelSource(str(run / "model")), [str(run / "nothing")])
    with pytest.raises(ConfigError, match="No PHi layer was named"):
        Explored.open(ModelSource(str(run / "model")))
    with pytest.raises(ConfigError, match="give --model too"):
        open_all(None, ["x"])


def test_a_job_counts_and_stops_at_the_next_block(model: Explored) -> None:
    point = next(iter(model.points))
    job = Job()
    model.read({A: "a" * 2_000}, point, PHI, job)
    assert job.done == job.total > 3
    assert job.share == 1.0

    class Early(Job):
        def step(self, *ignored: Any) -> None:
            super().step()
            if self.done == 4:
                self.stop()

    early = Early()
    with pytest.raises(Stopped):
        model.read({A: "a" * 2_000}, point, PHI, early)
    assert early.done == 4 < early.total
    early = Early()
    with pytest.raises(Stopped):
        model.write("abc", point, 50, early)
    assert early.done == 4
    # The base is as it was: no hook, no layer, nobody holds it.
    again = model.read({A: "abcd"}, point, PHI, Job())[0]
    alone = score(
        philens.load(make_llama(), model.points[point].lens.source or ""), character_tokenizer(), "abcd"
    )
    np.testing.assert_allclose(again.phi, alone[0].phi, rtol=1e-4, atol=1e-5)


def test_a_job_that_waits_for_the_model_can_be_stopped(model: Explored) -> None:
    point, job, outcome = next(iter(model.points)), Job(), []

    def wait() -> None:
        try:
            model.read({A: "abc"}, point, PHI, job)
        except Stopped:
            outcome.append("stopped")

    with model._lock:
        thread = threading.Thread(target=wait)
        thread.start()
        assert job.share is None
        job.stop()
        thread.join(10)
    assert outcome == ["stopped"]
    assert job.done == 0


def test_writing(model: Explored) -> None:
    point, job = next(iter(model.points)), Job()
    text = model.write("abc", point, 10, job)
    assert text.startswith("abc")
    assert len(text) == 13
    assert job.text == text
    assert model.write("abc", point, 10, Job()) == text
    drawn = {model.write("abc", point, 10, Job(), sample=True, temperature=5.0) for _ in range(4)}
    assert len(drawn) > 1
    with pytest.raises(InputError, match="nothing to go on from"):
        model.write("", point, 10, Job())
    with pytest.raises(
        InputError, match=r"has 500 tokens and the model reads 512 at once, .* no room for 13 more"
    ):
        model.write("a" * 500, point, 13, Job())
    for count in (0, 1_001):
        with pytest.raises(InputError, match=f"1 to 1,000 tokens at a time, not {count:,}; give another"):
            model.write("a", point, count, Job())
    with pytest.raises(InputError, match="temperature must be above 0"):
        model.write("a", point, 1, Job(), sample=True, temperature=0.0)


def test_a_session_reads_once_what_is_shown_in_many_ways(model: Explored, monkeypatch: Any) -> None:
    session, (point, other, _) = Session(100), model.points
    reads: list[list[str]] = []
    real = model.read

    def counted(texts: Any, point: str, metrics: Any, job: Job) -> Any:
        reads.append(list(metrics))
        return real(texts, point, metrics, job)

    monkeypatch.setattr(model, "read", counted)
    assert [*session.read(model, point, None, Look())] == []  # nothing was read yet
    update = last(session.read(model, point, {A: "abc abc"}, Look(), "About it."))
    assert "About it. Text A: 7 tokens read (" in update.status
    assert update.metrics == ("phi", "surprisal")
    assert not update.busy
    for look in (Look(palette="grey"), Look(range="own"), Look(("entropy", "margin"))):
        assert last(session.read(model, point, None, look)).result
    assert len(reads) == 1
    last(session.read(model, point, None, Look(("settling_depth", "phi"))))
    assert len(reads) == 2
    assert {"settling_depth", "phi", "entropy"} <= set(reads[1])
    last(session.read(model, point, None, Look(("settling_depth", "phi"))))
    assert len(reads) == 2
    update = last(session.read(model, other, None, Look()))
    assert len(reads) == 3
    assert session.scores[0].provenance["insertion_point"] == other
    # A column that is not there gives way to one that is.
    assert last(session.read(model, other, None, Look(("phi_standard_error", "phi")))).metrics == (
        "phi",
        "phi",
    )


@pytest.mark.parametrize(
    ("texts", "look", "said"),
    [
        ({A: ""}, Look(), "Text A is empty; paste a text"),
        ({A: "a", B: "b" * 101}, Look(), "Text B has 101 characters and this page reads 100 at most"),
        ({A: "a\ud800"}, Look(), "holds half a character"),
        ({A: "a"}, Look(range="fixed", low=3, high=3), "cannot go from 3 to 3"),
    ],
)
def test_what_cannot_be_read_is_a_sentence(model: Explored, texts: Any, look: Look, said: str) -> None:
    session, point = Session(100), next(iter(model.points))
    update = last(session.read(model, point, texts, look))
    assert said in update.status
    assert 'role="alert"' in update.status
    assert update.result is None
    assert last(session.read(model, point, {A: "abc"}, Look())).result  # and it goes on


def test_whatever_a_model_raises_is_a_sentence(model: Explored, monkeypatch: Any, caplog: Any) -> None:
    def fail(*_: Any) -> Any:
        raise RuntimeError("out of <b>memory</b>")

    monkeypatch.setattr(model, "read", fail)
    update = last(Session(100).read(model, next(iter(model.points)), {A: "abc"}, Look()))
    assert "did not work (RuntimeError); the terminal says more" in update.status
    assert "out of <b>memory</b>" in caplog.text


def test_cancelled_superseded_and_left(model: Explored, monkeypatch: Any) -> None:
    session, point, long = Session(10**6), next(iter(model.points)), {A: "a" * 60_000}
    going = session.read(model, point, long, Look())
    assert next(going) == Update(busy=True)  # at once
    following = next(going)
    assert following.busy
    assert "<progress" in (following.status or "")
    assert session.stop()
    assert "Cancelled." in last(going).status
    assert not session.stop()

    def after(going: Any, other: Any) -> Any:
        """The last word of another answer, whose first comes when the one that goes on has ended."""
        said: list[Any] = []
        thread, before = threading.Thread(target=lambda: said.extend(other)), session._job
        thread.start()
        while session._job is before and thread.is_alive():
            thread.join(0.01)
        thread.join(0.3)
        assert thread.is_alive()
        assert said == []
        assert [*going] == []
        thread.join()
        return said[-1]

    # Another reading takes the place of one that goes on, which then says nothing more.
    going = session.read(model, point, long, Look())
    next(going)
    assert after(going, session.read(model, point, {A: "abc"}, Look())).result
    # Shown in another way meanwhile, it is this text that is read, not the one before.
    going, other = session.read(model, point, {A: "abd"}, Look()), Look(("entropy", "phi"))
    next(going)
    assert "3 tokens read" in (after(going, session.read(model, point, None, other)).status or "")
    assert session.scores[0].text == "abd"
    # Cancelled when the model had it all and the page nothing: what can be kept is what is shown.
    going = session.read(model, point, {A: "abcabc"}, Look())
    next(going)
    with monkeypatch.context() as patch:
        patch.setattr(view, "result", lambda *_: str(session.stop()))
        update = last(going)
    assert "Cancelled." in (update.status or "")
    assert update.result is None
    assert session.scores[0].text == "abd"
    # What the page asked for last comes first, and then what it asked for before.
    going = session.read(model, point, {A: "abcd"}, Look(), when=2.0)
    next(going)
    for late in (
        session.read(model, point, long, Look(), when=1.0),
        session.write(model, point, "abc", Look(), when=1.0, count=3),
        session.branch(model, point, 0, 1, None, Look(), when=1.0, count=3),
    ):
        assert [*late] == []
    assert last(going).result
    assert session.scores[0].text == "abcd"
    # What waits and is itself overtaken says nothing.
    going = session.read(model, point, long, Look(), when=2.0)
    next(going)
    overtaken: list[Any] = []
    late = session.read(model, point, {A: "b"}, Look(), when=2.1)
    waiting, before = threading.Thread(target=lambda: overtaken.extend(late)), session._job
    waiting.start()
    while session._job is before and waiting.is_alive():
        waiting.join(0.01)
    assert waiting.is_alive()
    assert after(going, session.read(model, point, {A: "abc"}, Look(), when=2.2)).result
    waiting.join()
    assert overtaken == []
    # The tab was closed.
    going = session.read(model, point, long, Look(), when=3.0)
    next(going)
    job = session._job
    going.close()
    assert job is not None
    with pytest.raises(Stopped):
        job.check()


def test_characters_that_a_tokenizer_lacks_are_named(model: Explored) -> None:
    update = last(Session(100).read(model, next(iter(model.points)), {A: "naïve → é é"}, Look()))
    assert "does not know and reads as one and the same: ï → é" in update.status
    assert update.result


def test_sessions_are_apart(model: Explored) -> None:
    sessions, point = Sessions(100, limit=2), next(iter(model.points))
    one, two = sessions.of("one"), sessions.of("two")
    assert sessions.of("one") is one
    last(one.read(model, point, {A: "abc"}, Look()))
    assert two.scores == []
    assert one.key != two.key
    assert sessions.keyed(two.key) is two
    assert sessions.keyed("x") is None
    sessions.of("three")  # the one left longest goes
    assert sessions.keyed(two.key) is None
    assert sessions.keyed(one.key) is one
    sessions.end("one")
    assert sessions.keyed(one.key) is None
    sessions.end_all()
    assert not sessions._by_hash


def test_exports(model: Explored) -> None:
    session, point = Session(100), next(iter(model.points))
    for file in EXPORTS:
        with pytest.raises(InputError, match="read a text first"):
            session.export(file)
    last(session.read(model, point, {A: 'a,"b\n', B: "<b>"}, Look(("phi", "phi"))))
    page = session.export("page.html").decode()
    assert "&lt;b&gt;" not in page  # a piece is a character
    assert page.count('title="&lt;: phi') == 1
    import io

    import pandas as pd

    table = pd.read_csv(io.BytesIO(session.export("scores.csv")), keep_default_na=True)
    assert table["token"].tolist() == list('a,"b\n<b>')
    assert table["text"].tolist() == [A] * 5 + [B] * 3
    np.testing.assert_allclose(table["phi"][:5], session.scores[0].phi, rtol=1e-5)
    assert session.export("figure-0.png")[:4] == session.export("figure-1.png")[:4] == b"\x89PNG"
    with pytest.raises(InputError):
        session.export("../secret")


def test_a_marked_span(model: Explored) -> None:
    session, point = Session(100), next(iter(model.points))
    assert "read one first" in session.marked(0, 0, 1)
    last(session.read(model, point, {A: "abc <i> def"}, Look()))
    markup = session.marked(0, 6, 4)  # in either order
    assert "tokens 4 to 6 (3)" in markup
    assert "<q>&lt;i&gt;</q>" in markup
    for values in session.scores[0].columns.values():
        assert f"<b>{values[4:7].mean():.3f}</b>" in markup
        assert f"(whole text {np.nanmean(values):.3f})" in markup
    assert "token 0:" in session.marked(0, 0, 0)
    assert "<b>none</b>" in session.marked(0, 0, 0)  # of surprisal, which the first token has not
    for first, end in ((-1, 2), (0, 11)):
        assert "Text A has tokens 0 to 10" in session.marked(0, first, end)
    assert "no such text" in session.marked(1, 0, 1)
    # What the page asked for last is what stays, whichever comes first.
    assert [session.marks(when) for when in (2.0, 1.0, 2.5, 2.0)] == [True, False, True, False]


def test_what_is_not_to_be_had_is_named_with_its_reason(run: Path) -> None:
    opened = Explored.open(ModelSource(str(run)), [str(run / "both"), str(run / "layer-2")])
    found = [opened.lacking(point) for point in opened.points]
    assert [list(reasons) for reasons in found] == [["mtd", "surprisal_with_layer"]] * 2 + [["mtd"]]
    markup = view.lacking(found[0] | {"phi": "<script>"})
    assert "<summary>Not available here: mtd, surprisal with layer, phi</summary>" in markup
    assert "There is no surprisal_with_layer with mode=&quot;observe&quot;, where the layer" in markup
    assert "<script>" not in markup
    assert view.lacking({}) == ""


def test_the_markup_of_hostile_text_has_no_element_of_it(model: Explored) -> None:
    class Elements(HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.found: set[str] = set()
            self.attributes: set[str] = set()

        def handle_starttag(self, tag: str, attrs: Any) -> None:
            self.found.add(tag)
            self.attributes |= {name for name, _ in attrs}

    point = next(iter(model.points))
    hostile = "</span><script>x</script>\"'><img onerror=x>\x00\u202e\u200b &amp; {{x}} ${y}\n\t"
    session, plain = Session(1_000), Session(1_000)
    parsers = []
    for one, text in ((session, hostile), (plain, "a" * len(hostile))):
        update = last(one.read(model, point, {A: text, B: text}, Look()))
        parser = Elements()
        parser.feed((update.result or "") + one.marked(0, 0, len(text) - 1) + update.status)
        parsers.append(parser)
    assert parsers[0].found == parsers[1].found
    assert parsers[0].attributes == parsers[1].attributes
    assert "script" not in parsers[0].found


def test_scales_and_what_is_highest(model: Explored) -> None:
    point = next(iter(model.points))
    one, two = model.read({A: "abc abd " * 9, B: "zzzz"}, point, PHI, Job())
    shared, own = Look(), Look(range="own")
    assert shared.scale("phi", one, [one, two]) == shared.scale("phi", two, [one, two])
    assert own.scale("phi", one, [one, two]) != own.scale("phi", two, [one, two])
    fixed = Look(range="fixed", low=-1, high=2).scale("phi", one, [one])
    assert (fixed.low, fixed.high) == (-1, 2)
    markup = view.result([one, two], shared, "export/x")
    rows = [int(n) for n in re.findall(r'data-go="(\d+)"', markup)]
    assert rows[:10] == (np.argsort(-one.phi[1:], kind="stable")[:10] + 1).tolist()
    assert len(rows) == 13  # the second text has three tokens beside its first
    assert markup.count("<svg") == 4
    assert "figure-1.png" in markup
    gone = replace(one, columns={**one.columns, "surprisal": np.full(len(one), np.nan, np.float32)})
    assert "NaN" not in view.result([gone], Look(("surprisal", "phi")), "export/x")


def test_steps_are_there_where_a_text_has_them(model: Explored) -> None:
    point = next(iter(model.points))
    texts = {A: "ab cd. Ef gh.\n  i = 2 < j\n\nk = 1 + 2 = 3", B: "plain"}
    one, two = model.read(texts, point, PHI, Job())
    assert "Means by step" not in view.result([two], Look(), None)
    markup = view.result([one, two], Look(), None)
    assert re.findall(r"<summary>(.*?)</summary>", markup) == ["3 lines", "4 sentences", "2 equations"]
    assert markup.count("<details open>") == 1
    found = re.findall(
        r'data-go="(\d+)" data-to="(\d+)" aria-label="Mark line \d+, tokens .*?>(\d)</button></td>'
        r'<td class="around">(.*?)</td><td>(.*?)</td><td>(.*?)</td><td>(.*?)</td>',
        markup,
    )
    assert [row[3] for row in found] == ["ab cd. Ef gh.", "i = 2 &lt; j", "k = 1 + 2 = 3"]
    for number, (row, (_, start, end)) in enumerate(zip(found, steps_of(texts[A])["lines"], strict=True), 1):
        first, last = map(int, row[:2])
        assert "".join(one.pieces()[first : last + 1]) == texts[A][start:end]  # tokens are characters
        assert row[2] == str(number)
        assert int(row[4]) == last - first + 1
        for metric, mean in zip(PHI, row[5:], strict=True):
            values = one.without_sinks()[metric][first : last + 1]
            assert mean == f"{np.nanmean(values, dtype=np.float64):.3f}"
            assert f"<b>{mean}</b>" in view.marked(one, 0, first, last)  # the same when it is marked
    (long,) = model.read({A: "abcdefghijklm " * 4 + "\n" + "a\n" * 60}, point, PHI, Job())
    markup = view.result([long], Look(), None)
    assert "and 11 more; philens score --steps lines has all" in markup
    assert markup.count("data-to=") == MAX_PARTS
    assert "abcdefghijklm abcdef…hijklm abcdefghijklm" in markup


@pytest.fixture
def error_of(capsys: Any) -> Callable[..., str]:
    def run(*words: Any) -> str:
        code = cli.main(["explore", *map(str, words)])
        captured = capsys.readouterr()
        assert code == 2
        assert re.fullmatch(r"philens: error: [^\n]+\.\n", captured.err), captured.err
        return captured.err

    return run


def test_errors_of_the_command(error_of: Any, tmp_path: Path, monkeypatch: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        said = error_of("--port", port)
        assert (
            f"Cannot listen on 127.0.0.1 port {port} (Address already in use); choose another --port" in said
        )
    assert "--port must lie between 0 (any that is free) and 65535, not 70000." in error_of("--port", 70_000)
    assert "--max-characters must be at least 1, not 0." in error_of("--max-characters", 0)
    assert "Cannot listen on 203.0.113.1 port 0" in error_of("--host", "203.0.113.1", "--port", 0)
    assert re.search(r"port 0 \([^()]+\); choose", error_of("--host", "no.such.invalid", "--port", 0))
    assert "An adapter belongs to a base model" in error_of("--adapter", "x", "--port", 0)
    assert "No PHi layer was named" in error_of("--model", tmp_path, "--port", 0)
    assert "no option --prot" in error_of("--prot", 1)
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert "philens explore needs gradio: install it with `pip install 'philens[explore]'`." in error_of()


@pytest.mark.parametrize(
    ("host", "warns"), [("127.0.0.1", False), ("127.1", False), ("localhost", False), ("0.0.0.0", True)]
)
def test_others_are_let_in_only_if_asked_for(
    host: str, warns: bool, run: Path, monkeypatch: Any, caplog: Any
) -> None:
    from philens.explore import server

    pytest.importorskip("gradio", reason="Gradio is not installed.")
    served = []
    monkeypatch.setattr(
        server, "serve", lambda app, listening, leave: served.append(listening.getsockname()[0])
    )
    said: list[str] = []
    with caplog.at_level(logging.WARNING):
        server.explore(ModelSource(str(run)), [], host, 0, 100, said.append)
    assert served == ["0.0.0.0" if warns else "127.0.0.1"]
    assert re.fullmatch(rf"Open http://{host}:\d+ in a browser; Ctrl\+C stops it\.", said[0])
    assert ("Whoever reaches 0.0.0.0 can use this model" in caplog.text) == warns


def test_answers_allow_nothing_from_elsewhere(model: Explored) -> None:
    pytest.importorskip("gradio", reason="Gradio is not installed.")
    from fastapi.testclient import TestClient

    from philens.explore.app import build
    from philens.explore.server import application

    sessions = Sessions(100)
    page = build({model.name: model}, sessions)
    assert page.analytics_enabled is False
    with TestClient(application(page, sessions)) as client:
        answer = client.get("/")
        assert "default-src 'self'" in answer.headers["content-security-policy"]
        assert "fonts.googleapis" not in answer.text
        assert client.get("/export/x/scores.csv").status_code == 404
        session = sessions.of("one")
        assert client.get(f"/export/{session.key}/scores.csv").status_code == 404
        last(session.read(model, next(iter(model.points)), {A: "abc"}, Look()))
        answer = client.get(f"/export/{session.key}/scores.csv")
        assert answer.headers["content-disposition"] == 'attachment; filename="philens-scores.csv"'
        assert answer.text.startswith("token,token_id,start,end,phi,surprisal")
        assert client.get(f"/export/{session.key}/recipe.yaml").status_code == 404
    assert issubclass(InputError, PhilensError)


def shown_link(**changes: Any) -> Shown:
    look = Look(("entropy", "phi"), "fixed", 0.5, 4.0, "grey")
    return replace(
        Shown("a model", "adapter (after x)", {A: "naïve <b>\n", B: "日本\ud800"}, look), **changes
    )


def test_links_bring_back_what_was_shown() -> None:
    shown = shown_link()
    fragment = shown.to_fragment()
    assert re.fullmatch(r"v1\.[\w-]+", fragment)  # nothing in it that an address would change
    assert Shown.from_fragment(fragment) == shown
    long = shown_link(texts={A: "some words and others " * 2_000})
    assert len(long.to_fragment()) < 1_000
    assert Shown.from_fragment(long.to_fragment()) == long


def packed(value: Any) -> str:
    return START + base64.urlsafe_b64encode(zlib.compress(json.dumps(value).encode())).decode()


def test_links_of_others_are_not_trusted() -> None:
    good = asdict(shown_link(texts={A: "abc"}))
    assert Shown.from_fragment(packed(good)).texts == {A: "abc"}
    wrong: list[Any] = [
        [],
        {},
        "x",
        good | {"texts": ["abc"]},
        good | {"texts": {A: 3}},
        good | {"model": None},
        good | {"look": good["look"] | {"palette": '"><script>'}},
        good | {"look": good["look"] | {"range": "other"}},
        good | {"look": good["look"] | {"low": "x"}},
        good | {"look": good["look"] | {"more": 1}},
        good | {"look": good["look"] | {"metrics": ["phi"]}},
        good | {"texts": {A: "a" * 5_000_000}},  # which would take much memory
    ]
    for fragment in ("", "v1.", "v2.abc", "v1.é", "v1.%%%", "v1." + "A" * 99, *map(packed, wrong)):
        with pytest.raises(InputError, match="This link is damaged"):
            Shown.from_fragment(fragment)


def test_a_branch_is_read_beside_its_text(model: Explored, monkeypatch: Any) -> None:
    session, point, reads = Session(100), next(iter(model.points)), []
    real = model.read
    monkeypatch.setattr(model, "read", lambda texts, *rest: reads.append(dict(texts)) or real(texts, *rest))
    last(session.read(model, point, {A: "abcab abd"}, Look()))
    others = session.scores[0].alternatives
    assert others is not None
    chosen = others[4][2]
    updates = [*session.branch(model, point, 0, 4, 2, Look())]
    changed = "abca" + chosen.text + " abd"
    assert [one.text for one in session.scores] == ["abcab abd", changed]
    assert any(one.texts == ("abcab abd", changed) for one in updates)
    assert reads == [{A: "abcab abd"}, {B: changed}]  # what was read is not read again
    assert view.parting(session.scores) == [4, 4]
    assert f"“{visible(chosen.text)}” in place of “b” at token 4." in str(updates[-1].status)
    last(session.read(model, point, {A: "abcab abd"}, Look()))
    assert len(reads) == 2
    # Writing on, with what is written as it comes.
    updates = [*session.branch(model, point, 0, 2, None, Look(), count=5)]
    assert session.scores[1].text.startswith("abc")
    assert len(session.scores[1].text) == 8
    assert updates[1].texts == ("abcab abd", "abc")
    assert [one.texts[1] for one in updates if one.texts[1]][-1] == session.scores[1].text
    written = session.scores[1].text
    last(session.branch(model, point, 1, 1, 0, Look()))  # of the second, which becomes the first
    assert session.scores[0].text == written


def test_what_cannot_be_branched_is_a_sentence(model: Explored) -> None:
    session, point = Session(100), next(iter(model.points))

    def said(*place: Any) -> str:
        return str(last(session.branch(model, point, *place, Look())).status)

    assert "There is no such token" in said(0, 0, 0)
    last(session.read(model, point, {A: "abc"}, Look()))
    for place in ((1, 0, 0), (0, 3, 0), (0, -1, 0), (-1, 0, 0)):
        assert "There is no such token" in said(*place)
    assert "There is no such alternative" in said(0, 0, 0)  # nothing foretells the first
    assert "There is no such alternative" in said(0, 1, 10)
    others = session.scores[0].alternatives
    assert others is not None
    for text in ("", "\N{REPLACEMENT CHARACTER}"):
        broken = replace(others, texts=dict.fromkeys(others.texts, text))
        session.scores = [replace(session.scores[0], alternatives=broken)]
        assert "but a part of a character" in said(0, 1, 0)
    assert [one.text for one in session.scores] == ["abc"]


def test_where_texts_part() -> None:
    def parting(*texts: str) -> list[int | None]:
        return view.parting([plain(text) for text in texts])

    assert parting("abc") == [None]
    assert parting("abc", "abd") == [2, 2]
    assert parting("abc", "ab") == [2, None]
    assert parting("abc", "xbc") == [None, None]  # from the first character on they are just two texts


def test_a_record_has_every_view(model: Explored, tmp_path: Path) -> None:
    path, point = tmp_path / "record.html", next(iter(model.points))
    record = Record(path)
    sessions = Sessions(100, record)
    one, two = sessions.of("one"), sessions.of("two")
    last(one.read(model, point, {A: "abc <b>"}, Look()))
    last(two.read(model, point, {A: "abd"}, Look()))
    for look in (Look(("phi", "entropy")), Look(("phi", "entropy"))):  # the second time nothing is new
        last(two.read(model, point, None, look))
    markup = path.read_text()
    assert len(record.views) == 3
    assert markup.count("<template>") == markup.count("<option") == 3
    assert "&lt;b&gt;" in markup
    assert "export/" not in markup  # there is no server
    assert "https://" not in markup
    assert [title.split(" ", 1)[1] for title, _ in record.views][2].startswith("“abd…” phi and entropy, ")
    with pytest.raises(ConfigError, match="is there already; name another --record file"):
        Record(path)
    with pytest.raises(ConfigError, match="There is no folder"):
        Record(tmp_path / "none" / "record.html")
    # What can't be written is told, and the page goes on.
    path.unlink()
    path.mkdir()
    update = last(one.read(model, point, {A: "abcd"}, Look()))
    assert update.result
    assert "It is not in the record: " in str(update.status)
