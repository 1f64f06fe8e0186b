"""The benchmarks at smoke scale: every row runs or says why not; what is reported is what was measured."""

import gc
import json
import math
from pathlib import Path

import pytest
import torch
from benchmarks import __main__ as command
from benchmarks import growth, reference, report
from benchmarks.harness import SHORTEST_SAMPLE, Bench, Comparison, Series, Target, Unavailable, total
from benchmarks.layer import bare_products, literal_contrastive_loss
from benchmarks.models import frozen_llama, packed_batch
from benchmarks.peak import peak_bytes
from benchmarks.training import Parts
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from philens.lens.config import PHiConfig
from philens.lens.divergence import contrastive_loss
from philens.lens.layer import PHiLayer
from philens.support.errors import InputError

CPU = torch.device("cpu")
REFERENCE = """
import torch
from torch import nn

OPTIONS = {"prior": "mlp", "contrastive_weight": 0.0}

class PHiLayer(nn.Module):
    def __init__(self, hidden_size):
        super().__init__()
        self.encoder = nn.Linear(hidden_size, 2 * hidden_size)
        self.decoder = nn.Linear(hidden_size, hidden_size)

    def forward(self, hidden_states):
        mean, logvar = self.encoder(hidden_states).chunk(2, -1)
        return self.decoder(mean), (mean.square() + logvar.exp() - logvar).sum(-1)
"""


@pytest.fixture(autouse=True)
def _imports_stay_frozen(monkeypatch):
    """By conftest.py; the harness would thaw them, and each collection look through them again."""
    monkeypatch.setattr(gc, "freeze", lambda: None)
    monkeypatch.setattr(gc, "unfreeze", lambda: None)


def run(tmp_path: Path, *arguments: str) -> tuple[int, dict]:
    options = ["--scale", "smoke", "--device", "cpu", "--repetitions", "1", "--output", str(tmp_path / "out")]
    code = command.main([*options, *arguments])
    return code, json.loads((tmp_path / "out" / "results.json").read_text())


def test_every_row_runs_or_says_why_not(tmp_path, capsys):
    path = tmp_path / "mine.py"
    path.write_text(REFERENCE)
    code, results = run(tmp_path, "--reference", str(path))
    assert code == 0
    rows = {row["row"]: row for row in results["rows"]}
    assert list(rows) == list(command.ROWS)
    assert {name for name, row in rows.items() if row["status"] != "measured"} == {"memory"}
    assert rows["memory"]["status"] == "unavailable"
    assert "needs a GPU" in rows["memory"]["reason"]
    for row in rows.values():
        for one in row["comparisons"]:
            for side in (one["philens"], one["compared_with"]):
                assert 0 < side["smallest"] <= side["median"] <= side["largest"]
            assert one["ratio"] == pytest.approx(one["philens"]["median"] / one["compared_with"]["median"])
            assert one["ratio_smallest"] <= one["ratio"] * 1.001
            assert (one["met"] is None) == (one["target"] is None)
    assert not results["meaningful"]
    machine = results["machine"]
    assert machine["torch"] == torch.__version__
    assert machine["threads"] == torch.get_num_threads()
    assert machine["cpu"]
    frozen = rows["frozen"]["comparisons"][0]
    parts = frozen["details"]["parts_seconds"]
    assert set(parts) == {"below", "layer", "above", "head"}
    assert sum(parts.values()) == pytest.approx(frozen["compared_with"]["median"])
    assert rows["reference"]["comparisons"][0]["compared_with"]["name"] == "reference mine"
    # The table says all of it, and that smoke scale means nothing; the figure is there twice.
    shown = capsys.readouterr().out
    assert "SMOKE SCALE" in shown
    for name in rows:
        assert name in shown
    assert machine["cpu"] in shown
    assert (tmp_path / "out" / "benchmarks.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "out" / "benchmarks.svg").read_text()


def test_growth_writes_curves_and_what_was_measured_when_stopped(tmp_path, monkeypatch):
    points = {name: shapes[:1] for name, shapes in growth.curves(Bench(CPU, "smoke")).items()}
    assert set(points) == set(growth.LABELS)
    monkeypatch.setattr(
        growth, "curves", lambda bench: {"watched": points["watched"], "rows": points["rows"]}
    )
    options = ["--scale", "smoke", "--device", "cpu", "--repetitions", "1", "--output", str(tmp_path)]
    known = {}

    def measured(bench, shape):
        known[shape] = growth_measure(bench, shape)
        return known[shape]

    growth_measure = growth.measure
    monkeypatch.setattr(growth, "measure", measured)
    assert growth.main(options) == 0
    found = json.loads((tmp_path / "growth.json").read_text())["curves"]
    for name in ("watched", "rows"):
        (point,) = found[name]
        assert point["at"] == 1
        for work in growth.COLOURS:
            assert point[work]["median"] > 0
            assert point[work]["unit"] == "tokens/s"

    def stopped(bench, shape):
        if not shape.watched:
            raise KeyboardInterrupt
        return known[shape]

    (tmp_path / "growth.png").unlink()
    monkeypatch.setattr(growth, "measure", stopped)
    assert growth.main(options) == 130
    assert list(json.loads((tmp_path / "growth.json").read_text())["curves"]) == ["watched"]
    assert (tmp_path / "growth.png").is_file()


def test_full_scale_curves_change_one_thing_each():
    found = growth.curves(Bench(CPU))
    assert [shape.length for shape in found["length"]][:: len(found["length"]) - 1] == [256, 8192]
    assert len({shape.length * shape.rows for shape in found["length"]}) == 1
    for name, shapes in found.items():
        assert len({getattr(shape, name) for shape in shapes}) == len(shapes)
        for shape in shapes:
            assert 1 <= shape.depth <= shape.blocks
            assert shape.watched <= shape.blocks


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rows", "traning"], "did you mean 'training'"),
        (["--repetitions", "0"], "--repetitions must be at least 1"),
        (["--threads", "0"], "--threads must be at least 1"),
    ],
)
def test_bad_options_get_one_sentence(tmp_path, capsys, arguments, message):
    assert command.main(["--scale", "smoke", "--output", str(tmp_path), *arguments]) == 2
    told = capsys.readouterr().err
    assert message in told
    assert len(told.strip().splitlines()) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there(tmp_path, capsys):
    assert command.main(["--device", "cuda", "--output", str(tmp_path)]) == 2
    assert "no CUDA device" in capsys.readouterr().err


