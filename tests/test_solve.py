"""Sampling solutions: what is drawn, logged, cut and graded; stops; and solutions from elsewhere."""

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from transformers import LlamaModel

import philens
from conftest import make_gpt2, make_llama
from philens.bases.lstm import LSTMConfig, LSTMForCausalLM
from philens.bases.tokenizer import byte_tokenizer
from philens.lens.prior import Prior
from philens.reasoning.engines import TransformersEngine
from philens.reasoning.problems import PLAIN_STOP, plain_text
from philens.reasoning.sampling import prompt_ids, read_solutions, solve
from philens.reasoning.solutions import Solution
from philens.scoring.texts import tokenize
from philens.support.errors import AdapterError, ConfigError, InputError, OutputError
from philens.tasks.chat import encode_chat
from philens.tasks.problem import Problem, Prompt, messages
from philens.training.source import ModelSource

# As Llama 3's: a system's message with the date, contents trimmed.
LLAMA_TEMPLATE = """\
{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: " + date_string + "\\n\\n<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim }}
    {{- '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
PROBLEMS = [
    Problem("a", "1 + 1?", "2", level=1, kind="number"),
    Problem("b", "What is two and two, if not five?", "4", level=2, steps=1, kind="number"),
    Problem("c", "2 + 3?", "5", level=1, kind="number"),
    Problem("d", "How much is it?", "7", kind="number"),
]
PROMPT = Prompt("Solve.")
VOCABULARY = len(byte_tokenizer())
# About one draw in twelve ends a reply.
ENDS = [2, *range(100, 120)]


def make_lstm(**options: Any) -> LSTMForCausalLM:
    torch.manual_seed(0)
    config = LSTMConfig(hidden_size=32, intermediate_size=32, initializer_range=0.2, **options)
    return LSTMForCausalLM(config).eval()


def save(folder: Path, base: Any, tokenizer: Any = None, **settings: Any) -> str:
    base.generation_config.update(**{"eos_token_id": ENDS} | settings)
    base.save_pretrained(folder)
    (tokenizer or byte_tokenizer()).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save(tmp_path_factory.mktemp("model"), make_llama(vocab_size=VOCABULARY))


@pytest.fixture
def solved(model: str, tmp_path: Path) -> Any:
    """The solutions that the model writes."""
    count = 0

    def solved(
        model: str | ModelSource = model, problems: Any = PROBLEMS, prompt: Prompt = PROMPT, **options: Any
    ) -> list[Solution]:
        nonlocal count
        count += 1
        folder = tmp_path / f"out{count}"
        solve(model, problems, folder, prompt=prompt, **{"samples": 4, "max_new_tokens": 20} | options)
        return read_solutions(folder, problems)

    return solved


def expected(forward: Any, tokenizer: Any, solution: Solution) -> list[float]:
    """Log-probabilities of a solution's tokens by one forward pass without cache and padding."""
    prompt = prompt_ids(tokenizer, messages(problem_of(solution), PROMPT))
    ids = torch.tensor([prompt + tokens_of(solution)])
    with torch.no_grad():
        logits = forward(ids).logits[0, len(prompt) - 1 : -1]
    return logits.float().log_softmax(-1).gather(1, ids[0, len(prompt) :, None])[:, 0].tolist()


def problem_of(solution: Solution) -> Problem:
    return next(problem for problem in PROBLEMS if problem.id == solution.problem_id)


def tokens_of(solution: Solution) -> list[int]:
    assert solution.token_ids is not None
    return solution.token_ids


# The prompt.


def llama_tokenizer() -> Any:
    tokenizer = byte_tokenizer()
    names = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": names})
    tokenizer.eos_token, tokenizer.chat_template = "<|eot_id|>", LLAMA_TEMPLATE
    return tokenizer


