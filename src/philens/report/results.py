"""Where a result is worked out, as tables for a terminal."""

from collections.abc import Mapping
from typing import Any

from rich.table import Table
from rich.text import Text

from philens.report.terminal import count_of, estimate_text, new_table

KIND_LABELS = {
    "sum": "sum",
    "difference": "difference",
    "product": "product",
    "copied": "copied from the text",
    "assigned": "assigned (n = 18)",
    "identity": "identity (18 = 18)",
    "counted": "counted on",
    "recalled": "recalled fact",
    "arbitrary": "arbitrary",
    "unknown_operation": "unknown operation",
    "one_digit_sum": "sum of one digit each",
    "three_digit_sum": "sum of three digits",
    "plus_zero": "a + 0",
    "wrong_result": "sum, wrong result next",
    "sum_after_sum": "sum after another",
    "same_sum_again": "same sum again",
    "problem_result": "solution: result",
    "problem_operand": "solution: given number",
    "problem_result_again": "solution: result again",
    "written_right": "written: right",
    "written_wrong": "written: wrong",
}
ROLE_LABELS = {
    "worked": "a result is worked out",
    "other": "another number",
    "variant": "other sums",
    "problem": "solutions of problems",
    "written": "the model's own results",
}
NAME_LABELS = {
    "nothing": "nothing",
    "phi": "phi",
    "surprisal": "surprisal",
    "phi_and_surprisal": "phi and surprisal",
    "surprisal_and_entropy": "surprisal and entropy",
    "entropy": "entropy",
    "state_norm": "norm of the state",
    "phi_untrained": "phi of an untrained layer",
    "everything": "all of these and the baselines",
    "baselines": "all but phi",
    "baselines_and_phi": "all and phi",
    "worked": "worked out",
}
# The same on a figure's narrow axis.
PREDICTOR_LABELS = NAME_LABELS | {
    "phi_and_surprisal": "phi, surprisal",
    "state_norm": "norm",
    "phi_untrained": "untrained",
    "baselines_and_phi": "all, phi",
}


def label(name: str) -> str:
    """A kind, a column or a set of columns as people read it."""
    return KIND_LABELS.get(name) or NAME_LABELS.get(name) or name.replace("_", " ")


def layer_label(layer: Mapping[str, Any]) -> str:
    """What tells a layer from others."""
    return f"{layer['adapter']}, {layer['insertion_point']}" if layer["adapter"] else layer["insertion_point"]


def kinds_table(layer: Mapping[str, Any]) -> Table:
    """Per kind of number: phi before it, that of an untrained layer, and the next token's surprisal."""
    table = new_table(
        f"phi before a number ({layer_label(layer)})",
        "Nats, at the token before the number's first, with 95 % intervals over texts.\n"
        "d: sum, difference and product against this kind, by phi and by an untrained layer's.",
    )
    table.add_column("before", no_wrap=True)
    for heading in ("phi", "untrained", "surprisal next", "d", "d untrained"):
        table.add_column(heading, justify="right")
    against = {item["second"]: item for item in layer["contrasts"] if item["first"] == "worked"}
    last = None
    for name, kind in layer["kinds"].items():
        if kind["role"] != last:
            table.add_row(Text(ROLE_LABELS[kind["role"]], style="bold"))
            last = kind["role"]
        cells = [estimate_text(kind[key]["mean"], kind[key]["ci95"], digits) for key, digits in _SHOWN]
        if name in against:
            found = (against[name][key]["d"] for key in ("phi", "phi_untrained"))
            cells += [estimate_text(item["value"], item["ci95"]) for item in found]
        count = count_of(kind["places"], "place")
        table.add_row(f"{label(name)}\n{count}", *(Text(cell.replace(" [", "\n[")) for cell in cells))
    return table


_SHOWN = (("phi", 1), ("phi_untrained", 1), ("surprisal_next", 2))


