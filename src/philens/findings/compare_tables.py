"""A comparison of instruments: functions from its results to rows of CSV files and tables for a terminal."""

from collections.abc import Iterator, Mapping
from typing import Any

from rich.table import Table

from philens.show.estimates import flat, number_text
from philens.show.terminal import cell, count_of, new_table
from philens.support.output import visible


def result_rows(results: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The results of `philens.findings.compare` as rows for CSV files, by name."""
    apart = ("first", "second", "interesting", "boring", "column")
    tables = {
        "levels": [
            {"level": level, "texts": one["texts"], "tokens": one["tokens"], "column": name}
            | flat("mean", mean)
            for level, one in results["levels"].items()
            for name, mean in one["columns"].items()
        ],
        "ratios": [
            {key: one[key] for key in apart if key in one} | flat("ratio", one) for one in results["ratios"]
        ],
        "complexity": [
            {"column": name, "given": one["given"]} | flat("correlation", one)
            for name, one in results["complexity"].items()
        ],
        "agreement": [
            {key: one[key] for key in apart if key in one}
            | flat("spearman", one)
            | flat("within_texts", one["within_texts"])
            for one in results["agreement"]
        ],
        "disagreement": [
            {"first": pair["first"], "second": pair["second"]}
            | {key: value for key, value in kind.items() if key not in ("difference", "text", "place")}
            | flat("difference", kind["difference"])
            for pair in results["disagreement"]
            for kind in pair["kinds"]
        ],
        "cost": results["cost"],
    }
    return {name: rows for name, rows in tables.items() if rows}


def compare_tables(results: Mapping[str, Any]) -> Iterator[Table]:
    """What to print of a comparison."""
    columns, levels = results["columns"], results["levels"]
    told = f"{count_of(results['tokens'], 'token')} of {count_of(results['texts'], 'text')} with a value in "
    told += f"every column; {results['tokens_left_out']:,} left out. Intervals: levels.csv, ratios.csv."
    whole = {"whole": (True, False)}
    table = new_table("Means", told, "", *(level.replace("_", " ") for level in levels), **whole)
    for name in columns:
        table.add_row(name, *(number_text(one["columns"][name]["mean"], 2) for one in levels.values()))
    yield table
    if results["ratios"]:
        claims = list(dict.fromkeys((one["interesting"], one["boring"]) for one in results["ratios"]))
        headings = (f"{high} ÷ {low}".replace("_", " ") for high, low in claims)
        table = new_table("Interesting ÷ boring", "", "", *headings, **whole)
        of = {(one["column"], one["interesting"], one["boring"]): one["value"] for one in results["ratios"]}
        for name in columns:
            table.add_row(name, *(number_text(of[name, high, low], 2) for high, low in claims))
        yield table
    if results["complexity"]:
        table = new_table(
            "Correlation with description length", "", "", "correlation", "given", whole=(True, False)
        )
        for name, one in results["complexity"].items():
            table.add_row(name, cell(one, 3, between=" "), one["given"] or "nothing")
        yield table
    table = new_table(
        "Agreement: rank correlation over tokens", "", "", "", "all", "within texts", whole=(False, False)
    )
    for one in results["agreement"]:
        cells = (cell(one, between=" "), cell(one["within_texts"], between=" "))
        table.add_row(one["first"], one["second"], *cells)
    yield table
    told = "Mean rank of a kind of token less that in the second column, the largest differences first."
    table = new_table("Disagreement", told, "", "", "higher in the first", "lower", whole=(False, False))
    for pair in results["disagreement"]:
        known = [(kind["token"], kind["difference"]["value"]) for kind in pair["kinds"]]
        sides = ([one for one in known if one[1] > 0], [one for one in known if one[1] <= 0])
        told = (" ".join(f"{visible(repr(token))} {value:+.2f}" for token, value in one) for one in sides)
        table.add_row(pair["first"], pair["second"], *told)
    yield table
    table = new_table("Cost: time ÷ a plain forward pass", "Alone; from the lowest to the highest.", "", "")
    for one in results["cost"]:
        spread = {"value": one["median"], "ci95": [one["lowest"], one["highest"]]}
        table.add_row(one["column"], cell(spread, between=" "))
    yield table
