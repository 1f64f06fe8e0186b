"""Findings from synthetic tables with known answers, and how they are written."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from philens.findings import combine_seeds, write_finding
from philens.findings.complexity import correlation_rows, curve_rows, measure_complexity
from philens.findings.controls import PERMUTED, control_rows, different_letters, measure_pairs
from philens.findings.figures import figure_tasks
from philens.findings.tasks import measure_tasks, task_rows
from philens.scoring.documents import TokenTable
from philens.support.errors import InputError, OutputError
from philens.support.files import write_atomically
from philens.tasks.automata import TASKS, Documents, TaskConfig, generate

PHI = {name: value for name, value in zip(TASKS, (4.9, 4.0, 4.4, 5.6, 2.6, 3.1), strict=True)}
SURPRISAL = {name: value for name, value in zip(TASKS, (0.2, 0.6, 0.8, 1.1, 2.9, 1.6), strict=True)}


def make_table(
    phi: dict[str, float] | None = None,
    documents: int = 20,
    seed: int = 0,
    slope: tuple[float, float] = (0.0, 0.0),
) -> TokenTable:
    """`documents` of each task in `phi`; phi grows by `slope` per nat of description length."""
    phi = PHI if phi is None else phi
    random = np.random.default_rng(seed)
    task = np.repeat([TASKS.index(name) for name in phi], documents)
    lengths = random.integers(20, 80, size=len(task))
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    document = np.repeat(np.arange(len(task)), lengths)
    description = np.where(np.isin(task, (4, 5)), np.nan, random.uniform(25, 219, size=len(task)))
    late = (np.arange(offsets[-1]) - offsets[document]) * 2 >= lengths[document]
    surprisal = (
        random.gamma(4, 0.25, size=offsets[-1]) * np.array([SURPRISAL[n] for n in TASKS])[task[document]]
    )
    means = np.array([phi.get(name, 0.0) for name in TASKS])
    values = means[task[document]] + random.normal(size=offsets[-1]) * 0.3
    values += np.nan_to_num(description[document] - 120) * np.where(late, slope[1], slope[0])
    surprisal[offsets[:-1]] = np.nan
    count = np.zeros(len(task), np.int64)
    docs = Documents(
        tokens=np.full(offsets[-1], 97, np.uint8),
        offsets=offsets,
        task=task,
        states=count,
        edges=count,
        letters=count,
        description_length=description,
        perturbed=np.zeros(offsets[-1], np.bool_),
    )
    return TokenTable(docs, values.astype(np.float32), surprisal.astype(np.float32), document)


def test_tasks_are_those_of_the_tables_numbers() -> None:
    table = make_table()
    results = measure_tasks(table)
    assert list(results["tasks"]) == list(TASKS)
    assert json.loads(json.dumps(results, allow_nan=False)) == results
    for number, found in enumerate(results["tasks"].values()):
        rows = table.docs.task[table.document] == number
        assert found["tokens"] == rows.sum()
        assert found["documents"] == found["tokens_without_surprisal"] == 20
        assert found["phi"]["mean"] == pytest.approx(table.phi[rows].astype(float).mean(), rel=1e-9)
        surprisal = np.nanmean(table.surprisal[rows].astype(float))
        assert found["surprisal"]["mean"] == pytest.approx(surprisal, rel=1e-9)
        for key in ("phi", "surprisal"):
            low, high = found[key]["ci95"]
            assert low < found[key]["mean"] < high
    assert results["phi_order"][:2] == ["in_context_language", "memorized_sequences"]
    assert results["surprisal_order"][0] == "random"
    assert results["orders_differ"]
    assert results["holds"]
    ratio = results["ratios"]["random"]
    assert ratio["separated"]
    assert ratio["ci95"][0] < ratio["ratio"] < ratio["ci95"][1]
    tasks = results["tasks"]
    means = [tasks[name]["phi"]["mean"] for name in ("in_context_language", "random")]
    assert ratio["ratio"] == pytest.approx(means[0] / means[1])
    assert set(results["ratios"]) == {"memorized_sequences", "memorized_programs", "random"}
    assert results["known_false_positives"]["copy"]["ratio"] > 1


def test_the_finding_does_not_hold_where_a_boring_task_is_as_high() -> None:
    results = measure_tasks(make_table(PHI | {"memorized_sequences": 5.6}))
    assert not results["ratios"]["memorized_sequences"]["separated"]
    assert not results["holds"]
    results = measure_tasks(make_table(PHI | {"memorized_sequences": 7.0}))
    assert results["ratios"]["memorized_sequences"]["separated"]
    assert results["ratios"]["memorized_sequences"]["ratio"] < 1
    assert not results["holds"]


def test_the_finding_does_not_hold_where_surprisal_says_the_same() -> None:
    table = make_table()
    same = TokenTable(table.docs, table.phi, table.phi, table.document)
    results = measure_tasks(same)
    assert not results["orders_differ"]
    assert not results["holds"]


def test_tasks_that_are_not_there_are_left_out() -> None:
    results = measure_tasks(make_table({"random": 2.0, "memorized_sequences": 3.0}))
    assert set(results["tasks"]) == {"random", "memorized_sequences"}
    assert results["ratios"] == {}
    assert results["known_false_positives"] == {}
    assert not results["holds"]
    assert len(task_rows(results)) == 2


def test_a_table_without_phi_is_an_input_error() -> None:
    table = make_table()
    disabled = TokenTable(table.docs, np.full_like(table.phi, np.nan), table.surprisal, table.document)
    with pytest.raises(InputError, match="no token with a phi"):
        measure_tasks(disabled)
    with pytest.raises(InputError, match="at least two"):
        measure_complexity(disabled)
    with pytest.raises(InputError, match="at least two"):
        measure_complexity(make_table({"random": 2.0}))


def test_equal_tasks_have_ratios_around_one_as_wide_as_independent_samples_make_them() -> None:
    """Were both tasks resampled in step, the interval would depend on the order of the documents."""
    table = make_table({"in_context_language": 5.0, "random": 5.0}, documents=40)
    random = np.random.default_rng(0)
    effect = random.normal(size=40)
    effects = np.concatenate([effect, effect])[table.document]  # the same documents twice
    twice = TokenTable(table.docs, (table.phi + effects).astype(np.float32), table.surprisal, table.document)
    low, high = measure_tasks(twice)["ratios"]["random"]["ci95"]
    # Two independent means of 40 documents with sd 1 around 5: 1.96 * sqrt(2 / 40) / 5 = 0.088 to each side.
    assert 0.13 < high - low < 0.24


def test_complexity_finds_a_slope_where_it_is() -> None:
    results = measure_complexity(make_table(documents=60, slope=(0.0, 0.004)))
    assert json.loads(json.dumps(results, allow_nan=False)) == results
    assert results["documents"] == results["tokens_without_surprisal"] == 60
    for level in ("token_wise", "document_means"):
        for name in ("spearman", "partial_given_surprisal", "partial_given_surprisal_and_square"):
            first, second = (results[level][part][name] for part in ("first_half", "second_half"))
            assert first["ci95"][0] < 0 < first["ci95"][1]
            assert second["ci95"][0] > 0.3
            assert second["ci95"][0] < second["value"] < second["ci95"][1]
    parts = results["token_wise"]
    assert parts["first_half"]["tokens"] + parts["second_half"]["tokens"] == results["tokens"]
    assert parts["whole"]["tokens"] == results["tokens"]
    assert results["holds"]
    assert not measure_complexity(make_table(documents=60, slope=(-0.004, -0.004)))["holds"]


def test_complexity_agrees_with_pingouin() -> None:
    pingouin = pytest.importorskip("pingouin")
    table = make_table(documents=30, slope=(0.001, 0.003))
    rows = (table.docs.task[table.document] == TASKS.index("in_context_language")) & ~np.isnan(
        table.surprisal
    )
    frame = pd.DataFrame({"phi": table.phi, "s": table.surprisal, "document": table.document})[rows]
    frame = frame.astype(float)
    frame["length"] = table.docs.description_length[frame["document"].astype(int)]
    results = measure_complexity(table)
    for level, data in (("token_wise", frame), ("document_means", frame.groupby("document").mean())):
        data = data.assign(square=data["s"] ** 2)
        found = results[level]["whole"]
        for name, covariates in (
            ("partial_given_surprisal", ["s"]),
            ("partial_given_surprisal_and_square", ["s", "square"]),
        ):
            theirs = pingouin.partial_corr(data, "phi", "length", covariates)["r"].iloc[0]
            assert found[name]["value"] == pytest.approx(theirs, abs=1e-8)
        for name, column in (("spearman", "phi"), ("spearman_of_surprisal", "s")):
            theirs = data[column].corr(data["length"], method="spearman")
            assert found[name]["value"] == pytest.approx(theirs, abs=1e-8)


def test_curves_hold_every_token_once() -> None:
    results = measure_complexity(make_table(documents=40), description_length_bins=4, surprisal_bins=5)
    assert len(results["curves"]) == 4
    assert sum(curve["documents"] for curve in results["curves"]) == 40
    assert (
        sum(point["tokens"] for curve in results["curves"] for point in curve["points"]) == results["tokens"]
    )
    for curve in results["curves"]:
        means = [point["surprisal"]["mean"] for point in curve["points"]]
        assert means == sorted(means)
        assert sum(point["tokens"] for point in curve["points"]) == curve["tokens"]
    assert len(curve_rows(results)) == sum(len(curve["points"]) for curve in results["curves"])
    assert len(correlation_rows(results)) == 2 * 3 * 4


def test_a_control_with_the_same_relation_leaves_nothing() -> None:
    """Phi is the untrained phi and noise: what it says of description length the untrained one says, too."""
    table = make_table({"in_context_language": 5.0}, documents=80, slope=(0.004, 0.004))
    random = np.random.default_rng(1)
    noisy = replace(table, phi=table.phi + random.normal(size=table.phi.shape).astype(np.float32) * 0.2)
    results = measure_complexity(noisy, controls={"untrained": table.phi})
    assert results["holds"]
    found = results["controls"]
    assert not found["holds"]
    assert found["strongest"] == "untrained"
    assert found["left"]["value"] < 0
    low, high = found["given_all"]["ci95"]
    assert low < 0 < high
    assert found["controls"]["untrained"]["phi_given_it"]["value"] == pytest.approx(0, abs=0.05)
    assert {row["of"] for row in control_rows(results)} == {"phi", "untrained", PERMUTED}


@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_letters_that_noise_brought_are_not_the_document_s(noise: float) -> None:
    config = TaskConfig(noise_probability=noise)
    docs = generate(config, seed=3, task="in_context_language", indices=np.arange(20))
    counted = different_letters(docs)
    assert counted.shape == docs.tokens.shape
    starts = docs.offsets[:-1]
    # A document may leave a letter of its automaton out; a space counts as one.
    assert (counted[starts] <= docs.letters + 1).all()
    everything = [len(set(docs.text(i))) for i in range(len(docs))]
    if noise:
        assert (counted[starts] < everything).mean() > 0.8
    else:
        assert counted[starts].tolist() == everything


def test_controls_without_the_relation_leave_it_whole() -> None:
    table = make_table({"in_context_language": 5.0}, documents=400, slope=(0.004, 0.004))
    noise = np.random.default_rng(1).normal(size=table.phi.shape).astype(np.float32)
    results = measure_complexity(table, controls={"untrained": noise})
    found, whole = results["controls"], results["token_wise"]["whole"]["partial_given_surprisal"]
    assert found["phi"]["given_fixed"] == whole
    for control in found["controls"].values():
        assert control["given_fixed"]["value"] == pytest.approx(0, abs=0.05)
    assert found["holds"]
    assert found["left"]["value"] == pytest.approx(whole["value"], abs=0.05)
    assert found["given_all"]["value"] == pytest.approx(whole["value"], abs=0.05)
    assert results["pairs"]["shares"]["phi"]["ci95"][0] > 0.8
    low, high = results["pairs"]["shares"]["untrained"]["ci95"]
    assert low < 0.5 < high


def test_a_bend_in_surprisal_is_seen_by_the_permutation() -> None:
    """Phi goes with the cube of surprisal, and surprisal with description length: a line in surprisal leaves
    some of that, and so it does of what is permuted among tokens of like surprisal."""
    table = make_table({"in_context_language": 5.0}, documents=80)
    surprisal = table.surprisal * (table.docs.description_length[table.document] / 120).astype(np.float32)
    bent = replace(table, surprisal=surprisal, phi=np.nan_to_num(surprisal) ** 3)
    found = measure_complexity(bent)["controls"]
    permuted = found["controls"][PERMUTED]["given_fixed"]
    assert abs(permuted["value"]) > 0.05
    assert found["left"]["value"] == pytest.approx(0, abs=0.03)
    assert not found["holds"]


def test_letters_explain_what_only_goes_with_them() -> None:
    """Phi grows with the number of letters, and so does description length."""
    table = make_table({"in_context_language": 5.0}, documents=200)
    random = np.random.default_rng(2)
    letters = random.integers(2, 18, size=200)
    tokens = 97 + np.arange(len(table.phi)) % letters[table.document]
    lengths = letters * 10 + random.normal(size=200) * 20
    docs = replace(table.docs, tokens=tokens.astype(np.uint8), description_length=lengths)
    phi = table.phi + letters[table.document].astype(np.float32) * 0.1
    results = measure_complexity(replace(table, docs=docs, phi=phi))
    found = results["controls"]
    assert results["holds"]
    assert found["phi"]["given_fixed"]["ci95"][0] > 0.3
    assert found["phi"]["given_letters"]["value"] == pytest.approx(0, abs=0.1)
    assert not found["holds"]


def test_pairs_are_of_like_surprisal() -> None:
    random = np.random.default_rng(0)
    surprisal, length = random.normal(size=400), random.normal(size=400)
    found = measure_pairs({"both": surprisal + length, "surprisal_alone": surprisal}, surprisal, length)
    assert found["pairs"] == 200
    assert found["shares"]["both"]["ci95"][0] > 0.9
    assert found["shares"]["surprisal_alone"] == found["shares"]["surprisal"]
    low, high = found["shares"]["surprisal"]["ci95"]
    assert low < 0.5 < high


def test_complexity_of_two_documents_has_numbers_or_none() -> None:
    results = measure_complexity(make_table({"in_context_language": 5.0}, documents=2))
    json.dumps(results, allow_nan=False)  # raises at a NaN
    # Two points lie on a line, whatever they are: nothing is left to correlate given surprisal.
    means = results["document_means"]["whole"]
    assert means["partial_given_surprisal"]["value"] is None
    assert means["spearman"]["value"] in (-1.0, 1.0)
    assert not results["holds"]


def test_combine_seeds() -> None:
    results = [
        {
            "tasks": {"copy": {"phi": {"mean": value, "ci95": [0, 1]}, "tokens": 5}},
            "holds": holds,
            "order": ["a"],
        }
        for value, holds in ((1.0, True), (2.0, False), (6.0, True))
    ]
    results[0]["tasks"]["copy"]["extra"] = None
    results[1]["tasks"]["copy"]["extra"] = 4
    combined = combine_seeds(results)
    phi = combined["tasks"]["copy"]["phi"]
    assert phi == {"mean": {"mean": 3.0, "min": 1.0, "max": 6.0, "sd": pytest.approx(7**0.5), "seeds": 3}}
    assert combined["tasks"]["copy"]["extra"]["seeds"] == 1
    assert combined["tasks"]["copy"]["extra"]["sd"] is None
    assert combined["holds"] == {"true": 2, "seeds": 3}
    assert "order" not in combined
    with pytest.raises(InputError, match="at least one seed"):
        combine_seeds([])


def write(folder: Path, **extra: Any) -> dict[str, Path]:
    results = measure_tasks(make_table(documents=5), resamples=50)
    run = {"finding": "tasks", "scale": "smoke", "seed": np.int64(0)}
    return write_finding(
        folder, results | extra, {"tasks": task_rows(results)}, {"tasks": figure_tasks(results)}, run
    )


def test_a_findings_folder(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    paths = write(
        folder, odd={"nan": float("nan"), "array": np.arange(2), "path": Path("a"), "flag": np.True_}
    )
    assert sorted(path.name for path in folder.iterdir()) == [
        "results.json",
        "tasks.csv",
        "tasks.png",
        "tasks.svg",
    ]
    assert set(paths) == {path.name for path in folder.iterdir()}
    results = json.loads((folder / "results.json").read_text())
    assert list(results)[:4] == ["finding", "scale", "seed", "tasks"]
    assert results["odd"] == {"nan": None, "array": [0, 1], "path": "a", "flag": True}
    frame = pd.read_csv(folder / "tasks.csv")
    assert frame["task"].tolist() == list(TASKS)
    assert frame["phi"].iloc[0] == results["tasks"]["memorized_sequences"]["phi"]["mean"]
    assert (folder / "tasks.png").read_bytes().startswith(b"\x89PNG")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    write(folder, odd=results["odd"])
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_an_unwritable_folder_is_an_output_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="Cannot make the folder"):
        write(tmp_path / "file" / "folder")
    with pytest.raises(OutputError, match="Cannot write"):
        write_atomically(tmp_path / "missing" / "x", lambda file: file.write(b""))


def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"old")

    def fill(file: Any) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OutputError, match="No space left"):
        write_atomically(path, fill)
    assert [(item.name, item.read_bytes()) for item in tmp_path.iterdir()] == [("x", b"old")]