def effects_table(layer: Mapping[str, Any]) -> Table:
    """How much higher phi is where a result is worked out, others held fixed; what tells it apart."""
    verdict = "\n".join(
        f"{sentence}: {'yes' if layer[key] else 'no'}."
        for key, sentence in (
            ("above_every_other", "Phi is higher than before every other kind of number"),
            ("beyond_controls", "It is higher with all else held fixed"),
            ("beyond_baselines", "It adds to a classifier that has all else"),
        )
    )
    table = new_table(
        f"Worked out or not ({layer_label(layer)})",
        "Higher: nats of phi where a result is worked out, with the columns held fixed.\n"
        "AUROC: a classifier by the columns, fitted on some templates, on sentences of others\n"
        f"and on solutions.\n{verdict}",
    )
    table.add_column("columns", no_wrap=True)
    for heading in ("higher", "partial correlation", "AUROC", "AUROC, solutions"):
        table.add_column(heading, justify="right")
    for name in dict.fromkeys([*layer["effects"], *layer["classifiers"]]):
        effect, found = layer["effects"].get(name, {}), layer["classifiers"].get(name, {})
        cells = [
            estimate_text(item["value"], item["ci95"], digits).replace(" [", "\n[") if item else ""
            for item, digits in (
                *((effect.get("nats"), 1), (effect.get("partial_correlation"), 2)),
                *((found.get("sentences"), 3), (found.get("problems"), 3)),
            )
        ]
        table.add_row(label(name), *map(Text, cells))
    return table


def pairs_table(layer: Mapping[str, Any]) -> Table:
    """Pairs of kinds that differ in one thing."""
    table = new_table(
        f"One kind against another ({layer_label(layer)})",
        "Phi of the first minus that of the second in nats, and Cohen's d, with 95 % intervals over texts.",
    )
    table.add_column("first, second")
    for heading in ("phi", "d", "d untrained", "d norm"):
        table.add_column(heading, justify="right")
    for item in layer["contrasts"]:
        if item["first"] != "worked":
            found = (
                *((item["phi"]["difference"], 1), (item["phi"]["d"], 2)),
                *((item["phi_untrained"]["d"], 2), (item["state_norm"]["d"], 2)),
            )
            cells = [estimate_text(one["value"], one["ci95"], k).replace(" [", "\n[") for one, k in found]
            table.add_row(f"{label(item['first'])},\n{label(item['second'])}", *map(Text, cells))
    return table


def layers_table(results: Mapping[str, Any]) -> Table:
    """Several layers side by side."""
    table = new_table(
        "Where a result is worked out, layer by layer",
        "Smallest d: of phi where a result is worked out against the nearest other kind.\n"
        "Again: phi before a sum minus that before the same sum said again.\n"
        "Fixed: nats by which phi is higher with all else held fixed.",
    )
    table.add_column("layer")
    for heading in ("phi", "smallest d", "again", "fixed", "AUROC phi", "untrained", "holds"):
        table.add_column(heading, justify="right")
    for layer in results["layers"]:
        others = [item for item in layer["contrasts"] if item["first"] == "worked"]
        nearest = min(others, key=lambda item: item["phi"]["d"]["value"] or 0.0)["phi"]["d"]
        again = next(item for item in layer["contrasts"] if item["second"] == "same_sum_again")["phi"]
        auroc = layer["classifiers"]
        found = (
            *((layer["worked"], 1), (nearest, 2), (again["difference"], 1)),
            (layer["effects"]["everything"]["nats"], 1),
            *((auroc[name]["sentences"], 3) for name in ("phi", "phi_untrained")),
        )
        cells = [estimate_text(item["value"], item["ci95"], k).replace(" [", "\n[") for item, k in found]
        table.add_row(layer_label(layer), *map(Text, cells), "yes" if layer["holds"] else "no")
    return table


def tables(results: Mapping[str, Any]) -> list[Table]:
    """All that is shown of a finding: each layer's tables, and one of all where there are several."""
    found = [make(layer) for layer in results["layers"] for make in (kinds_table, effects_table, pairs_table)]
    return found + ([layers_table(results)] if len(results["layers"]) > 1 else [])
