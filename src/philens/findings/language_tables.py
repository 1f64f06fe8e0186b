"""Formal languages, levels of text, sweeps: functions from results to tables for a terminal."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from philens.findings.complexity import CORRELATIONS, PARTS
from philens.findings.tasks import INTERESTING
from philens.findings.texts import PAPER
from philens.show.estimates import estimate_text, number_text, numbers
from philens.show.terminal import cell, count_of, counts_text, new_table
from philens.tasks.automata import task_label
from philens.tasks.levels import INTERESTING as INTERESTING_LEVELS

CORRELATION_LABELS = {
    "spearman": "phi (Spearman)",
    "spearman_of_surprisal": "surprisal (Spearman)",
    "partial_given_surprisal": "phi given surprisal",
    "partial_given_surprisal_and_square": "phi given surprisal & its square",
}
GAIN_LABELS = {
    "spearman": "phi, gain",
    "spearman_of_surprisal": "surprisal, gain",
    "given_surprisal": "phi, gain; given surprisal",
    "given_surprisal_and_position": "phi, gain; given surprisal, position",
    "given_learners_surprisal": "phi, gain; given these and the learner's surprisal",
    "given_neighbours": "phi, gain; given all these and the neighbours' gains",
    "linear_given_surprisal": "phi, gain; given surprisal and its square, values not ranks",
    "description_length_given_surprisal": "phi, description length; given surprisal, position",
    "description_length_given_gain": "phi, description length; given these and gain",
}
# With fewer, a bootstrap has hardly anything to draw from.
FEW_TEXTS = 5
LEVELS = {"token_wise": "tokens", "document_means": "document means"}


def formal_tables(make: Callable[[Mapping[str, Any]], Table], results: Mapping[str, Any]) -> Iterator[Table]:
    """What to print of a finding on formal languages: a table of each seed, and one over seeds."""
    for one in results.get("seeds", [results]):
        table = make(one)
        if "seeds" in results:
            table.title = Text(f"Seed {one['seed']}: {table.title}", style="bold")
        yield table
        if "controls" in one:
            yield controls_table(one["controls"], one.get("pairs"))
    if "spread" in results:
        yield spread_table(results["spread"])


def all_texts_tables(results: Mapping[str, Any]) -> Iterator[Table]:
    """What to print of levels of text."""
    if "points" in results:
        yield text_points_table(results)
    yield texts_table(results)
    if any(pair["claim"] for pair in results["pairs"]):
        yield text_pairs_table(results)
    if (results["verbatim"] or {}).get("tokens"):
        yield recitation_table(results["verbatim"])


def tasks_table(results: Mapping[str, Any]) -> Table:
    """Per task: phi and surprisal with their intervals, and in-context language's phi over the task's."""
    tasks = results["tasks"].values()
    documents, tokens = (counts_text([task[key] for task in tasks], key) for key in ("documents", "tokens"))
    caption = [f"Nats per token with 95 % intervals over documents; {documents} and {tokens} a task."]
    caption.append(_verdict_on_tasks(results))
    if results["known_false_positives"]:
        caption.append("false positive: copying is known to raise phi.")
    headings = ("task", "phi", "surprisal", "in-context phi ÷")
    table = new_table("phi and surprisal per task", "\n".join(caption), *headings, whole=(True, False))
    for name, task in results["tasks"].items():
        ratio = cell(results["ratios"].get(name), between=" ")
        if name in results["known_false_positives"]:
            ratio = "false positive"
        label = Text(task_label(name), style="bold" if name == INTERESTING else "")
        table.add_row(label, *(cell(task[key], between=" ") for key in ("phi", "surprisal")), ratio)
    return table


def complexity_table(results: Mapping[str, Any]) -> Table:
    """Correlations of phi with description length, over tokens and over document means."""
    verdict = "above zero" if results["holds"] else "not above zero"
    table = new_table(
        "Correlation with description length, in-context language",
        f"95 % intervals over {results['documents']:,} documents with {results['tokens']:,} tokens.\n"
        f"phi given surprisal, over tokens of whole documents: {verdict}.",
        *("over", *(CORRELATION_LABELS[name] for name in CORRELATIONS)),
        whole=(True, False),
    )
    for level, label in LEVELS.items():
        table.add_row(Text(label.replace(" ", "\n"), style="bold"))
        for part in PARTS:
            cells = [cell(results[level][part][name], 3) for name in CORRELATIONS]
            table.add_row(part.replace("_", " "), *cells, end_section=part == PARTS[-1])
    return table


def controls_table(controls: Mapping[str, Any], pairs: Mapping[str, Any] | None) -> Table:
    """Phi's partial correlation beside those of what learned nothing, and what is left of it."""
    left, every = (estimate_text(controls[key], 3) for key in ("left", "given_all"))
    caption = [
        "Partial correlations as above, given what the finding holds fixed; given that and",
        "how many different letters the document has (noise left out); and given more.",
        f"phi minus the nearest control ({controls['strongest']}): {left}.",
        f"phi given more, letters and every control's phi: {every}.",
    ]
    if pairs:
        caption.append(
            f"pairs: of {pairs['pairs']} pairs of documents of like surprisal, in how many the one"
        )
        caption.append("with the longer description has the higher mean; chance is 0.5.")
    headings = ("of", "as found", "given letters", "given more", "phi, given this")
    beside = ("pairs",) if pairs else ()
    table = new_table("Controls", "\n".join(caption), *headings, *beside, whole=(False, False))
    for name, found in ({"phi": controls["phi"]} | controls["controls"]).items():
        cells = [found.get(key) for key in ("given_fixed", "given_letters", "given_more", "phi_given_it")]
        shares = [cell(pairs["shares"].get(name))] if pairs else []
        table.add_row(Text(name.replace("_", " ")), *(cell(one, 3) for one in cells), *shares)
    return table