@pytest.mark.parametrize("make", [byte_tokenizer, llama_tokenizer])
def test_the_prompt_is_read_as_the_finished_chat_begins(make: Any) -> None:
    tokenizer = make()
    shot = Problem("s", "0 + 1?", "1", "It is 1.")
    chat = messages(PROBLEMS[1], Prompt("Solve.", (shot,)))
    prompt = prompt_ids(tokenizer, chat)
    reply = tokenizer("It is 4.", add_special_tokens=False).input_ids
    finished = [*chat, {"role": "assistant", "content": "It is 4."}]
    ids, counted = encode_chat(tokenizer, finished)
    whole = [*prompt, *reply, tokenizer.eos_token_id]
    assert ids.tolist() == whole  # what training reads
    # Training counts the shot's reply too; the last one begins where the prompt ends.
    assert counted[len(prompt) :].all()
    assert not counted[len(prompt) - 1]
    if make is byte_tokenizer:
        assert tokenize(tokenizer, finished, "it").token_ids.tolist() == whole
    assert prompt.count(tokenizer.bos_token_id) == 1


def test_without_a_template_the_prompt_is_plain_text() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    tokenizer.backend_tokenizer.enable_truncation(5)
    chat = messages(PROBLEMS[0], PROMPT)
    prompt = prompt_ids(tokenizer, chat)
    assert tokenizer.backend_tokenizer.truncation["max_length"] == 5, "the user's tokenizer stays as it was"
    assert tokenizer.decode(prompt) == "<|begin|>" + plain_text(chat)
    whole = tokenize(tokenizer, plain_text(chat) + " 2", "it").token_ids.tolist()
    assert whole[: len(prompt)] == prompt


def test_a_template_that_refuses_is_named() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no users') }}"
    with pytest.raises(InputError, match="no users"):
        prompt_ids(tokenizer, messages(PROBLEMS[0], PROMPT))


# What is drawn.


@pytest.mark.parametrize("make", [make_llama, make_gpt2, make_lstm])
def test_tokens_and_their_logs(make: Any, tmp_path: Path, solved: Any) -> None:
    base = make(vocab_size=VOCABULARY)
    folder, tokenizer = save(tmp_path / "model", base), byte_tokenizer()
    # More rows than are read to the end together: those that ended leave the batch, and the cache.
    found = solved(folder, samples=6, temperature=0.7, top_p=0.9)
    assert [(one.problem_id, one.sample) for one in found] == [(p.id, k) for p in PROBLEMS for k in range(6)]
    for one in found:
        ids = tokens_of(one)
        assert one.tokens == len(ids) <= 20
        assert not set(ids) & set(ENDS)
        assert one.finished == (len(ids) < 20)
        assert one.solution == tokenizer.decode(ids, skip_special_tokens=True)
        assert one.logprobs == pytest.approx(expected(base, tokenizer, one), abs=1e-4)
        assert one.reference == problem_of(one).answer
    assert {one.finished for one in found} == {False, True}
    assert len({tuple(tokens_of(one)) for one in found}) > 20


