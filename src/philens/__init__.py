"""philens: see where a sequence model is thinking hard."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from philens.support.versions import __version__ as __version__

# Names are imported where they are first used, so that `philens --help` does not wait for torch.
_HOME = {
    "PHiConfig": "lens.config",
    "PHiLayer": "lens.layer",
    "PHiModel": "lens.model",
    "attach": "lens.model",
    "load": "lens.model",
    "load_pretrained": "bases.hub",
    "load_lens": "training.opening",
    "score": "scoring.score",
    "iter_scores": "scoring.score",
    "TokenScores": "scoring.scores",
    "rank": "reasoning.ranking",
    "PHiReward": "reasoning.reward",
    "load_run": "training.opening",
    "SHIPPED": "training.opening",
    "score_documents": "scoring.documents",
    "LSTMConfig": "bases.lstm",
    "LSTMForCausalLM": "bases.lstm",
    "character_tokenizer": "bases.tokenizer",
    "PhilensError": "support.errors",
}

__all__ = ["__version__", *sorted(_HOME)]  # pyright: ignore[reportUnsupportedDunderAll]

if TYPE_CHECKING:
    from philens.bases.hub import load_pretrained as load_pretrained
    from philens.bases.lstm import LSTMConfig as LSTMConfig
    from philens.bases.lstm import LSTMForCausalLM as LSTMForCausalLM
    from philens.bases.tokenizer import character_tokenizer as character_tokenizer
    from philens.lens.config import PHiConfig as PHiConfig
    from philens.lens.layer import PHiLayer as PHiLayer
    from philens.lens.model import PHiModel as PHiModel
    from philens.lens.model import attach as attach
    from philens.lens.model import load as load
    from philens.reasoning.ranking import rank as rank
    from philens.reasoning.reward import PHiReward as PHiReward
    from philens.scoring.documents import score_documents as score_documents
    from philens.scoring.score import iter_scores as iter_scores
    from philens.scoring.score import score as score
    from philens.scoring.scores import TokenScores as TokenScores
    from philens.support.errors import PhilensError as PhilensError
    from philens.training.opening import SHIPPED as SHIPPED
    from philens.training.opening import load_lens as load_lens
    from philens.training.opening import load_run as load_run


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"philens.{_HOME[name]}"), name)
    raise AttributeError(f"module 'philens' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