def gain_table(results: Mapping[str, Any]) -> Table:
    """Correlations of phi with an ideal learner's information gain."""
    verdict = "above zero" if results["holds"] else "not above zero"
    surprisal = results["surprisal"]
    table = new_table(
        "Information gain of an ideal learner, in-context language",
        f"Of ranks; 95 % intervals over {results['documents']:,} documents, {results['tokens']:,} letters.\n"
        f"Mean surprisal: learner {surprisal['learner']:.3f}, model {surprisal['model']:.3f} nats; "
        f"mean gain {results['gain']:.3f} nats.\n"
        f"phi with gain given surprisals, position and the neighbours' gains: {verdict}.",
        *("correlation", ""),
    )
    for name, label in GAIN_LABELS.items():
        table.add_row(label, cell(results["correlations"][name], 3, between=" "))
    return table


def knobs_table(results: Mapping[str, Any]) -> Table:
    """Phi of in-context language, its ratios and correlations, for each setting of each knob."""
    table = new_table(
        "What moves phi",
        "phi of in-context language, nats; gap: its surprisal with the layer less without;\n"
        "÷: its phi over a boring task's; length: correlation with description length,\n"
        "given surprisal; letters: given the number of letters, too; gain: rank\n"
        "correlation with an ideal learner's gain, given surprisal and position. In\n"
        "brackets: 1, or of correlations 0, is in the 95 % interval over documents.",
        *("knob", "phi", "gap", "÷ strings", "÷ programs", "÷ random", "length", "letters", "gain"),
        whole=(True, True),
    )
    knob = "untrained layer"
    for one in [{"knob": knob, "setting": ""}, *results["settings"]]:
        measured = one if "phi" in one else results["untrained"]
        if one["knob"] != knob:
            table.add_section()
            table.add_row(Text(one["knob"], style="bold"))
        knob = one["knob"]
        cells = [number_text(measured["phi"]["mean"], 1), number_text(measured["loss_gap"]["value"], 2)]
        cells += [_told_from(ratio, 1) for ratio in measured["ratios"].values()]
        cells += [_told_from(found, 0) for found in measured["correlations"].values()]
        table.add_row(Text(one["setting"] or knob), *cells)
    return table


def _told_from(estimate: Mapping[str, Any], none: float) -> str:
    """A value, in brackets where its interval has the value that would say nothing."""
    value, low, high = numbers(estimate)
    shown = number_text(value, 2)
    return shown if low is not None and high is not None and (low > none or high < none) else f"({shown})"


