"""philens: see where a sequence model is thinking hard."""

import sys
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

from philens.support.versions import __version__ as __version__

# Names are imported where they are first used, so that `philens --help` does not wait for torch.
_HOME = {
    "PHiConfig": "lens.config",
    "MTDConfig": "lens.config",
    "MetricOptions": "lens.config",
    "PHiLayer": "lens.layer",
    "MTDHead": "lens.mtd",
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

# Modules by the names that they had before there were rooms; each is the same module under both.
_MOVED = {
    "errors": "support.errors",
    "hub": "bases.hub",
    "lstm": "bases.lstm",
    "tokenizer": "bases.tokenizer",
    "generation": "lens.generation",
    "layer": "lens.layer",
    "model": "lens.model",
    "scoring.solutions": "reasoning.solutions",
    "scoring.solve": "reasoning.sampling",
    "tasks.grading": "reasoning.grading",
    "tasks.problems": "reasoning.problems",
}

__all__ = ["__version__", *sorted(_HOME)]  # pyright: ignore[reportUnsupportedDunderAll]

if TYPE_CHECKING:
    from philens.bases.hub import load_pretrained as load_pretrained
    from philens.bases.lstm import LSTMConfig as LSTMConfig
    from philens.bases.lstm import LSTMForCausalLM as LSTMForCausalLM
    from philens.bases.tokenizer import character_tokenizer as character_tokenizer
    from philens.lens.config import MetricOptions as MetricOptions
    from philens.lens.config import MTDConfig as MTDConfig
    from philens.lens.config import PHiConfig as PHiConfig
    from philens.lens.layer import PHiLayer as PHiLayer
    from philens.lens.model import PHiModel as PHiModel
    from philens.lens.model import attach as attach
    from philens.lens.model import load as load
    from philens.lens.mtd import MTDHead as MTDHead
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


class _Moved(MetaPathFinder, Loader):
    """Finds modules of `_MOVED` where they are now, when nothing else has found them."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        package, _, name = fullname.partition(".")
        return ModuleSpec(fullname, self) if package == __name__ and name in _MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        new = _MOVED[module.__name__.partition(".")[2]]
        sys.modules[module.__name__] = import_module(f"{__name__}.{new}")


sys.meta_path.append(_Moved())


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"philens.{_HOME[name]}"), name)
    raise AttributeError(f"module 'philens' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
