"""Where a result is worked out, as tables for a terminal."""

from collections.abc import Mapping
from typing import Any

from rich.table import Table
from rich.text import Text

from philens.show.estimates import numbers
from philens.show.terminal import cell, count_of, new_table

KIND_LABELS = {
    "assigned": "assigned (n = 18)",
    "identity": "identity (18 = 18)",
    "counted": "counted on",
    "recalled": "recalled fact",
    "one_digit_sum": "one-digit sum",
    "three_digit_sum": "three-digit sum",
    "plus_zero": "a + 0",
    "wrong_result": "sum, then wrong",
    "sum_after_sum": "sum after another",
    "same_sum_again": "same sum again",
    "problem_result": "solution: result",
    "problem_operand": "solution: given",
    "problem_result_again": "solution: again",
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
    "phi_untrained": "untrained layer",
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
        "d: sum, difference and product against this kind.",
        *("before", "phi", "untrained", "surprisal, next", "d"),
        whole=(True, False),
    )
    against = {item["second"]: item for item in layer["contrasts"] if item["first"] == "worked"}
    last = None
    for name, kind in layer["kinds"].items():
        if kind["role"] != last:
            table.add_row(Text(ROLE_LABELS[kind["role"]], style="bold"))
            last = kind["role"]
        cells = [_nats(kind["phi"]), _nats(kind["phi_untrained"])]
        cells.append(cell(kind["surprisal_next"], 2))
        if name in against:
            cells.append(cell(against[name]["phi"]["d"]))
        table.add_row(Text(f"{label(name)}\n{count_of(kind['places'], 'place')}"), *cells)
    return table


def _nats(estimate: Mapping[str, Any]) -> Text:
    """A value of phi, which is small in small models and hundreds of nats in large ones."""
    return cell(estimate, 0 if abs(numbers(estimate)[0] or 0) >= 100 else 1)


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
        "Higher: nats by which phi is higher where a result is worked out, with these held fixed;\n"
        "partial: its correlation. AUROC: a classifier by these, fitted on some templates, on\n"
        f"sentences of others, and on solutions of problems.\n{verdict}",
        *("columns", "higher", "partial", "AUROC", "solutions"),
        whole=(True, False),
    )
    for name in dict.fromkeys([*layer["effects"], *layer["classifiers"]]):
        effect, found = layer["effects"].get(name, {}), layer["classifiers"].get(name, {})
        cells = [_nats(effect["nats"]), cell(effect["partial_correlation"])] if effect else ["", ""]
        cells += [cell(found[where], 3) for where in ("sentences", "problems") if where in found]
        table.add_row(label(name), *cells)
    return table


def forms_table(layer: Mapping[str, Any]) -> Table:
    """What is worked out and what is not, for each form of sentence."""
    table = new_table(
        f"By the form of the sentence ({layer_label(layer)})",
        "Worked out: sum, difference and product. Nats, with 95 % intervals over texts. Where the\n"
        "model calculates, it foretells the result: its surprisal is low.",
        *("form", "phi", "untrained", "surprisal, next"),
        whole=(True, False),
    )
    for form, sides in layer["forms"].items():
        for side, item in sides.items():
            cells = [_nats(item[name]) for name in ("phi", "phi_untrained")]
            name = "worked out" if side == "worked" else "other numbers"
            places = count_of(item["places"], "place")
            table.add_row(Text(f"{form}: {name}\n{places}"), *cells, cell(item["surprisal_next"], 2))
    return table


def pairs_table(layer: Mapping[str, Any]) -> Table:
    """Pairs of kinds that differ in one thing."""
    table = new_table(
        f"One kind against another ({layer_label(layer)})",
        "Phi of the first minus that of the second in nats, and Cohen's d of phi and of two\n"
        "controls: an untrained layer's phi, and the norm of the state. 95 % intervals over texts.",
        *("first, second", "phi", "d", "untrained", "norm"),
        whole=(False, False),
    )
    for item in layer["contrasts"]:
        cells = [cell(item[key]["d"]) for key in ("phi", "phi_untrained", "state_norm")]
        table.add_row(
            Text(f"{label(item['first'])},\n{label(item['second'])}"),
            *(_nats(item["phi"]["difference"]), *cells),
        )
    return table


def layers_table(results: Mapping[str, Any]) -> Table:
    """Several layers side by side."""
    table = new_table(
        "Where a result is worked out, layer by layer",
        "Smallest d: of phi where a result is worked out against the nearest other kind.\n"
        "Again: phi before a sum minus that before the same sum said again.\n"
        "Fixed: nats by which phi is higher with all else held fixed.",
        *("layer", "phi", "smallest d", "again", "fixed", "AUROC phi", "untrained", "holds"),
        whole=(False, False),
    )
    for layer in results["layers"]:
        others = [item for item in layer["contrasts"] if item["first"] == "worked"]
        nearest = min(others, key=lambda item: item["phi"]["d"]["value"] or 0.0)["phi"]["d"]
        again = next(item for item in layer["contrasts"] if item["second"] == "same_sum_again")["phi"]
        auroc = layer["classifiers"]
        cells = [_nats(layer["worked"]), cell(nearest), _nats(again["difference"])]
        cells.append(_nats(layer["effects"]["baselines"]["nats"]))
        cells += [cell(auroc[name]["sentences"], 3) for name in ("phi", "phi_untrained")]
        table.add_row(Text(layer_label(layer)), *cells, "yes" if layer["holds"] else "no")
    return table


def tables(results: Mapping[str, Any]) -> list[Table]:
    """All that is shown of a finding: each layer's tables, and one of all where there are several."""
    makers = (kinds_table, forms_table, effects_table, pairs_table)
    found = [make(layer) for layer in results["layers"] for make in makers]
    return found + ([layers_table(results)] if len(results["layers"]) > 1 else [])
