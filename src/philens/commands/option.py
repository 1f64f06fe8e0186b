"""Options that several commands have: their types, and what `--help` says of them."""

from pathlib import Path
from typing import Annotated, Any, Literal

# Models

Model = Annotated[
    str,
    "base model, a folder, GGUF file or Hub id, or a finished run; or smollm2, for which philens brings a "
    "layer.",
]
Revision = Annotated[str | None, "branch, tag or commit of the model on the Hub."]
Dtype = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"],
    "precision of the base model; auto is that of its files.",
]
TrustRemoteCode = Annotated[bool, "run Python code that comes with the model."]

# How texts are put and measured

ChatOption = Annotated[
    dict[str, Any] | None,
    "a variable of the chat template as KEY=VALUE, such as enable_thinking=false, the value as YAML; may be "
    "given several times.",
]
System = Annotated[str | None, "what the system says at the beginning of chats in which it says nothing."]
Bos = Annotated[
    bool,
    "put the tokenizer's BOS before what would begin without it; by default texts begin as the tokenizer has "
    "it, and chats as its template has it.",
]
MetricOption = Annotated[
    dict[str, Any] | None,
    "what metrics leave open, as KEY=VALUE: settled_at (0.5 bits), deep_from (0.85 of the blocks), group (32 "
    "tokens); may be given several times.",
]
Window = Annotated[int | None, "tokens read at once in longer texts; by default the model's context."]
BatchTokens = Annotated[int, "tokens in a batch."]
Tokens = Annotated[int, "tokens of each text that are read, from its beginning; 0 means all."]
Plain = Annotated[bool, "score texts alone, not as the assistant's reply to a user."]
Kl = Annotated[
    Literal["exact", "official"] | None,
    "formula that phi is measured with; by default the one it was trained with.",
]

# Problems

Problems = Annotated[str | None, "gsm8k, math, arithmetic, sums, a file or folder, or a data set on the Hub."]
Split = Annotated[str, "split of the problems."]
Limit = Annotated[int | None, "how many of them."]
Levels = Annotated[
    str | None,
    "levels of problems, and of solved ones in the prompt, as 1,2 or 2:7 (from, to before); where problems "
    "have none, how many steps. By default all.",
]
PromptName = Annotated[
    str | None,
    "how problems are put: gsm8k, math, arithmetic or sums (the problem alone), boxed, or a text file with "
    "the instruction; by default that of the data set, else boxed.",
]
Shots = Annotated[int, "solved training problems in the prompt."]

# Findings on formal languages

Scale = Annotated[Literal["smoke", "small", "paper"], "size of model and training."]
Architecture = Annotated[Literal["transformer", "lstm"], "architecture of the model."]
FormalOutput = Annotated[
    Path | None, "folder for runs and results; by default runs/reproduce-SCALE-ARCHITECTURE."
]
Run = Annotated[Path | None, "a finished run to measure instead of training."]
Seeds = Annotated[int, "how many models to train and measure."]
Quarter = Annotated[int | None, "a quarter of the documents measured."]
Controls = Annotated[
    str | None, "finished runs, separated by commas, whose phi stands beside that of untrained ones."
]

# Findings on reasoning

ReasoningScale = Annotated[
    Literal["smoke", "small", "paper"] | None,
    "smoke and small train a model on arithmetic, paper takes Llama 3.2 3B and MATH; by default small, and "
    "with a model paper.",
]
ReasoningModel = Annotated[str | None, "a base model, a folder or Hub id, or a finished run, instead."]
ReasoningAdapter = Annotated[
    str | None,
    "the PHi layer, a folder or Hub id, or the folder of a sweep; else the run's, or layers are trained.",
]
Layers = Annotated[
    str | None, "where layers to be trained go in, as 4,8,12 or 4:28:4 (from, to before, step)."
]
LayersRecipe = Annotated[str | None, "what they are trained by, a YAML file or name."]
By = Annotated[
    Literal["level", "steps"] | None, "what difficulty is; by default level where the problems have it."
]
MoreMetrics = Annotated[
    str | None,
    "others beside phi, surprisal, entropy and the controls, separated by commas: confidence, "
    "deep_thinking, ...",
]
ReasoningOutput = Annotated[
    Path | None, "folder for runs and results; by default runs/reasoning-SCALE or -MODEL."
]