def texts_table(results: Mapping[str, Any]) -> Table:
    """Per level of text: phi, surprisal and gap with their intervals, and the paper's phi and surprisal."""
    levels = results["levels"]
    caption = [
        "Nats per token with 95 % intervals over texts; gap: surprisal with the layer minus without.",
        "Paper: Llama 3.2 3B, phi / surprisal; orders can be compared, values can't.",
        _verdict_on_texts(results),
    ]
    if sinks := sum(level["sinks"] for level in levels.values()):
        caption.append(f"{count_of(sinks, 'attention sink')} left out of phi.")
    few = [name for name, level in levels.items() if level["texts"] < FEW_TEXTS]
    if few:
        caption.append(f"Fewer than {FEW_TEXTS} texts, so that an interval says little: {_listed(few)}.")
    headings = ("level", "phi", "surprisal", "gap", "paper")
    table = new_table("phi and surprisal per level of text", "\n".join(caption), *headings)
    for name, level in levels.items():
        built = ", built" if level["built"] else ""
        counts = f"{count_of(level['texts'], 'text')}{built}\n{count_of(level['tokens'], 'token')}"
        kinds = (("phi", 2), ("surprisal", 2), ("gap", 3))
        cells = ["none" if level[key] is None else cell(level[key], digits) for key, digits in kinds]
        paper = PAPER.get(level["role"])
        label = Text.assemble((name, "bold" if level["role"] in INTERESTING_LEVELS else ""), f"\n{counts}")
        table.add_row(label, *cells, "" if paper is None else f"{paper[0]} / {paper[1]}")
    return table


def text_pairs_table(results: Mapping[str, Any]) -> Table:
    """What the paper's claim says of pairs of levels, and what was found."""
    table = new_table(
        "phi of one level against another",
        "Of the first to the second, with 95 % intervals over texts; difference in nats per token.\n"
        "above, below: the intervals of the two levels are separate. untrained: the ratio in a\n"
        "layer that has learned nothing; what lies in the size of the state shows there too.",
        *("levels", "difference", "ratio", "untrained", ""),
    )
    for pair in results["pairs"]:
        if pair["claim"]:
            verdict = "not separated"
            if pair["separated"]:
                verdict = "above" if pair["difference"]["value"] > 0 else "below"
            control = number_text(pair["controls"]["phi_untrained"]["value"], 2)
            cells = (cell(pair["difference"]), cell(pair["ratio"]), control, verdict)
            table.add_row(Text(f"{pair['first']}, {pair['second']}"), *cells)
    return table


def recitation_table(verbatim: Mapping[str, Any]) -> Table:
    """Phi of memorised text where it is recited, against the rest of it."""
    share = f"{verbatim['share']:.0%} of the tokens, in {count_of(verbatim['texts'], 'text')}"
    table = new_table(
        "phi of memorised text where it is recited",
        f"Recited: runs of {verbatim['run']} tokens or more, each with a surprisal below "
        f"{verbatim['surprisal_below']:g} nats ({share}).\n"
        "Sure: tokens below that in the rest. Differences are within a text; 95 % intervals over texts.",
        *("tokens", "phi", "texts"),
        whole=(True, True),
    )
    for key, label in _RECITATION.items():
        found = verbatim[key]
        count = 0 if found is None else found["texts"]
        table.add_row(label, Text(estimate_text(found)), f"{count:,}", end_section=key == "sure_rest")
    return table


_RECITATION = {
    "recited": "recited",
    "rest": "the rest",
    "sure_rest": "sure, in the rest",
    "recited_less_rest": "recited less the rest",
    "recited_less_sure_rest": "recited less sure",
}


def text_points_table(results: Mapping[str, Any]) -> Table:
    """Phi of each level at several points, and how many of the claimed pairs are as the paper has them."""
    points, course = results["points"], results["course"]
    caption = [
        "phi, nats per token; pairs: of those that the paper's claim is about, above with separate intervals."
    ]
    for pair in course["pairs"] if course["along"] else ():
        since = pair["above_since"]
        told = "not above at the end" if since is None else f"above from {since} on"
        if pair["separated_since"]:
            told += f", separate from {pair['separated_since']} on"
        caption.append(f"{pair['first']}, {pair['second']}: {told}.")
    title, levels = "phi of each level", list(results["levels"])
    title += " along the training" if course["along"] else ""
    table = new_table(title, "\n".join(caption), "", *map(Text, levels), "pairs", whole=(False, False))
    for point in points:
        claimed = [pair for pair in point["pairs"] if pair["claim"]]
        above = sum(pair["separated"] and pair["difference"]["value"] > 0 for pair in claimed)
        means = [number_text((point["levels"][level]["phi"] or {}).get("mean"), 1) for level in levels]
        table.add_row(Text(point["label"]), *means, f"{above} of {len(claimed)}" if claimed else "")
    return table


