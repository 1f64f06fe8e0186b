"""All that is known of a token before a number: phi, its controls, the prediction there, baselines."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from philens.lens.metrics import CONTROLS
from philens.reasoning.solutions import after_prompt, joining
from philens.support.columns import Column
from philens.support.errors import InputError
from philens.tasks.results import KINDS, MarkedText, Question, mark_answer

if TYPE_CHECKING:
    import pandas as pd

    from philens.lens.model import PHiModel
    from philens.scoring.scores import TokenScores

# About the prediction of a token: taken of the place's own and, as NAME_next, of the next, the number's
# first.
_OF_PREDICTION = ("surprisal", "surprisal_with_layer", "entropy", "margin")
_OF_BASE = ("surprisal", "entropy", "margin", "settling_depth")
_OF_LAYER = ("phi", "surprisal_with_layer", "logit_lens_divergence", "step_length", *CONTROLS)
# Tokens that a model may write after a question: a space and three digits in bytes, and one more.
_REPLY_TOKENS, _ROWS = 5, 64


def place_before(offsets: NDArray[np.int64], character: int) -> int | None:
    """The token before the one that has this character; None if that is the first or there is none.

    Args:
        offsets: (T, 2) each token's characters, end not included.
    """
    starts, ends = offsets.T
    found = np.flatnonzero((starts <= character) & (character < ends))
    return int(found[0]) - 1 if len(found) and found[0] > 0 else None


def written(lens: "PHiModel", tokenizer: Any, questions: Sequence[Question]) -> list[MarkedText]:
    """The questions with what the base writes after them, always the likeliest token, up to a number's end.

    Left out are replies that do not begin with a number, and texts that the tokenizer would make other tokens
    of than the model wrote.
    """
    import torch

    from philens.bases.facts import evaluating
    from philens.lens.cache import new_cache
    from philens.scoring.texts import tokenize_all

    prompts = tokenize_all(
        tokenizer, [question.text for question in questions], ["a question"] * len(questions)
    )
    by_length: dict[int, list[int]] = {}
    for number, prompt in enumerate(prompts):
        by_length.setdefault(len(prompt.token_ids), []).append(number)
    batches = [rows[k : k + _ROWS] for rows in by_length.values() for k in range(0, len(rows), _ROWS)]
    device = next(lens.base.parameters()).device
    replies: dict[int, tuple[list[int], MarkedText]] = {}
    with evaluating(lens), lens.disabled():
        for rows in batches:
            read = ids = torch.from_numpy(np.stack([prompts[row].token_ids for row in rows])).to(device)
            try:
                cache = new_cache(lens.base)
            except InputError:  # a base without the usual kind of cache reads everything again
                cache = None
            for _ in range(_REPLY_TOKENS):
                output = lens(read, cache=cache, returns="states")
                likeliest = output.logits_at(slice(read.shape[1] - 1, None)).argmax(-1)
                ids = torch.cat((ids, likeliest), 1)
                read = ids if cache is None else likeliest
            for row, written_ids in zip(rows, ids.tolist(), strict=True):
                reply = tokenizer.decode(
                    written_ids[len(prompts[row].token_ids) :], clean_up_tokenization_spaces=False
                )
                if (marked := mark_answer(questions[row], reply)) is not None:
                    replies[row] = written_ids, marked
    chosen = [replies[row] for row in sorted(replies)]
    texts = [marked.text for _, marked in chosen]
    again = tokenize_all(tokenizer, texts, ["a reply"] * len(texts)) if texts else []
    return [
        marked
        for (ids, marked), tokens in zip(chosen, again, strict=True)
        if ids[: len(tokens.token_ids)] == tokens.token_ids.tolist()
    ]


def score_places(
    lens: "PHiModel",
    tokenizer: Any,
    texts: Sequence[MarkedText],
    base_of: "pd.DataFrame | None" = None,
    quick: bool = False,
) -> "dict[str, pd.DataFrame]":
    """The places of texts with all that is known of them: a table for each insertion point of the lens.

    A row is a place: text, kind, role, detail, template, held_out, number, token (its text), position (in
    tokens) and the measures, NAME_next being of the prediction of the number's first token.

    Args:
        lens: a model with PHi layers.
        tokenizer: its tokenizer.
        texts: texts with places.
        base_of: such a table of the same texts in the same base, whose columns of the base are taken over.
        quick: without the baselines that run the output head once more, or for every block.

    Raises:
        InputError: what `philens.score` raises.
    """
    import pandas as pd

    from philens.scoring.score import iter_scores
    from philens.support.progress import shown

    contents, starts = [], []
    for text in texts:
        reply = text.text if not text.chat or tokenizer.chat_template else f" {text.text}"
        content, start = after_prompt(tokenizer, text.chat or "", reply) if text.chat else (reply, 0)
        contents.append(content)
        starts.append(start + len(reply) - len(text.text))
    metrics = _metrics(lens, base_of is None, quick)
    names = [text.name for text in texts]
    reader = joining(tokenizer)
    scored = iter_scores(lens, reader, contents, metrics=metrics, names=names)
    rows: list[dict[str, Any]] = []
    for text, start, scores in shown(zip(texts, starts, scored, strict=True), "scoring", len(texts)):
        rows += _rows(text, start, scores)
    table = pd.DataFrame(rows)
    if base_of is not None:
        for name in base_of:
            if name.removesuffix("_next") in _OF_BASE:
                table[name] = base_of[name].to_numpy()
    # What is of no point comes first.
    columns = sorted((Column(str(name)) for name in table), key=lambda column: column.point is not None)

    def of_point(point: str | None) -> pd.DataFrame:
        names = [column for column in columns if column.point in (None, point)]
        return table.filter(items=names).set_axis([name.metric for name in names], axis=1)

    points = zip(lens.module_paths, lens.column_points, strict=False)
    return {path: of_point(point) for path, point in points}


def _metrics(lens: "PHiModel", with_base: bool, quick: bool) -> list[str]:
    """Those that this lens has, or of them those that cost little."""
    wanted, supported = [*_OF_LAYER, *(_OF_BASE if with_base else ())], lens.supports()
    left_out = {"logit_lens_divergence", "settling_depth"} if quick else set()
    return [name for name in wanted if supported[name] is None and name not in left_out]


def _rows(text: MarkedText, start: int, scores: "TokenScores") -> Iterator[dict[str, Any]]:
    pieces = scores.pieces()
    for place in text.places:
        at = place_before(scores.offsets, start + place.start)
        if at is None:
            continue
        row: dict[str, Any] = {
            "text": text.name,
            "kind": place.kind,
            "role": KINDS[place.kind],
            "detail": place.detail,
            "template": text.template,
            "held_out": text.held_out,
            "number": text.text[place.start : place.end],
            "token": pieces[at],
            "position": at,
        }
        for name, values in scores.columns.items():
            row[name] = float(values[at])
            if name in _OF_PREDICTION:
                row[f"{name}_next"] = float(values[at + 1])
        yield row
