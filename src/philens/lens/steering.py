"""Divergence steering: to draw less, or more, of what a shallow head foretells.

Source: arXiv 2512.22944. Shapes: B rows, V vocabulary.
"""

import torch
from torch import Tensor
from transformers import LogitsProcessor

from philens.lens.calls import Call
from philens.lens.core import LensCore
from philens.lens.instrument import titles
from philens.support.errors import InputError

# As `transformers` draws where nobody says otherwise.
TOP_K = 50
# Bisections of ln T between -BOUND and BOUND; halved so often, doubles end.
BOUND, HALVINGS = 30.0, 60


def steered(own: Tensor, shallow: Tensor, alpha: float, top_k: int = TOP_K) -> Tensor:
    """(B, V) log-probabilities, float32, on the great circle through sqrt(p) and sqrt(m).

    p is the model's distribution and m the shallow head's, both of the model's `top_k` likeliest tokens. The
    point is p at alpha 0, m at 1, and beyond p below 0, where components under zero become zero; it is
    squared, and its temperature is such that its entropy is that of p, or as near to it as what is left of
    the tokens allows. Tokens of no probability have -inf.

    Args:
        own: (B, V) logits of the model; -inf on tokens that may not come.
        shallow: (B, V) those of the head.
        top_k: 0 means all.
    """
    own, shallow = own.double(), shallow.double()
    best, places = own.topk(min(top_k or own.shape[-1], own.shape[-1]), -1)
    p = best.softmax(-1)
    m = shallow.gather(-1, places).masked_fill(best.isneginf(), -torch.inf).softmax(-1)
    theta = (p * m).sqrt().sum(-1, keepdim=True).clamp(max=1).arccos()
    # Where both are the same there is no circle, and nowhere to go.
    beside, along = ((1 - alpha) * theta).sin(), (alpha * theta).sin()
    point = (beside * p.sqrt() + along * m.sqrt()).clamp(min=0)
    point = torch.where(theta > 0, point, p.sqrt())
    logits = _with_entropy(2 * point.log(), torch.special.entr(p).sum(-1, keepdim=True))
    return torch.full_like(own, -torch.inf).scatter(-1, places, logits.log_softmax(-1)).float()


def _with_entropy(logits: Tensor, wanted: Tensor) -> Tensor:
    """Logits (B, K) divided by the temperature at which the entropies of their distributions are `wanted`
    (B, 1); it grows with temperature."""
    low, high = torch.full_like(wanted, -BOUND), torch.full_like(wanted, BOUND)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        found = torch.special.entr((logits / middle.exp()).softmax(-1)).sum(-1, keepdim=True)
        low, high = torch.where(found < wanted, middle, low), torch.where(found < wanted, high, middle)
    return logits / high.exp()


class Steering(LogitsProcessor):
    """Steers what `transformers` draws from; temperature and top-p come after it.

    Args:
        top_k: number of the model's likeliest tokens; 0 means all, None as many as `transformers` takes.

    Raises:
        InputError: there is no such head, or no such place.
    """

    def __init__(self, lens: LensCore, alpha: float, top_k: int | None) -> None:
        if not -1 <= alpha <= 1:
            raise InputError(f"steer must be from -1 to 1, not {alpha!r}.")
        if not lens.parts_of("mtd"):
            raise InputError(
                f"Steering needs a shallow head, and this model has a {titles(lens.configs)} alone; leave "
                "out steer, or attach MTDConfig."
            )
        if not lens.enabled:
            raise InputError("Steering needs the shallow head, which is disabled; enable() it first.")
        self.alpha, self.top_k = alpha, TOP_K if top_k is None else top_k
        self.call: Call | None = None

    def hear(self, call: Call) -> None:
        """Remember what the base has just read."""
        self.call = call

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        call = self.call
        if call is None or call.earlier + call.input_ids.shape[1] != input_ids.shape[1]:
            raise InputError(
                "Steering needs a model that reads rows token by token, with a cache of the usual kind or "
                "none, and no assistance; leave out steer."
            )
        assert call.shallow is not None
        last = slice(call.input_ids.shape[1] - 1, None)
        return steered(scores, call.shallow.logits_at(last)[:, 0], self.alpha, self.top_k).to(scores.dtype)