def test_an_output_that_cannot_be_made(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert command.main(["--scale", "smoke", "--output", str(tmp_path / "file" / "out")]) == 2
    assert "choose another --output" in capsys.readouterr().err


def test_a_failing_row_is_told_and_the_others_go_on(tmp_path, monkeypatch, capsys):
    def fails(bench):
        raise RuntimeError("the first line\nand more")

    monkeypatch.setitem(command.ROWS, "packing", fails)
    code, results = run(tmp_path, "--rows", "packing", "documents")
    assert code == 1
    failed, measured = results["rows"]
    assert (failed["status"], failed["reason"]) == ("failed", "RuntimeError: the first line")
    assert "in fails" in failed["trace"]
    assert measured["status"] == "measured"
    assert "the first line" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("", "does not offer PHiLayer(hidden_size)"),
        ("import nothing_of_this_name", "cannot be imported (No module named 'nothing_of_this_name')"),
        ("class PHiLayer:\n    pass", "cannot be called as wanted"),
        (
            REFERENCE.replace("self.decoder(mean)", "mean[:1]"),
            "must return hidden states of shape (2, 32, 48)",
        ),
        (REFERENCE.replace('"mlp"', '"none"'), "are no options of PHiConfig"),
    ],
)
def test_a_reference_that_does_not_fit_gets_one_sentence(tmp_path, code, message):
    path = tmp_path / "theirs.py"
    path.write_text(code)
    with pytest.raises(InputError) as caught:
        reference.reference(Bench(CPU, "smoke", 1, path))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_reference_may_be_a_folder_with_imports_of_its_own(tmp_path):
    folder = tmp_path / "theirs"
    folder.mkdir()
    (folder / "__init__.py").write_text("from .inner import OPTIONS, PHiLayer")
    (folder / "inner.py").write_text(REFERENCE)
    (found,) = reference.reference(Bench(CPU, "smoke", 2, folder))
    assert len(found.theirs.values) == 2
    with pytest.raises(InputError, match="no folder with an"):
        reference.load(tmp_path / "nowhere")
    with pytest.raises(Unavailable, match="--reference"):
        reference.reference(Bench(CPU, "smoke"))


