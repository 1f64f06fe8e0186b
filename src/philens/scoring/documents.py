"""Phi, mtd and surprisal of every token of a batch of documents."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from philens.bases.facts import evaluating
from philens.lens import metrics
from philens.lens.losses import divergence
from philens.lens.model import PHiModel
from philens.lens.overflow import Overflow, check_overflow, overflow_error
from philens.support.errors import InputError
from philens.tasks.automata import Documents
from philens.tasks.packing import pad

_OF_PREDICTIONS = {"surprisal": metrics.surprisal, "entropy": metrics.entropy}


@dataclass(frozen=True)
class TokenTable:
    """Scores of the N tokens of n documents, in the order of `docs.tokens`.

    Attributes:
        docs: the documents.
        phi: (N,) PHi loss in nats, known once the token has been read; NaN where the layer is disabled.
            (N, n) of n `layers`.
        surprisal: (N,) negative log-probability of the token given those before it, in nats; NaN on a
            document's first token.
        document: (N,) index of the token's document.
        mtd: (N,) multiple-token divergence in nats; None without a shallow head.
        entropy: (N,) of the distribution before the token, in nats; NaN as surprisal.
    """

    docs: Documents
    phi: NDArray[np.float32]
    surprisal: NDArray[np.float32]
    document: NDArray[np.int64]
    mtd: NDArray[np.float32] | None = None
    entropy: NDArray[np.float32] | None = None


def score_documents(
    lens: PHiModel, docs: Documents, batch_size: int = 32, overflow: Overflow = "error"
) -> TokenTable:
    """Read documents, each by itself, and return phi and surprisal of their tokens.

    Args:
        lens: a model with a PHi layer; its mode (training or evaluation) is restored.
        docs: documents whose tokens are ids of the model.
        batch_size: documents read at once; documents of like length go together.
        overflow: as in `philens.score`.

    Raises:
        InputError: there is no document, or an empty one, or batch_size is below 1; or the model overflows.
    """
    check_overflow(overflow)
    if batch_size < 1:
        raise InputError(f"batch_size must be at least 1, not {batch_size}.")
    if not len(docs):
        raise InputError("There is nothing to score; give at least one document.")
    if (docs.lengths < 1).any():
        raise InputError("There is an empty document; every document needs at least one token.")
    surprisal, entropy = np.full((2, len(docs.tokens)), np.nan, np.float32)
    several = (len(lens.layers),) if isinstance(getattr(lens, "phi", None), nn.ModuleList) else ()
    phi = np.full((len(docs.tokens), *several), np.nan, np.float32)
    mtd = np.full(len(docs.tokens), np.nan, np.float32) if lens.enabled and lens.parts_of("mtd") else None
    device = next(lens.base.parameters()).device
    order = np.argsort(docs.lengths, kind="stable")
    with evaluating(lens):
        for first in range(0, len(order), batch_size):
            chosen = order[first : first + batch_size]
            rows = pad(docs.select(chosen))
            # Padding is on the right, where no token of a causal model sees it: there is no mask.
            real = rows["attention_mask"].flatten().nonzero()[:, 0]
            input_ids, places = rows["input_ids"].to(device), real.to(device)
            output = lens(input_ids, returns="states")
            place = np.concatenate([np.arange(*docs.offsets[number : number + 2]) for number in chosen])
            found = metrics.predictions(output, input_ids, places, _OF_PREDICTIONS)[0]
            surprisal[place], entropy[place] = (found[name].cpu().numpy() for name in _OF_PREDICTIONS)
            if output.phi is not None:
                phi[place] = output.phi.flatten(0, 1)[places].cpu().numpy()
            if mtd is not None and output.shallow is not None:
                mtd[place] = divergence(output, output.shallow(), places).cpu().numpy()
    document = np.repeat(np.arange(len(docs)), docs.lengths)
    table = TokenTable(docs, phi, surprisal, document, mtd, entropy)
    _treat_overflow(lens, table, overflow, batch_size)
    return table


def _treat_overflow(lens: PHiModel, table: TokenTable, overflow: Overflow, batch_size: int) -> None:
    """Raise an error where tokens with one before them have values that are not finite, or make those NaN."""
    names = ["surprisal", "entropy", *(["phi"] if lens.enabled and lens.layers else [])]
    names += [] if table.mtd is None else ["mtd"]
    columns = [getattr(table, name) for name in names]
    later = np.ones(len(table.surprisal), bool)
    later[table.docs.offsets[:-1]] = False
    lost = [~np.isfinite(values.T) & later for values in columns]
    for number in np.unique(table.document[np.vstack(lost).any(0)]).tolist():
        place = slice(*table.docs.offsets[number : number + 2])
        if batch_size > 1:  # what fills a batch may overflow, too, and spoil what comes before it
            alone = score_documents(lens, table.docs.select([number]), 1, "nan")
            for name, values in zip(names, columns, strict=True):
                values[place] = getattr(alone, name)
        elif overflow == "nan":
            for values, broken in zip(columns, lost, strict=True):
                values.T[broken] = np.nan
        broken = [~np.isfinite(values.T[..., place]) & later[place] for values in columns]
        if overflow == "error" and np.vstack(broken).any():
            ids = torch.from_numpy(table.docs.tokens[place].astype(np.int64))
            raise overflow_error(lens, ids, f"docs[{number}]")
