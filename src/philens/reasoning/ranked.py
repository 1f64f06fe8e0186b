"""Ranked answers as a table."""

from typing import Any

import pandas as pd

from philens.show.notebook import MOST_TEXTS, table_markup

# Of an answer, in characters.
_SHOWN = 200


class RankTable(pd.DataFrame):
    """The rows of `philens.rank`, which a notebook shows prompt by prompt; what is made of them is plain."""

    @property
    def _constructor(self) -> type[pd.DataFrame]:
        return pd.DataFrame

    def _repr_html_(self) -> str:
        others = [name for name in self.columns if name not in ("prompt", "rank", "text", "score", "tokens")]
        # What was added to it, then means; the text is what takes most place.
        added = [name for name in others if self[name].dtype.kind not in "iuf"]
        means = [name for name in others if str(name).endswith(("_mean", "_prefix"))]
        names = ["rank", *added, "score", *means, "tokens", "text"]
        names = [name for name in names if name in self.columns]
        groups = [*self.groupby("prompt", sort=False)]
        parts = [
            table_markup([*map(str, names)], group[names].map(_cell).to_numpy(), f"Prompt {prompt}")
            for prompt, group in groups[:MOST_TEXTS]
        ]
        more = len(groups) - len(parts)
        return "".join(parts) + (f"<div><i>{more:,} more prompts.</i></div>" if more else "")


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3f}"
    text = str(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]} …"
