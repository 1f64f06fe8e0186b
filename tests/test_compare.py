"""Several instruments on the same texts: planted columns with a known answer, and the command."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from philens import cli
from philens.findings.compare import measure_comparison
from philens.findings.compare_figures import compare_figures
from philens.findings.compare_run import compare, formal_texts
from philens.findings.compare_tables import compare_tables, result_rows
from philens.support.errors import ConfigError, InputError
from philens.tasks.automata import TASKS
from philens.training.opening import SHIPPED
from tiny import tiny_recipe


def planted() -> pd.DataFrame:
    """400 tokens of 20 texts; `mtd@x` is `phi@x`, but on the kind `odd` it is as low as it gets."""
    random = np.random.default_rng(0)
    text = np.repeat(np.arange(20), 20)
    token = np.where(np.arange(400) % 20 == 7, "odd", np.char.add("k", (np.arange(400) % 5).astype(str)))
    phi = random.gamma(2.0, size=400) * np.where(text < 10, 1.0, 4.0)
    frame = pd.DataFrame({"level": np.where(text < 10, "trivial", "prose"), "text": text, "token": token})
    frame["place"] = np.arange(400) % 20
    frame["phi@x"], frame["mtd@x"] = phi, np.where(token == "odd", -1.0, phi)
    return frame.assign(**{"phi@y": phi * 3 + 1, "surprisal": random.normal(size=400)})


def pair(rows: list[dict], first: str, second: str) -> dict:
    return next(one for one in rows if {one["first"], one["second"]} == {first, second})


def test_planted_columns() -> None:
    frame = planted()
    found = measure_comparison(frame, resamples=200)
    agreement = found["agreement"]
    assert pair(agreement, "phi@x", "phi@y")["value"] == pytest.approx(1)
    assert pair(agreement, "phi@x", "phi@y")["within_texts"]["value"] == pytest.approx(1)
    assert abs(pair(agreement, "phi@x", "surprisal")["value"]) < 0.15
    odd = pair(found["disagreement"], "phi@x", "mtd@x")["kinds"][0]
    assert (odd["token"], odd["occurrences"], odd["texts"]) == ("odd", 20, 20)
    by_hand = (stats.rankdata(frame["phi@x"]) - stats.rankdata(frame["mtd@x"]))[frame["token"] == "odd"]
    assert odd["difference"]["value"] == pytest.approx(by_hand.mean() / 399)
    assert odd["difference"]["ci95"][0] > 0
    told = frame[(frame["text"] == odd["text"]) & (frame["place"] == odd["place"])]
    assert told["token"].item() == "odd"
    same = pair(found["disagreement"], "phi@x", "phi@y")["kinds"]
    assert all(kind["difference"]["value"] == pytest.approx(0) for kind in same)
    ratio = next(one for one in found["ratios"] if one["column"] == "phi@x")
    expected = frame[frame.level == "prose"]["phi@x"].mean() / frame[frame.level == "trivial"]["phi@x"].mean()
    assert (ratio["interesting"], ratio["boring"]) == ("prose", "trivial")
    assert ratio["value"] == pytest.approx(expected)
    assert not any(one["first"] == "surprisal" for one in found["disagreement"])


def test_rare_kinds_are_not_told() -> None:
    frame = planted()
    frame.loc[:8, "token"] = "rare"  # nine times
    frame.loc[20:39, "token"] = "of one text"
    kinds = [kind["token"] for one in measure_comparison(frame)["disagreement"] for kind in one["kinds"]]
    assert kinds
    assert not {"rare", "of one text"} & set(kinds)


def test_formal_texts_are_those_of_the_recipe() -> None:
    texts, lengths = formal_texts(tiny_recipe(), 2)
    assert [text.level for text in texts] == [task for task in TASKS for _ in range(2)]
    assert len(texts) == len(lengths)
    assert all(set(one.text) <= set("abcdefghijklmnopqr ") for one in texts)
    known = [text.level for text, length in zip(texts, lengths, strict=True) if np.isfinite(length)]
    assert "in_context_language" in known
    assert "random" not in known


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["compare", "--model", str(SHIPPED), "--documents", "3", "--tokens", "100"]
    assert cli.main([*command, "--output", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "Agreement" in shown
    assert "phi@small" in shown
    assert "surprisal_with_layer@small" in shown
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results["levels"]) == set(TASKS)
    assert results["columns"][0] == "phi@small"
    assert results["complexity"]["phi@small"]["given"] == "surprisal"
    assert results["complexity"]["surprisal"]["given"] is None
    names = {"levels", "ratios", "complexity", "agreement", "disagreement", "cost"}
    assert (
        {path.stem for path in tmp_path.glob("*.csv")}
        == names
        == {p.stem for p in tmp_path.glob("*.png")} | {"ratios"}
    )
    costs = list(csv.DictReader((tmp_path / "cost.csv").open()))
    assert all(float(row["lowest"]) <= float(row["median"]) <= float(row["highest"]) for row in costs)
    assert "Tokens that instruments disagree on" in (tmp_path / "page.html").read_text()


def test_two_adapters_and_one_column_of_the_base(tmp_path: Path) -> None:
    copy = shutil.copytree(SHIPPED / "adapter", tmp_path / "copy")
    adapters = [str(SHIPPED / "adapter"), str(copy)]
    chosen = [*adapters, str(SHIPPED)]  # a run's own adapter, again
    output = tmp_path / "output"
    found = compare(str(SHIPPED), chosen, None, ["phi", "surprisal"], output, documents=2, tokens=60)
    first, second = found["columns"][:2]
    assert found["columns"][2:] == ["surprisal"]
    assert pair(found["agreement"], first, second)["value"] == pytest.approx(1)
    assert list(found["adapters"].values()) == adapters


def test_one_column_has_nothing_to_agree_with() -> None:
    found = measure_comparison(planted().loc[:, ["level", "text", "place", "token", "phi@x"]])
    found |= {"cost": []}
    assert set(result_rows(found)) == {"levels", "ratios"}
    assert compare_figures(found).keys() == {"levels", "cost"}
    assert [*compare_tables(found)]


def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no metric 'phy'"):
        compare(str(SHIPPED), metrics=["phy"], output=tmp_path, documents=2)
    with pytest.raises(ConfigError, match="No adapter has mtd"):
        compare(str(SHIPPED), metrics=["phi", "mtd"], output=tmp_path, documents=2, tokens=40)
    with pytest.raises(ConfigError, match="documents must be at least 2"):
        compare(str(SHIPPED), output=tmp_path, documents=1)
    with pytest.raises(ConfigError, match="tokens must be at least 1"):
        compare(str(SHIPPED), output=tmp_path, tokens=-1)
    assert not [*tmp_path.iterdir()]