def spread_table(spread: Mapping[str, Any]) -> Table:
    """What `philens.findings.combine_seeds` made of a finding, as mean, sd and range over seeds."""
    sections: dict[str, dict[str, Any]] = {}
    if "tasks" in spread:
        for key in ("phi", "surprisal"):
            sections[f"{key} (nats per token)"] = {
                task_label(name): task[key]["mean"] for name, task in spread["tasks"].items() if key in task
            }
        sections["phi of in-context language over its"] = {
            task_label(name): item["ratio"] for name, item in spread.get("ratios", {}).items()
        }
    elif "correlations" in spread:
        sections["correlation"] = {
            label: spread["correlations"][name]["value"]
            for name, label in GAIN_LABELS.items()
            if name in spread["correlations"]
        }
    else:
        for level, label in LEVELS.items():
            for part, found in spread.get(level, {}).items():
                sections[f"{label}, {part.replace('_', ' ')}"] = {
                    CORRELATION_LABELS[name]: found[name]["value"] for name in CORRELATIONS if name in found
                }
    title = "Over seeds"
    if "token_wise" in spread:
        title = "Correlation with description length, over seeds"
    return seeds_table(title, spread, sections)


def seeds_table(
    title: str, spread: Mapping[str, Any], sections: Mapping[str, Mapping[str, Mapping[str, Any]]]
) -> Table:
    """Numbers over seeds by their names, in sections, those without a name first."""
    holds = spread.get("holds")
    caption = f"The finding holds for {holds['true']} of {holds['seeds']} seeds." if holds else ""
    table = new_table(title, caption, "", "mean", "sd", "lowest", "highest", "seeds")
    table.columns[0].max_width = 40
    for heading, lines in sections.items():
        if heading and lines:
            table.add_row(Text(heading, style="bold"))
        for number, (label, item) in enumerate(lines.items(), start=1):
            values = [number_text(item[key], 3) for key in ("mean", "sd", "min", "max")]
            table.add_row(Text(label), *values, str(item["seeds"]), end_section=number == len(lines))
    return table


def sweep_table(results: Mapping[str, Any]) -> Table:
    """What a sweep over insertion points found."""
    caption = "Nats per token on held-out text, after training all layers for as long."
    if results["collapsed"]:
        caption += "\nAt least one layer has collapsed: its latents carry almost no information."
    names = ("phi", "phi_static", "surprisal", "surprisal_base", "loss_gap")
    headings = ("after", *(name.replace("_", " ") for name in names))
    table = new_table("Insertion points", caption, *headings, whole=(True, False))
    for path, found in results["points"].items():
        table.add_row(
            Text(path), *(number_text(found.get(name), 2 if "phi" in name else 3) for name in names)
        )
    return table


def _verdict_on_tasks(results: Mapping[str, Any]) -> str:
    if not results["ratios"]:
        return "Nothing to compare."
    ours = task_label(INTERESTING)
    if results["holds"]:
        return f"The phi of {ours} stands above every boring task's, and surprisal orders them otherwise."
    beaten = sum(item["ratio"] > 1 and item["separated"] for item in results["ratios"].values())
    if beaten == len(results["ratios"]):
        return f"The phi of {ours} stands above every boring task's, but surprisal orders them the same way."
    return f"The phi of {ours} stands clearly above {beaten} of {len(results['ratios'])} boring tasks'."


def _verdict_on_texts(results: Mapping[str, Any]) -> str:
    claimed = [pair for pair in results["pairs"] if pair["claim"]]
    if not claimed:
        return "Nothing to compare: the paper's claim is about code and prose against boring levels."
    above = sum(pair["separated"] and pair["difference"]["value"] > 0 for pair in claimed)
    verdict = "holds" if results["holds"] else "does not hold"
    otherwise = "otherwise" if results["orders_differ"] else "the same way"
    ours, theirs = (_listed([pair[side] for pair in claimed]) for side in ("first", "second"))
    return (
        f"The claim that the phi of {ours} stands above that of {theirs} {verdict} here: {above} of "
        f"{len(claimed)} pairs are above with separate intervals; surprisal orders these levels {otherwise}."
    )


def _listed(names: Sequence[str]) -> str:
    once = list(dict.fromkeys(names))
    return ", ".join([*once[:-2], " and ".join(once[-2:])])
