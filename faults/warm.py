"""What commands of philens import, imported once: in the server that forks the processes of `process.py`."""

import matplotlib
import torch

matplotlib.use("agg")

import pyarrow.parquet  # noqa: F401
from transformers import AutoTokenizer, LlamaForCausalLM  # noqa: F401

import philens.cli
import philens.reasoning.engines
import philens.scoring.score
import philens.show.plots
import philens.training.trainer  # noqa: F401

torch.set_num_threads(1)