def test_greedy_solutions_do_not_depend_on_the_batch(model: str, solved: Any) -> None:
    problems = [Problem(str(n), "x" * (n % 7) + str(n), str(n), kind="number") for n in range(12)]
    found = [
        solved(problems=problems, samples=1, temperature=0, batch_size=size, max_new_tokens=25)
        for size in (1, 3, 12)
    ]
    assert len({one.tokens for one in found[0]}) > 3, "rows that end at different times"
    assert [one.token_ids for one in found[0]] == [one.token_ids for one in found[1]]
    assert [one.token_ids for one in found[0]] == [one.token_ids for one in found[2]]
    for one, other in zip(found[0], found[2], strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)
    base = philens.bases.hub.load_pretrained(model, tokenizer=False)[0]
    prompt = torch.tensor([prompt_ids(byte_tokenizer(), messages(problems[3], PROMPT))])
    likeliest = base.generate(prompt, max_new_tokens=25, do_sample=False)[0, prompt.shape[1] :].tolist()
    count = next((n for n, token in enumerate(likeliest) if token in ENDS), 25)
    assert tokens_of(found[0][3]) == likeliest[:count]


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_draws_follow_the_model(model: str, solved: Any, temperature: float) -> None:
    """First tokens of many samples against their probabilities, ends among them; chi-squared."""
    found = solved(problems=PROBLEMS[:1], samples=3000, temperature=temperature, max_new_tokens=1)
    base = philens.bases.hub.load_pretrained(model, tokenizer=False)[0]
    prompt = torch.tensor([prompt_ids(byte_tokenizer(), messages(PROBLEMS[0], PROMPT))])
    with torch.no_grad():
        chances = (base(prompt).logits[0, -1] / temperature).softmax(-1).double().numpy()
    counts = np.bincount([tokens_of(one)[0] for one in found if one.tokens], minlength=VOCABULARY)
    ended = sum(one.tokens == 0 for one in found)
    chances = np.append(np.delete(chances, ENDS), chances[ENDS].sum())
    counts = np.append(np.delete(counts, ENDS), ended)
    common = chances > 5 / 3000
    observed = np.append(counts[common], counts[~common].sum())
    wanted = 3000 * np.append(chances[common], chances[~common].sum())
    assert common.sum() > 10
    assert stats.chisquare(observed, wanted * observed.sum() / wanted.sum()).pvalue > 1e-3


def test_seeds(solved: Any) -> None:
    first, again, other = (solved(seed=seed, batch_size=5) for seed in (0, 0, 1))
    assert first == again
    shared = sum(a.token_ids == b.token_ids for a, b in zip(first, other, strict=True))
    assert shared <= 2
    state = torch.random.get_rng_state()
    solved()
    assert torch.equal(torch.random.get_rng_state(), state), "the user's random numbers stay as they were"


def test_the_models_own_generation_settings(model: str, tmp_path: Path, solved: Any) -> None:
    """They change nothing, are named, and are there afterwards."""
    base = make_llama(vocab_size=VOCABULARY)
    settings = {"top_k": 1, "repetition_penalty": 5.0, "suppress_tokens": [50], "max_length": 7}
    folder = save(tmp_path / "other", base, do_sample=True, **settings)
    assert [one.token_ids for one in solved(folder)] == [one.token_ids for one in solved()]
    solve(folder, PROBLEMS, tmp_path / "x", prompt=PROMPT, samples=1, max_new_tokens=2)
    record = json.loads((tmp_path / "x" / "solve.json").read_text())
    assert record["origin"]["generation_settings_not_used"] == settings
    assert record["origin"]["ends"] == ENDS
    engine = TransformersEngine(ModelSource(folder), 1.0, 1.0)
    before = engine.base.generation_config.to_dict()
    engine.draw([[1, 2]], [3], 0)
    assert engine.base.generation_config.to_dict() == before
    assert before["top_k"] == 1


def test_the_context_ends_a_solution(tmp_path: Path, solved: Any) -> None:
    """Whatever it is batched with; GPT-2 has no position beyond it."""
    base = make_gpt2(vocab_size=VOCABULARY, n_positions=60)
    folder = save(tmp_path / "model", base, eos_token_id=None)
    lengths = [len(prompt_ids(byte_tokenizer(), messages(problem, PROMPT))) for problem in PROBLEMS]
    for one in solved(folder, max_new_tokens=50, samples=2):
        length = lengths[PROBLEMS.index(problem_of(one))]
        assert one.finished or one.tokens == min(50, 60 - length)
        assert one.logprobs == pytest.approx(expected(base, byte_tokenizer(), one), abs=1e-4)
    with pytest.raises(InputError, match="prompt of problem long has 88 tokens and the model reads 60"):
        solved(folder, problems=[*PROBLEMS, Problem("long", "x" * 76, "1")])