def test_works_alternate_and_turn_round(monkeypatch):
    calls = []
    bench = Bench(CPU, "smoke", 3)
    found = bench.alternate({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")})
    assert "".join(calls) == "ab" + "ab" + "ba" + "ab"
    assert [len(series.values) for series in found.values()] == [3, 3]
    calls.clear()
    # A clock that each work moves on: short works are run often, both as often as the longer one asks for.
    monkeypatch.setattr(
        "benchmarks.harness.time.perf_counter", lambda: (len(calls) + calls.count("b")) / 1024
    )
    found = Bench(CPU, "full", 1).alternate({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")})
    runs = math.ceil(SHORTEST_SAMPLE * 1024 / 2)
    assert calls.count("a") == calls.count("b") == 2 + runs  # after two to warm up
    assert [series.values for series in found.values()] == [[1 / 1024], [2 / 1024]]


def test_comparisons():
    ours, theirs = Series("ours", [2.0, 3.0, 10.0]), Series("theirs", [2.0, 2.0, 5.0])
    one = Comparison(ours, theirs, Target(1.5))
    assert (one.ratio, one.ratios, one.is_met) == (1.5, [1.0, 1.5, 2.0], True)
    assert Comparison(ours, theirs, Target(1.4)).is_met is False
    assert Comparison(ours, theirs, Target(1.4, at_most=False)).is_met is True
    assert Comparison(ours, Series("limit", [4.0])).ratios == [0.5, 0.75, 2.5]
    assert ours.per_second(6, "tokens") == Series("ours", [3.0, 2.0, 0.6], "tokens/s")
    assert total("both", [ours, theirs]).values == [4.0, 5.0, 15.0]
    assert [report.value_text(*value) for value in ((0.0123, "s"), (2e-6, "s"), (1.5e9, "B"), (3, "B"))] == [
        "12.3 ms",
        "2 µs",
        "1.5 GB",
        "3 B",
    ]


def test_parts_of_a_frozen_step_are_what_the_whole_computes():
    bench = Bench(CPU, "smoke")
    with frozen_llama(bench, 2, 384, data__length=64) as (lens, tokenizer, recipe):
        batch = packed_batch(bench, recipe, tokenizer)
        parts = Parts(bench, lens, recipe, batch)
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        with torch.no_grad(), bench.autocast():
            whole = lens(**inputs)
            mine = parts.base.lm_head(parts.states)
        assert torch.equal(parts.hidden, whole.layer_outputs[0].observed)
        real = inputs["attention_mask"] != 0
        assert torch.equal(mine[real], whole.logits[real])
        counted = []
        handles = [
            block.register_forward_hook(lambda *_, number=number: counted.append(number))
            for number, block in enumerate(lens.base.model.layers)
        ]
        parts.below()
        assert counted == [0]
        parts.above()
        assert counted == [0, 1]
        for handle in handles:
            handle.remove()


def test_bare_products_have_the_layers_arithmetic():
    rows, length, width = 2, 64, 32
    layer = PHiLayer(width, PHiConfig(prior_heads=2, contrastive_weight=0.0))
    hidden = torch.randn(rows, length, width, requires_grad=True)
    with FlopCounterMode(display=False) as whole, sdpa_kernel(SDPBackend.MATH):
        output = layer.train()(hidden)
        (output.phi.mean() + output.hidden_states.sum()).backward()
    work = bare_products(layer, rows, length, torch.float32)
    with FlopCounterMode(display=False) as bare:
        work()
    # The layer computes six products of all pairs; here, in eight pieces, 1/2 + 1/16 of the pairs.
    attention = 6 * 2 * rows * length**2 * width
    assert bare.get_total_flops() == whole.get_total_flops() - attention + attention * 9 // 16


def test_literal_contrastive_loss_and_its_memory():
    z, mean, logvar = (torch.randn(6, 8, 16, requires_grad=True) for _ in range(3))
    ours, literal = contrastive_loss(z, mean, logvar), literal_contrastive_loss(z, mean, logvar)
    torch.testing.assert_close(ours, literal, atol=1e-3, rtol=1e-3)
    held = peak_bytes(
        CPU, lambda: literal_contrastive_loss(z, mean, logvar).mean().backward(), (z, mean, logvar)
    )
    assert held > 4 * 6 * 6 * 8 * 16
    assert peak_bytes(CPU, lambda: torch.empty(1000), ()) == 4000
    assert peak_bytes(CPU, lambda: z + 1, (z,)) == z.nbytes
