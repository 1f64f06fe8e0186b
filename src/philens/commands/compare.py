"""`philens compare`: several instruments on the same texts."""

from pathlib import Path

from philens.commands import option
from philens.commands.show import console, say
from philens.support.typed import words


def compare(
    levels: Path | None = None,
    model: option.Model = "smollm2",
    adapter: str | None = None,
    metrics: str | None = None,
    output: Path | None = None,
    documents: int | None = None,
    tokens: option.Tokens = 384,
    plain: option.Plain = False,
    dtype: option.Dtype = "auto",
) -> None:
    """Read the same texts with several instruments in one model, and say how they differ and what they cost.

    Args:
        levels: a folder of texts by level, or of your own; by default texts that philens has, and of a run
            on formal languages documents of its tasks.
        adapter: PHi layers and shallow heads, folders or Hub ids separated by commas; by default the run's.
            own is the multi-token head that the model brings along.
        metrics: what is compared, separated by commas (docs/scoring.md says what each is); by default phi,
            mtd, settling_depth, surprisals and entropy.
        output: folder for results; by default runs/compare-MODEL.
        documents: texts of each level, at most; by default all, of formal tasks 100.
    """
    from philens.findings.compare_run import compare

    folder = output or Path("runs") / f"compare-{Path(model).name}"
    adapters, wanted = words(adapter), words(metrics) or None
    for table in compare(model, adapters, levels, wanted, folder, documents, tokens, plain, dtype).tables():
        console().print(table)
    say(f"Wrote {folder}.")
