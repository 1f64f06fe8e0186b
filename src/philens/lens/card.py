"""The model card of an adapter: what it is, how it was trained, what came out, and how to load it."""

import json
from collections.abc import Mapping
from typing import Any

import yaml

from philens.bases.wheels import WHEELS
from philens.lens.instrument import KINDS

# Of each kind of instrument what it measures, and its source.
_MEASURES = {
    "phi": "A PHi layer measures, token by token, how much a language model's hidden state adds that its "
    "earlier hidden states did not predict: the information gained, in nats (Herrmann, Csordas, "
    'Schmidhuber, "Measuring In-Context Computation Complexity via Hidden State Prediction", ICML 2025, '
    "arXiv 2503.13431).",
    "mtd": "A shallow head predicts what a language model predicts, from the model's earlier hidden states "
    "and little computation of its own; how far the model's own prediction is from it, token by token, is "
    "multiple-token divergence, in nats (arXiv 2512.22944).",
}
_METRICS = {
    "surprisal_base": "surprisal of the untouched base",
    "surprisal": "surprisal with the layer",
    "loss_gap": "loss gap",
    "phi": "phi",
    "mtd": "mtd",
    "surprisal_shallow": "surprisal of the shallow head",
    "phi_static": "phi if nothing were predicted",
}


def model_card(description: Mapping[str, Any], licence: Mapping[str, str], repo_id: str | None) -> str:
    """The card's Markdown, with the header that the Hub reads.

    Args:
        description: what `adapter_config.json` holds.
        licence: the base's, as `license`, `license_name` and `license_link`; empty if not known.
        repo_id: where the adapter will lie on the Hub; None for a folder.
    """
    base, training = description["base"], description["training"] or {}
    kinds = description.get("instruments", ["phi"])
    from_hub, tags = base["revision"] is not None, ["philens", *kinds, "interpretability"]
    header: dict[str, Any] = {"library_name": "philens", "pipeline_tag": "text-generation", "tags": tags}
    if from_hub:
        header |= {"base_model": base["name_or_path"], "base_model_relation": "adapter"}
    name = base["name_or_path"] or f"a {base['class']}"
    points = ", ".join(f"`{path}`" for path in description["module_paths"])
    revision = f" at `{base['revision']}`" if from_hub else ""
    precision = base["quantization"] or base["dtype"]
    names = " and ".join(KINDS[kind].title for kind in kinds)
    several = len(description.get("phi", {}).get("layers") or []) > 1
    names = names.replace("layer", "layers") if several else names
    known = licence.get("license_name") or licence.get("license") or "not known here"
    parts = [
        f"---\n{yaml.safe_dump(header | dict(licence), sort_keys=False, allow_unicode=True)}---",
        f"# {names[0].upper()}{names[1:]} after {points} of {name}",
        f"{' '.join(_MEASURES[kind] for kind in kinds)} This repository holds the "
        f"{names.replace('PHi ', '')}; the base model comes from where it always did.",
        "## Use",
        f"```python\n{_snippet(base, repo_id)}```",
        "## Where it goes",
        f"- base model: {name}{revision} ({base['class']}, {precision})\n"
        f"- licence of the base: {known}\n"
        f"- insertion point: after {points}, hidden size {description['hidden_size']}"
        + "".join(_OPTIONS[kind](description[kind]) for kind in kinds),
        "## Results",
        _table(training.get("metrics") or {}),
        "## Data",
        _list(training.get("data")),
        "## Recipe",
        _recipe(training.get("recipe")),
        "## Versions",
        _list([f"{package} {version}" for package, version in description["versions"].items()]),
    ]
    return "\n\n".join(parts) + "\n"


def _of_phi(phi: Mapping[str, Any]) -> str:
    return (
        f"\n- mode: {phi['mode']}; prior: {phi['prior']}; KL: {phi['kl']}"
        f"\n- weights in the loss: phi {phi['phi_weight']:g}, contrastive {phi['contrastive_weight']:g}"
    )


def _of_mtd(mtd: Mapping[str, Any]) -> str:
    reads = "reads the newest token" if mtd["embedding"] else "does not read the newest token"
    return f"\n- shallow head: {reads}; depth {mtd['depth']}"


_OPTIONS = {"phi": _of_phi, "mtd": _of_mtd}


def _snippet(base: Mapping[str, Any], repo_id: str | None) -> str:
    name, revision = "path/to/the/base", ""
    if base["name_or_path"] in WHEELS:
        name = base["name_or_path"]
    elif base["revision"] is not None:
        name, revision = base["name_or_path"], f", revision={json.dumps(base['revision'])}"
    return (
        "import philens\n\n"
        f"base, tokenizer = philens.load_pretrained({json.dumps(name)}{revision})\n"
        f"lens = philens.load(base, {json.dumps(repo_id or 'path/to/this/folder')})\n"
        'scores = philens.score(lens, tokenizer, "One morning, Gregor Samsa woke.")\n'
        "print(scores[0].to_pandas())\n"
    )


def _table(metrics: Mapping[str, Any]) -> str:
    """A table of numbers, in nats per token; one column for each metric where they are given by part."""
    if not metrics:
        return "None were recorded."
    parts = {part: row for part, row in metrics.items() if isinstance(row, Mapping)}
    alone = {name: value for name, value in metrics.items() if name not in parts}
    if alone:
        parts = {"all": alone} | parts
    names = list(dict.fromkeys(name for row in parts.values() for name in row))
    lines = [["", *(_METRICS.get(name, name) for name in names)], ["---", *("---:" for _ in names)]]
    lines += [[part, *(_number(row.get(name)) for name in names)] for part, row in parts.items()]
    return "Nats per token.\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else "" if value is None else str(value)


def _list(items: Any) -> str:
    if not items:
        return "Not recorded."
    return items if isinstance(items, str) else "\n".join(f"- {item}" for item in items)


def _recipe(recipe: Any) -> str:
    if not recipe:
        return "Not recorded."
    return f"```yaml\n{yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)}```"