def test_a_layer_is_in_the_path(tmp_path: Path, solved: Any) -> None:
    base, tokenizer = make_llama(vocab_size=VOCABULARY), byte_tokenizer()
    base.generation_config.eos_token_id = ENDS
    lens = philens.attach(base, philens.PHiConfig(layer=1, prior_heads=2)).eval()
    with torch.no_grad():  # a fresh layer changes little
        for parameter in lens.phi.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    save(tmp_path / "run" / "model", base, tokenizer)
    lens.save_pretrained(tmp_path / "run" / "adapter")
    named = solved(ModelSource(str(tmp_path / "run" / "model"), str(tmp_path / "run" / "adapter")))
    for one in named:
        assert one.logprobs == pytest.approx(expected(lens, tokenizer, one), abs=1e-4)
    # A run folder brings its layer; its model folder is the base alone.
    assert solved(str(tmp_path / "run")) == named
    with lens.disabled():
        for one in solved(str(tmp_path / "run" / "model")):
            assert one.logprobs == pytest.approx(expected(lens, tokenizer, one), abs=1e-4)
        for one in named:
            if one.tokens:
                assert one.logprobs != pytest.approx(expected(lens, tokenizer, one), abs=0.1)
    with pytest.raises(AdapterError):
        solved(str(tmp_path / "nothing"))


