"""Commands about problems, solutions and candidate answers.

torch and transformers are imported inside the functions, so that help and errors come at once.
"""

from functools import partial
from pathlib import Path
from typing import Literal

from philens.commands import option
from philens.commands.show import console, say, tell
from philens.support.errors import ConfigError


def solve(
    model: option.Model = "smollm2",
    problems: option.Problems = None,
    samples: int = 8,
    output: Path | None = None,
    split: option.Split = "test",
    limit: option.Limit = None,
    levels: option.Levels = None,
    prompt: option.PromptName = None,
    shots: option.Shots = 0,
    temperature: float = 1.0,
    top_p: float = 1.0,
    max_new_tokens: int = 512,
    batch_size: int | None = None,
    engine: Literal["transformers", "vllm"] = "transformers",
    chat_option: option.ChatOption = None,
    system: option.System = None,
    bos: option.Bos = False,
    adapter: str | None = None,
    revision: option.Revision = None,
    dtype: option.Dtype = "auto",
    trust_remote_code: option.TrustRemoteCode = False,
    seed: int = 0,
) -> None:
    """Sample solutions of problems from a model and grade them; the same command goes on after a stop.

    Args:
        samples: solutions of each problem.
        output: folder for them; by default runs/solve-MODEL.
        temperature: temperature of sampling; 0 takes the likeliest tokens.
        top_p: draws among the likeliest tokens that together have this probability.
        max_new_tokens: most tokens of a solution.
        batch_size: solutions drawn at once.
        engine: vllm is faster on a GPU and needs philens[vllm].
        adapter: a PHi layer that is in the path while sampling, a folder or Hub id.
        seed: seed of the draw of problems and of sampling.
    """
    if problems is None:
        raise ConfigError("No problems were named; give --problems.")
    from philens.reasoning.problems import find_prompt, load_problems, parse_levels
    from philens.reasoning.sampling import solve
    from philens.training.source import ModelSource

    only = parse_levels(levels)
    chosen = load_problems(problems, split, limit, seed, only)
    solved = solve(
        ModelSource(model, adapter, revision, dtype, trust_remote_code),
        chosen,
        output or Path("runs") / f"solve-{Path(model).name}",
        prompt=find_prompt(problems, prompt, shots, seed, only),
        samples=samples,
        temperature=temperature,
        top_p=top_p,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        engine=engine,
        seed=seed,
        chat_options=chat_option,
        system=system,
        bos=bos,
    )
    say(f"{'Wrote' if solved.new else 'Already finished:'} {solved.path}: {solved}.")
    for level, rate in solved.levels.items():
        say(f"  level {level}: {rate:.1%} right")


def grade(
    problems: str, solutions: Path | None = None, split: str = "test", limit: int | None = None
) -> None:
    """Try the grader on the problems' own solutions, or on solutions that are marked right or wrong.

    Args:
        problems: gsm8k, math, arithmetic, sums, a file or folder, or a data set on the Hub.
        solutions: a file of marked ones.
        split: split of the problems.
        limit: how many of them.
    """
    from philens.reasoning.grading import marks_report, read_marked_solutions, reference_report
    from philens.reasoning.problems import load_problems
    from philens.reasoning.tables import marks_tables, reference_tables

    chosen = load_problems(problems, split, limit)
    if solutions is None:
        tables = reference_tables(reference_report(chosen))
    else:
        tables = marks_tables(marks_report(chosen, read_marked_solutions(solutions)))
    for table in tables:
        console().print(table)


def rank(
    candidates: Path,
    model: option.Model = "smollm2",
    adapter: str | None = None,
    rule: str = "highest_phi",
    prefix: int | None = None,
    prefix_rule: str | None = None,
    format: Literal["terminal", "jsonl", "csv"] = "terminal",
    output: Path | None = None,
    window: option.Window = None,
    batch_tokens: option.BatchTokens = 4096,
    metric_option: option.MetricOption = None,
    chat_option: option.ChatOption = None,
    system: option.System = None,
    bos: option.Bos = False,
    revision: option.Revision = None,
    dtype: option.Dtype = "auto",
    trust_remote_code: option.TrustRemoteCode = False,
) -> None:
    """Order candidate answers to each prompt by a rule.

    Args:
        candidates: JSON Lines, with prompt and candidates, or with prompt and response; docs/ranking.md says
            more.
        adapter: the PHi layer, a folder or Hub id.
        rule: highest_COLUMN or lowest_COLUMN, such as highest_phi, lowest_surprisal, highest_phi_max; or
            shortest.
        prefix: choose early: read so many tokens of each candidate first, and go on with the better half.
        prefix_rule: rule that says by these tokens which half is better; by default rule.
        format: form of what is shown or written.
        output: file for jsonl or csv.
    """
    from philens.lens.config import MetricOptions
    from philens.reasoning.ranking import rank_file
    from philens.tasks.rendering import Rendering
    from philens.training.opening import open_lens
    from philens.training.source import ModelSource

    source = ModelSource(model, adapter, revision, dtype, trust_remote_code)
    ranked = rank_file(
        candidates,
        partial(
            open_lens,
            source,
            Rendering(chat_option or {}, system, bos),
            MetricOptions.of(metric_option or {}),
        ),
        format,
        output,
        rule=rule,
        prefix=prefix,
        prefix_rule=prefix_rule,
        batch_tokens=batch_tokens,
        window=window,
    )
    if output is not None:
        say(f"Wrote {output}: {ranked}.")
    elif prefix is not None:
        tell(f"Ranked {ranked}.")