def test_prompts_are_read_once_and_nothing_is_measured(
    tmp_path: Path, solved: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_llama(vocab_size=VOCABULARY)
    folder = save(tmp_path / "model", base)
    torch.manual_seed(1)
    for mode in ("bottleneck", "observe"):
        philens.attach(base, philens.PHiConfig(layer=1, mode=mode)).save_pretrained(tmp_path / mode)
    monkeypatch.setattr(Prior, "forward", lambda *_: pytest.fail("a prior predicts while sampling"))
    tokens = 0
    plain = LlamaModel.forward

    def forward(self: Any, input_ids: Any = None, **options: Any) -> Any:
        nonlocal tokens
        tokens += input_ids.numel()
        return plain(self, input_ids=input_ids, **options)

    monkeypatch.setattr(LlamaModel, "forward", forward)
    lengths = [len(prompt_ids(byte_tokenizer(), messages(problem, PROMPT))) for problem in PROBLEMS]
    for adapter in (None, str(tmp_path / "bottleneck"), str(tmp_path / "observe")):
        tokens = 0
        solutions = solved(ModelSource(folder, adapter), samples=6, max_new_tokens=1)
        assert len(solutions) == 24
        # The last token of each prompt is where rows part; padding is read too.
        assert tokens == 4 * (max(lengths) - 1) + 24


def test_predictions_that_are_no_numbers(tmp_path: Path, solved: Any) -> None:
    base = make_llama(vocab_size=VOCABULARY)
    with torch.no_grad():
        base.model.norm.weight[0] = torch.nan
    with pytest.raises(InputError, match=r"A solution makes .* in float32, from the output head on"):
        solved(save(tmp_path / "model", base))


def learned(folder: Path, tokenizer: Any, prompt: list[int], reply: str) -> str:
    """A model that has learned one text by heart."""
    base = make_llama(vocab_size=VOCABULARY).train()
    ids = torch.tensor([prompt + tokenizer(reply, add_special_tokens=False).input_ids])
    optimizer = torch.optim.AdamW(base.parameters(), lr=3e-3)
    for _ in range(150):
        loss = base(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05
    return save(folder, base, tokenizer, eos_token_id=None)


def test_solutions_are_graded(tmp_path: Path, solved: Any) -> None:
    tokenizer = byte_tokenizer()
    prompt = prompt_ids(tokenizer, messages(PROBLEMS[0], PROMPT))
    folder = learned(tmp_path / "model", tokenizer, prompt, "1 + 1 = 2\n#### 2<|end|><|user|>3 + 3?")
    (one,) = solved(folder, problems=PROBLEMS[:1], samples=1, temperature=0, max_new_tokens=30)
    assert (one.solution, one.answer, one.correct, one.finished) == ("1 + 1 = 2\n#### 2", "2", True, True)
    wrong = Problem("a", "1 + 1?", "3", kind="number")
    (one,) = solved(folder, problems=[wrong], samples=1, temperature=0, max_new_tokens=30)
    assert (one.answer, one.correct) == ("2", False)


def test_plain_text_ends_before_the_next_question(tmp_path: Path, solved: Any) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    prompt = prompt_ids(tokenizer, messages(PROBLEMS[0], PROMPT))
    folder = learned(tmp_path / "model", tokenizer, prompt, f" 1 + 1 = 2{PLAIN_STOP} 3 + 3?")
    (one,) = solved(folder, problems=PROBLEMS[:1], samples=1, temperature=0, max_new_tokens=25)
    assert (one.solution, one.answer, one.correct, one.finished) == (" 1 + 1 = 2", "2", True, True)
    assert tokenizer.decode(tokens_of(one)) == one.solution
    (one,) = solved(folder, problems=PROBLEMS[:1], samples=1, temperature=0, max_new_tokens=9)
    assert (one.solution, one.finished) == (" 1 + 1 = ", False)


# The folder.


def files(folder: Path) -> dict[str, bytes]:
    """All files but the lock."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def test_the_summary(model: str, tmp_path: Path) -> None:
    result = solve(model, PROBLEMS, tmp_path / "x", prompt=PROMPT, samples=3, max_new_tokens=8)
    found = read_solutions(tmp_path / "x", PROBLEMS)
    assert result.path == tmp_path / "x" / "solutions.jsonl"
    assert (result.problems, result.solutions, result.new) == (4, 12, True)
    assert result.tokens == sum(one.tokens or 0 for one in found)
    assert result.cut_off == sum(not one.finished for one in found) > 0
    assert result.unparsed == sum(one.answer is None for one in found) > 0
    assert result.levels.keys() == {"1", "2"}
    assert str(result).startswith(f"12 solutions of 4 problems with {result.tokens} tokens, ")
    assert files(tmp_path / "x").keys() == {"solutions.jsonl", "solve.json"}
    record = json.loads((tmp_path / "x" / "solve.json").read_text())
    assert record["settings"]["seed"] == 0
    assert record["prompt"]["example"] == "<|begin|><|user|>Solve.\n\n1 + 1?<|end|><|assistant|>"
    assert record["versions"]["torch"] == torch.__version__


def test_finished_is_finished(model: str, tmp_path: Path) -> None:
    options = {"prompt": PROMPT, "samples": 2, "max_new_tokens": 4}
    first = solve(model, PROBLEMS, tmp_path / "x", **options)
    before = files(tmp_path / "x")
    second = solve(model, PROBLEMS, tmp_path / "x", **options)
    assert (second.new, second.solutions, second.levels) == (False, first.solutions, first.levels)
    assert files(tmp_path / "x") == before


def test_half_written_files_go_on(model: str, tmp_path: Path) -> None:
    options = {"prompt": PROMPT, "samples": 4, "max_new_tokens": 6, "batch_size": 3}
    solve(model, PROBLEMS, tmp_path / "x", **options)
    wanted, counts = files(tmp_path / "x"), {}
    record = json.loads(wanted["solve.json"])
    lines = wanted["solutions.jsonl"].splitlines(keepends=True)
    # In the order of the batches: the longest prompt first.
    drawn = b"".join(lines[4:8] + lines[12:16] + lines[:4] + lines[8:12])
    for cut in (0, 1, len(lines[4]), len(drawn) // 2, len(drawn) - 1, len(drawn)):
        folder = tmp_path / f"cut{cut}"
        folder.mkdir()
        (folder / "solve.json").write_text(json.dumps(record | {"counts": counts}))
        (folder / "solutions.part.jsonl").write_bytes(drawn[:cut])
        (folder / ".solutions.jsonl.17.tmp").write_bytes(b"what a killed process left")
        assert solve(model, PROBLEMS, folder, **options).new
        assert files(folder) == wanted
    # Killed between the last two steps.
    (tmp_path / "x" / "solutions.part.jsonl").write_bytes(drawn)
    assert not solve(model, PROBLEMS, tmp_path / "x", **options).new
    assert files(tmp_path / "x") == wanted


def test_other_settings_are_refused(model: str, tmp_path: Path) -> None:
    def again(problems: Any = PROBLEMS, model: str | ModelSource = model, **options: Any) -> Any:
        base = {"prompt": PROMPT, "samples": 2, "max_new_tokens": 4}
        return solve(model, problems, tmp_path / "x", **base | options)

    again()
    changes = {
        "seed": 1,
        "samples": 3,
        "temperature": 0.5,
        "top_p": 0.9,
        "batch_size": 7,
    }
    for name, value in changes.items():
        with pytest.raises(
            OutputError, match=f"begun with another {name.replace('_', ' ')} .*choose another"
        ):
            again(**{name: value})
    with pytest.raises(OutputError, match="begun with another dtype"):
        again(model=ModelSource(model, dtype="bfloat16"))
    with pytest.raises(OutputError, match="another problems"):
        again(problems=PROBLEMS[:3])
    with pytest.raises(OutputError, match="another prompt"):
        again(prompt=Prompt("Do."))
    # A model that changed under its name while there was something left to do.
    (tmp_path / "x" / "solve.json").write_text(
        json.dumps(json.loads((tmp_path / "x" / "solve.json").read_text()) | {"counts": {}})
    )
    record = json.loads((tmp_path / "x" / "solve.json").read_text())
    record["origin"]["fingerprint"] = "0"
    (tmp_path / "x" / "solve.json").write_text(json.dumps(record))
    with pytest.raises(OutputError, match="another fingerprint"):
        again()
    (tmp_path / "x" / "solve.json").write_text("{")
    with pytest.raises(OutputError, match="damaged"):
        again()
    (tmp_path / "y").mkdir()
    (tmp_path / "y" / "thesis.tex").touch()
    with pytest.raises(OutputError, match=r"other files \(thesis.tex\)"):
        solve(model, PROBLEMS, tmp_path / "y", prompt=PROMPT)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 0}, "samples must be at least 1"),
        ({"max_new_tokens": 0}, "max_new_tokens must be"),
        ({"batch_size": 0}, "batch_size must be"),
        ({"temperature": -1}, "temperature must be 0 or more"),
        ({"temperature": float("nan")}, "temperature must be 0 or more"),
        ({"top_p": 0}, "top_p must be above 0"),
        ({"temperature": 0}, "all 4 samples would be the same"),
        ({"engine": "tgi"}, "engine must be one of transformers, vllm"),
        ({"problems": []}, "nothing to solve"),
        ({"problems": [PROBLEMS[0]] * 2}, "2 problems have the id 'a'"),
        ({"engine": "vllm", "model": ModelSource("x", "y")}, "vLLM runs a base model alone"),
    ],
)
def test_bad_settings(solved: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises((ConfigError, InputError), match=message):
        solved(**options)


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
def test_vllm_is_missing(solved: Any) -> None:
    with pytest.raises(ConfigError, match="needs vllm: install it with"):
        solved(engine="vllm")


def test_stopped_and_started_again(model: str, tmp_path: Path) -> None:
    """Killed again and again, interrupted, on a full disk: in the end the files are those of a quiet run."""
    problems = [Problem(str(n), f"{n} + {n}?", str(2 * n), level=1 + n % 5, kind="number") for n in range(16)]
    options = {"model": model, "samples": 4, "max_new_tokens": 16, "batch_size": 8}
    scenarios = [
        {
            "mishap": mishap,
            "kill_after": kills,
            "options": options | {"output": str(tmp_path / name)},
            "problems": [vars(problem) for problem in problems],
        }
        for name, mishap, kills in (
            ("quiet", "none", []),
            ("killed", "none", [8, 24]),
            ("interrupted", "interrupt", []),
            ("interrupted", "none", []),
            ("full", "full_disk", []),
            ("full", "none", []),
        )
    ]
    (tmp_path / "scenarios.json").write_text(json.dumps(scenarios))
    child = subprocess.run(
        [sys.executable, Path(__file__).with_name("stopped_solve.py"), "scenarios.json"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert child.returncode == 0, child.stderr
    outcomes = [json.loads(line) for line in child.stdout.splitlines()]
    assert [outcome["code"] for outcome in outcomes] == [0, 0, 130, 0, 2, 0], outcomes
    assert all(8 <= lines < 64 for lines in outcomes[1]["kills"])
    assert "File too large; free some space, and the same command goes on." in outcomes[4]["err"]
    quiet = files(tmp_path / "quiet")
    assert quiet["solutions.jsonl"].count(b"\n") == 64
    for name in ("killed", "interrupted", "full"):
        assert files(tmp_path / name) == quiet


# vLLM, which cannot run here: only what is given to it and made of what it gives.


def test_what_vllm_is_asked_for(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    logprob = [-0.5]

    class LLM:
        llm_engine = SimpleNamespace(model_config=SimpleNamespace(max_model_len=50, dtype=torch.bfloat16))

        def __init__(self, **options: Any) -> None:
            asked.append(options)

        def get_tokenizer(self) -> Any:
            return byte_tokenizer()

        def generate(self, prompts: Any, parameters: Any, use_tqdm: bool) -> Any:
            asked.append((prompts, parameters))
            ids = [*byte_tokenizer()("#### 2", add_special_tokens=False).input_ids, 2]
            logprobs = [{token: SimpleNamespace(logprob=logprob[0])} for token in ids]
            return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=ids, logprobs=logprobs)])] * len(
                prompts
            )

    fake = ModuleType("vllm")
    fake.__spec__ = SimpleNamespace()  # pyright: ignore[reportAttributeAccessIssue]
    vars(fake).update(LLM=LLM, SamplingParams=lambda **options: options, TokensPrompt=dict)
    monkeypatch.setitem(sys.modules, "vllm", fake)
    solve(model, PROBLEMS, tmp_path / "x", prompt=PROMPT, samples=2, engine="vllm", max_new_tokens=20)
    found = read_solutions(tmp_path / "x", PROBLEMS)
    assert [one.correct for one in found] == [True, True] + [False] * 6
    assert {(one.solution, one.tokens, one.finished) for one in found} == {("#### 2", 6, True)}
    assert found[0].logprobs == [-0.5] * 6
    assert asked[0]["generation_config"] == "vllm"
    prompts, parameters = asked[1]
    longest = prompt_ids(byte_tokenizer(), messages(PROBLEMS[1], PROMPT))
    assert prompts[0] == {"prompt_token_ids": longest}
    assert parameters[0]["max_tokens"] == 50 - len(longest)
    assert parameters[0]["stop_token_ids"] == ENDS
    assert len({one["seed"] for one in parameters}) == 8
    logprob[0] = math.nan
    with pytest.raises(InputError, match="are not numbers in bfloat16: it overflows; give another --dtype"):
        solve(model, PROBLEMS, tmp_path / "y", prompt=PROMPT, samples=2, engine="vllm")


# Solutions from elsewhere.


def written(path: Path, *rows: Any) -> Path:
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return path


def test_solutions_from_elsewhere(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = written(
        tmp_path / "x.jsonl",
        {"problem_id": "a", "solution": "It is 2."},
        {"id": "a", "response": "It is 3."},
        "\n",
        {"problem": "1  + 1?", "completion": "Who knows?", "model": "m"},
        {"question": "2 + 3?", "solutions": ["5", "6", {"text": "It is 5.", "correct": False}]},
        {"id": "a", "problem": "How much is it?", "text": "7", "is_correct": 0},
        {"problem_id": "b", "solutions": ["4", "4"], "correct": [True, False]},
    )
    found = read_solutions(path, PROBLEMS)
    assert [(one.problem_id, one.sample, one.answer, one.correct) for one in found] == [
        ("a", 0, "2", True),
        ("a", 1, "3", False),
        ("a", 2, None, False),
        ("c", 0, "5", True),
        ("c", 1, "6", False),
        ("c", 2, "5", False),
        ("d", 0, "7", False),
        ("b", 0, "4", True),
        ("b", 1, "4", False),
    ]
    assert found[0].level == 1
    assert found[0].reference == "2"
    assert {(one.tokens, one.finished, one.token_ids) for one in found} == {(None, None, None)}
    assert "No answer was found in 1 of 9 solutions: a sample 2." in caplog.text


def test_gsm8ks_example_solutions(tmp_path: Path) -> None:
    row = {
        "question": "1 + 1?",
        "ground_truth": "It is\nA: 2",
        "6b": {"is_correct": False, "solution": "1 + 1 = <<1+1=3>>3\nA: 3"},
        "175b": {"is_correct": True, "solution": "1 + 1 = <<1+1=2>>2\nA: 2"},
    }
    found = read_solutions(written(tmp_path / "x.jsonl", row), PROBLEMS)
    assert [(one.sample, one.answer, one.correct) for one in found] == [(0, "3", False), (1, "2", True)]


# A row as solve writes it.
OWN = {"problem_id": "a", "reference": "2", "sample": 0, "solution": "2", "answer": "2", "correct": True}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"id": "a", "text": "2"}, "{broken\n"], "Line 2 of .* is not a JSON object"),
        ([{"id": "z", "text": "2"}], "Row 1 of .*not among the 4 given.*'z'.*; give the problems"),
        ([{"id": "a", "problem": "9 + 9?", "text": "18"}], "not among the 4 given"),
        ([{"text": "2"}], "names no problem"),
        ([{"id": "a", "answer": "2"}], "has no solution; it needs a text in solution, response"),
        ([{"id": "a", "solutions": []}], "has no solution"),
        ([{"id": "a", "solutions": [3]}], "holds 3 among its solutions"),
        ([{"id": "a", "solutions": ["1", "2"], "correct": [True]}], "2 solutions and 1 marks"),
        ([{"id": "a", "text": "2", "correct": "yes"}], "marks a solution with 'yes'"),
        ([OWN | {"correct": "yes"}], "needs a text as solution and true or false as correct"),
        ([OWN | {"solution": None}], "needs a text as solution and true or false as correct"),
        ([{"id": "a", "text": "2", "sample": 1}] * 2, "sample 1 of problem a once more"),
        ([], "is empty"),
    ],
)
def test_solutions_that_cannot_be_read(tmp_path: Path, rows: list[Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_solutions(written(tmp_path / "x.jsonl", *rows), PROBLEMS)


def test_folders_that_hold_no_solutions(model: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has no solutions\.jsonl"):
        read_solutions(tmp_path, PROBLEMS)
    with pytest.raises(InputError, match="There is no file"):
        read_solutions(tmp_path / "nothing.jsonl", PROBLEMS)
    solve(model, PROBLEMS, tmp_path / "x", prompt=PROMPT, samples=1, max_new_tokens=2)
    (tmp_path / "x" / "solutions.jsonl").unlink()
    with pytest.raises(InputError, match="not all there yet; finish them"):
        read_solutions(tmp_path / "x", PROBLEMS)
