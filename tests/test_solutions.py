"""Metrics of replies: over their own tokens, read as a model reads them when it writes them."""

from math import ceil
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from conftest import make_llama
from philens.bases.tokenizer import byte_tokenizer, character_tokenizer
from philens.reasoning.problems import plain_text
from philens.reasoning.rules import AGGREGATES, Rule
from philens.reasoning.sampling import read_solutions, solve
from philens.reasoning.solutions import (
    Solution,
    by_insertion_point,
    iter_replies,
    measure,
    measure_replies,
    reference_solutions,
    render_prompt,
)
from philens.scoring.score import score
from philens.support.errors import ConfigError, InputError
from philens.tasks.problem import Problem, Prompt, messages
from test_score import lens_of

METRICS = ("phi", "surprisal", "entropy")
CHARACTERS = character_tokenizer()
BYTES = byte_tokenizer()
QUESTION = [{"role": "user", "content": "What is 2 + 3?"}]
REPLIES = ["2 + 3 = 5\n#### 5", "6", "It is five, as 2 and 3 are five.", " padded \n"]

# As Llama 3.2's, in short: it begins the text, tells the date and trims contents.
LLAMA_3 = """\
{{- bos_token }}
{%- if not date_string is defined %}{%- set date_string = strftime_now("%d %b %Y") %}{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: " + date_string + "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim }}
    {{- '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}
"""
# As Qwen 3's and DeepSeek's: thoughts of the assistant's messages are left out.
FORGETFUL = """\
{%- for message in messages %}
{{- '<|start_header_id|>' + message.role + '<|end_header_id|>' + message.content.split('</think>')[-1] }}
{{- '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>' }}{%- endif %}
"""


def llama_3(template=LLAMA_3):
    """A byte-level BPE tokenizer that begins texts with BOS, like Llama 3's."""
    special = ["<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        REPLIES, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, special_tokens=special)
    )
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(
        single=f"{special[0]} $A", special_tokens=[(special[0], 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=special[0], eos_token=special[1],
        extra_special_tokens=special[2:], chat_template=template,
    )  # fmt: skip


TEMPLATED = {"bytes": BYTES, "llama 3": llama_3()}
each_template = pytest.mark.parametrize("tokenizer", TEMPLATED.values(), ids=TEMPLATED)


@pytest.fixture(scope="module")
def lens():
    return lens_of(make_llama(vocab_size=512))


@pytest.fixture(scope="module")
def small():
    return lens_of(make_llama())


def by_hand(values):
    values = np.asarray(values, np.float64)
    last = values[len(values) - ceil(len(values) / 5) :]
    return dict(zip(AGGREGATES, (values.mean(), values.sum(), values.max(), last.mean()), strict=True))


def check_row(row, columns, start, stop):
    """`row` is what tokens `start` to `stop` of the columns give."""
    assert row["tokens"] == stop - start
    for metric in METRICS:
        for kind, value in by_hand(columns[metric][start:stop]).items():
            assert row[f"{metric}_{kind}"] == pytest.approx(value, rel=2e-4), (metric, kind)


def ids_read(monkeypatch, *args, **options):
    """The tokens of the texts that were read, and the table."""
    seen, original = [], score.__globals__["_read_texts"]

    def watched(lens, texts, *rest):
        seen.extend(text.token_ids.tolist() for text in texts)
        return original(lens, texts, *rest)

    monkeypatch.setitem(score.__globals__, "_read_texts", watched)
    table = measure_replies(*args, **options)
    monkeypatch.setitem(score.__globals__, "_read_texts", original)
    return seen, table


# Numbers.


def test_numbers_are_those_of_score_over_the_replys_tokens(small):
    prompts = ["Add: ", "\n", "Q. " * 30, "x"]
    table = measure_replies(small, CHARACTERS, prompts, REPLIES)
    assert list(table) == ["tokens", *(f"{m}_{kind}" for m in METRICS for kind in AGGREGATES)]
    texts = [prompt + reply for prompt, reply in zip(prompts, REPLIES, strict=True)]
    for row, scores, prompt in zip(
        table.to_dict("records"), score(small, CHARACTERS, texts, metrics=METRICS), prompts, strict=True
    ):
        check_row(row, scores.columns, len(prompt), len(scores))
    # The last fifth of 16 tokens are 4, of one token that token.
    assert table["tokens"].tolist() == [len(reply) for reply in REPLIES]
    one = table.iloc[1]
    assert one["phi_mean"] == one["phi_sum"] == one["phi_max"] == one["phi_last_fifth"]
    assert table["phi_last_fifth"][0] != pytest.approx(table["phi_mean"][0], rel=1e-3)


@each_template
def test_a_chat_is_read_as_the_model_read_it(lens, tokenizer, monkeypatch):
    read, table = ids_read(monkeypatch, lens, tokenizer, [QUESTION] * 4, REPLIES)
    prompt = tokenizer.apply_chat_template(
        QUESTION, add_generation_prompt=True, return_dict=False, date_string="26 Jul 2024"
    )
    for ids, row, reply in zip(read, table.to_dict("records"), REPLIES, strict=True):
        own = tokenizer(reply, add_special_tokens=False).input_ids
        assert ids == prompt + own
        assert ids.count(tokenizer.bos_token_id) == 1
        assert row["tokens"] == len(own)


def test_a_whole_chat_gives_the_same(lens):
    """As a template that changes nothing writes it; the mark after the reply comes too late to matter."""
    chats = [[*QUESTION, {"role": "assistant", "content": reply}] for reply in REPLIES]
    table = measure_replies(lens, BYTES, [QUESTION] * 4, REPLIES)
    for row, scores, reply in zip(
        table.to_dict("records"), score(lens, BYTES, chats, metrics=METRICS), REPLIES, strict=True
    ):
        stop = len(scores) - 1
        assert scores.token_ids[stop] == BYTES.eos_token_id
        check_row(row, scores.columns, stop - len(reply), stop)


@each_template
def test_plain_text_in_front_equals_the_chat(lens, tokenizer):
    rendered = render_prompt(tokenizer, QUESTION)
    assert rendered.startswith(tokenizer.bos_token)
    plain = rendered.removeprefix(tokenizer.bos_token)  # the tokenizer puts it there itself
    tables = [measure_replies(lens, tokenizer, [prompt] * 4, REPLIES) for prompt in (QUESTION, plain)]
    pd.testing.assert_frame_equal(*tables, rtol=1e-5)


def test_without_a_template_a_chat_is_plain_text(small):
    table = measure_replies(small, CHARACTERS, [QUESTION] * 4, REPLIES)
    plain = measure_replies(small, CHARACTERS, [plain_text(QUESTION)] * 4, REPLIES)
    pd.testing.assert_frame_equal(table, plain)


@each_template
def test_the_prompt_changes_values_and_not_which_tokens_count(lens, tokenizer):
    other = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "And 7 + 4? " * 9}]
    one, two = (measure_replies(lens, tokenizer, [prompt] * 4, REPLIES) for prompt in (QUESTION, other))
    assert (one["tokens"] == two["tokens"]).all()
    for metric in METRICS:
        assert (abs(one[f"{metric}_mean"] - two[f"{metric}_mean"]) > 1e-3).all()


def test_batches_and_order_change_nothing(lens):
    prompts = [QUESTION, "Add:", QUESTION, "plain " * 40]
    alone = measure_replies(lens, BYTES, prompts, REPLIES, batch_tokens=1)
    for batch_tokens in (60, 100_000):
        together = measure_replies(lens, BYTES, prompts, REPLIES, batch_tokens=batch_tokens)
        pd.testing.assert_frame_equal(alone, together, rtol=1e-4)
    turned = measure_replies(lens, BYTES, prompts[::-1], REPLIES[::-1])
    pd.testing.assert_frame_equal(alone, turned[::-1].reset_index(drop=True), rtol=1e-4)


def test_the_mark_that_ends_a_text_does_not_count(lens):
    with_mark = measure_replies(lens, BYTES, [QUESTION] * 2, ["5", "5" + BYTES.eos_token])
    pd.testing.assert_series_equal(with_mark.iloc[0], with_mark.iloc[1], check_names=False, rtol=1e-4)


def test_thoughts_that_a_template_would_leave_out_are_measured(lens):
    tokenizer = llama_3(FORGETFUL)
    reply = "<think>2 and 3</think>It is five"
    table = measure_replies(lens, tokenizer, [QUESTION], [reply])
    assert table["tokens"][0] == len(tokenizer(reply, add_special_tokens=False).input_ids)
    assert tokenizer.chat_template == FORGETFUL


def test_windows_and_characters_of_several_tokens(lens):
    reply = "日本 é " * 40
    row = measure_replies(lens, BYTES, ["Say: "], [reply], window=32).to_dict("records")[0]
    scores = score(lens, BYTES, "Say: " + reply, metrics=METRICS, window=32)[0]
    check_row(row, scores.columns, 1 + len("Say: "), len(scores))
    assert row["tokens"] == len(reply.encode())


def test_several_layers_and_samples():
    layered = lens_of(make_llama(), layer=None, layers=[0, 2], mode="observe")
    table = measure_replies(layered, CHARACTERS, ["Add: "] * 4, REPLIES)
    assert list(table)[1:5] == [f"phi@model.layers.0_{kind}" for kind in AGGREGATES]
    points = by_insertion_point(table)
    assert list(points) == ["model.layers.0", "model.layers.2"]
    scores = score(layered, CHARACTERS, ["Add: " + reply for reply in REPLIES])
    for path, point in points.items():
        assert list(point) == ["tokens", *(f"{m}_{kind}" for m in METRICS for kind in AGGREGATES)]
        means = [item.columns[f"phi@{path}"][5:].mean() for item in scores]
        np.testing.assert_allclose(point["phi_mean"], means, rtol=1e-4)
    drawn = lens_of(make_llama(), inference="sample", samples=2)
    assert list(measure_replies(drawn, CHARACTERS, ["a"], ["b"], metrics=["phi"])) == [
        "tokens", "phi_mean", "phi_sum", "phi_max", "phi_last_fifth"
    ]  # fmt: skip


# Empty replies, streams, and what cannot be measured.


def test_an_empty_reply_is_a_row_without_numbers(small):
    replies = ["", "ab", "", "", "abc", ""]
    table = measure_replies(small, CHARACTERS, ["Q "] * 6, replies)
    assert table["tokens"].tolist() == [0, 2, 0, 0, 3, 0]
    empty = table["tokens"] == 0
    assert table[empty].drop(columns="tokens").isna().all(axis=None)
    assert table[~empty].notna().all(axis=None)
    full = measure_replies(small, CHARACTERS, ["Q "] * 2, ["ab", "abc"])
    pd.testing.assert_frame_equal(table[~empty].reset_index(drop=True), full)
    # The mark that ends a text is all that is there.
    marked = measure_replies(small, CHARACTERS, ["Q "] * 2, ["ab", "\x03"])
    assert marked["tokens"].tolist() == [2, 0]


def test_first_tokens_have_means_of_their_own(small):
    table = measure_replies(small, CHARACTERS, ["2 + 3 = "] * 3, ["5, or six", "5", ""], prefix=4)
    (scores,) = score(small, CHARACTERS, "2 + 3 = 5, or six", metrics=METRICS)
    for metric in METRICS:
        assert table[f"{metric}_prefix"][0] == pytest.approx(scores.columns[metric][8:12].mean(), rel=1e-4)
    assert table[["tokens", "tokens_prefix"]].fillna(0).to_numpy().tolist() == [[9, 4], [1, 1], [0, 0]]
    assert table["phi_prefix"][1] == pytest.approx(table["phi_mean"][1], rel=1e-4)


def test_equal_beginnings_have_the_very_same_numbers(small):
    """Whatever comes after them: in batches of other shapes, rounding would tell long replies from short."""
    replies = ["5, as " + "I said " * length for length in range(12)]
    table = measure_replies(small, CHARACTERS, ["2 + 3 = "] * 12, replies, prefix=5, batch_tokens=100)
    assert table["phi_mean"].nunique() == 12
    for metric in METRICS:
        assert table[f"{metric}_prefix"].nunique() == 1
    others = measure_replies(small, CHARACTERS, ["2 + 4 = "] * 12, replies, prefix=5, batch_tokens=100)
    assert others["phi_prefix"].nunique() == 1
    assert others["phi_prefix"][0] != table["phi_prefix"][0]


def test_any_number_of_replies_is_read_a_little_ahead(small):
    read = []

    def pairs():
        for number in range(10_000):
            read.append(number)
            yield "Q ", "" if number % 3 else f"reply {number}"

    names = (f"reply {number}" for number in range(10_000))
    rows = iter_replies(small, CHARACTERS, pairs(), names, metrics="phi", batch_tokens=100)
    found = [next(rows) for _ in range(20)]
    assert len(read) < 1000
    assert [row["tokens"] for row in found[:4]] == [7, 0, 0, 7]
    assert set(found[0]) == {"tokens", *(f"phi_{kind}" for kind in AGGREGATES)}


def test_model_and_tokenizer_stay_as_they_were(lens):
    lens.train()
    template, settings = BYTES.chat_template, BYTES.backend_tokenizer.to_str()
    measure_replies(lens, BYTES, [QUESTION], ["5"])
    assert lens.training
    assert (BYTES.chat_template, BYTES.backend_tokenizer.to_str()) == (template, settings)
    lens.eval()


@pytest.mark.parametrize(
    ("prompts", "replies", "sentence"),
    [
        (["a"], ["b", "c"], "1 prompts and 2 replies"),
        ([], [], "no reply has a token"),
        (["a"], [""], "no reply has a token"),
        (["a", "a"], ["b", 3], r"replies\[1\] is of type int"),
        ([3], ["a"], r"the prompt of replies\[0\] is of type int"),
        ([[]], ["a"], r"the prompt of replies\[0\] is a chat without messages"),
        ([QUESTION[0]], ["a"], "put it in a list of its own"),
        ([[{"role": "user"}]], ["a"], "each with role and content"),
        ([""], ["ab"], r"replies\[0\] has a token without surprisal; put a prompt in front"),
        (["a"], ["b\ud800"], "half a character"),
    ],
)
def test_replies_that_cannot_be_measured(small, prompts, replies, sentence):
    with pytest.raises(InputError, match=sentence):
        measure_replies(small, CHARACTERS, prompts, replies)


def test_models_tokenizers_and_templates_that_do_not_fit(small):
    with pytest.raises(InputError, match=r"replies\[0\] has token id \d+ and the model knows 128"):
        measure_replies(small, BYTES, ["a"], ["é"])
    with pytest.raises(InputError, match="does not say which characters"):
        measure_replies(small, SimpleNamespace(is_fast=False), ["a"], ["b"])
    with pytest.raises(InputError, match="did you mean 'phi'"):
        measure_replies(small, CHARACTERS, ["a"], ["b"], metrics=["phy"])
    refusing = llama_3("{{ raise_exception('No system') }}")
    with pytest.raises(InputError, match=r"refuses the prompt of replies\[0\] \(No system\)"):
        measure_replies(small, refusing, [QUESTION], ["b"])


# Solutions of problems.

PROBLEMS = [
    Problem("one", "What is 2 + 3?", "5", "2 + 3 = 5\n#### 5", level=1, steps=1),
    Problem("two", "What is 7 + 4?", "11", None, level=3),
    Problem("three", "What is 1 + 1?", "2", "It is 2.\n#### 2"),
]


def solved(problem_id, solution, **changes):
    known = next(problem for problem in PROBLEMS if problem.id == problem_id)
    facts = {
        "problem_id": problem_id, "problem": known.problem, "level": known.level, "steps": known.steps,
        "reference": known.answer, "sample": 0, "solution": solution, "answer": None, "correct": False,
        "finished": True,
    }  # fmt: skip
    return Solution(**(facts | changes))


def test_solutions_are_measured_after_their_problems(lens, caplog):
    prompt = Prompt("Solve it.", shots=(PROBLEMS[2],))
    solutions = [
        solved("two", "7 + 4 = 11", answer="11", correct=True),
        solved("two", "", sample=1),
        solved("one", "It is 6.", answer="6", finished=False),
    ]
    table = measure(lens, BYTES, solutions, PROBLEMS, prompt)
    assert list(table)[:9] == [
        "problem_id", "level", "steps", "sample", "correct", "answer", "parsed", "finished", "tokens"
    ]  # fmt: skip
    assert table["problem_id"].tolist() == ["two", "two", "one"]
    assert table["level"].tolist() == [3, 3, 1]
    assert table["steps"].isna().tolist() == [True, True, False]
    assert table["sample"].tolist() == [0, 1, 0]
    assert table["correct"].tolist() == [True, False, False]
    assert table["answer"].fillna("none").tolist() == ["11", "none", "6"]
    assert table["parsed"].tolist() == [True, False, True]
    assert table["finished"].tolist() == [True, True, False]
    assert "1 of 3 solutions have no token" in caplog.text
    chats = [messages(PROBLEMS[number], prompt) for number in (1, 1, 0)]
    assert len(chats[0]) == 3
    expected = measure_replies(lens, BYTES, chats, ["7 + 4 = 11", "", "It is 6."])
    pd.testing.assert_frame_equal(table.iloc[:, 8:], expected)
    with pytest.raises(InputError, match=r"solutions\[0\] belongs to problem 'two', which is not among"):
        measure(lens, BYTES, solutions, PROBLEMS[:1], prompt)
    with pytest.raises(InputError, match="no reply has a token"):
        measure(lens, BYTES, [], PROBLEMS, prompt)


def test_reference_solutions(lens):
    solutions = reference_solutions(PROBLEMS)
    table = measure(lens, BYTES, solutions, PROBLEMS, Prompt(""))
    assert table["problem_id"].tolist() == ["one", "three"]
    assert table[["correct", "parsed", "finished"]].all(axis=None)
    assert table["level"].tolist()[0] == 1
    assert np.isnan(table["level"][1])
    assert table["tokens"].tolist() == [len("2 + 3 = 5\n#### 5"), len("It is 2.\n#### 2")]
    unknown = measure(lens, BYTES, solutions[1:], PROBLEMS, Prompt(""))
    assert unknown["level"].dtype == unknown["steps"].dtype == np.float64


def test_solutions_in_plain_text(small):
    """Sampled ones as they were written, others with a space after `Answer:`."""
    solutions = [
        solved("one", "5", token_ids=[5]), solved("one", "5"), solved("one", " 5"), solved("one", "\n5")
    ]  # fmt: skip
    table = measure(small, CHARACTERS, solutions, PROBLEMS, Prompt(""))
    before = plain_text(messages(PROBLEMS[0], Prompt("")))
    expected = measure_replies(small, CHARACTERS, [before] * 4, ["5", " 5", " 5", "\n5"])
    pd.testing.assert_frame_equal(table.iloc[:, 8:], expected)


@pytest.mark.parametrize("tokenizer", [CHARACTERS, BYTES, llama_3()], ids=["plain", "bytes", "llama 3"])
def test_sampled_solutions_are_read_as_they_were_sampled(tokenizer, tmp_path):
    """The sampler's own log-probabilities are the surprisal found here."""
    base = make_llama(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    base.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    prompt = Prompt("Solve it.", shots=(PROBLEMS[0],))
    options = {"samples": 30, "max_new_tokens": 3, "temperature": 0.7}
    solve(str(tmp_path / "model"), PROBLEMS, tmp_path / "out", prompt=prompt, **options)
    solutions = read_solutions(tmp_path / "out", PROBLEMS)
    table = measure(lens_of(base), tokenizer, solutions, PROBLEMS, prompt, metrics=["surprisal"])
    compared = 0
    for row, solution in zip(table.to_dict("records"), solutions, strict=True):
        ids = tokenizer(solution.solution, add_special_tokens=False).input_ids
        # Half a character, as a model without training writes it, does not come back as it was.
        if ids and ids == solution.token_ids:
            assert row["tokens"] == solution.tokens == len(ids)
            assert row["surprisal_sum"] == pytest.approx(-sum(solution.logprobs), rel=1e-3, abs=1e-3)
            compared += 1
    assert compared >= 10


# Rules.


@pytest.mark.parametrize(
    ("text", "column", "sign", "metrics"),
    [
        ("highest_phi", "phi_mean", 1, ("phi",)),
        ("lowest_phi", "phi_mean", -1, ("phi",)),
        ("lowest_surprisal", "surprisal_mean", -1, ("surprisal",)),
        ("lowest_surprisal_with_layer", "surprisal_with_layer_mean", -1, ("surprisal_with_layer",)),
        ("highest_surprisal_with_layer_max", "surprisal_with_layer_max", 1, ("surprisal_with_layer",)),
        ("lowest_entropy_last_fifth", "entropy_last_fifth", -1, ("entropy",)),
        ("highest_phi_sum", "phi_sum", 1, ("phi",)),
        ("highest_phi@model.layers.0", "phi@model.layers.0_mean", 1, ("phi",)),
        ("highest_phi@model.layers.0_max", "phi@model.layers.0_max", 1, ("phi",)),
        ("lowest_tokens", "tokens", -1, ()),
        ("shortest", "tokens", -1, ()),
        ("highest_votes", "votes", 1, ()),
    ],
)
def test_rules(text, column, sign, metrics):
    rule = Rule.parse(text)
    assert (rule.name, rule.column, rule.sign, rule.metrics) == (text, column, sign, metrics)
    assert rule.scores(pd.DataFrame({column: [1.0, 3.0]})).tolist() == [sign, 3 * sign]


@pytest.mark.parametrize("text", ["phi", "best_phi", "highest_", "highest", "", "longest"])
def test_texts_that_are_no_rule(text):
    with pytest.raises(ConfigError, match=r"There is no rule .*highest_COLUMN.*shortest"):
        Rule.parse(text)


def test_a_rule_for_a_column_that_is_not_there():
    table = pd.DataFrame({"phi_mean": [1.0], "tokens": [2], "text": ["a"]})
    with pytest.raises(InputError, match=r"highest_phy needs a column phy .*did you mean highest_phi "):
        Rule.parse("highest_phy").scores(table)
    with pytest.raises(InputError, match=r"needs a column phi_mean and there is none\.$"):
        Rule.parse("highest_phi").scores(pd.DataFrame({"text": ["a"]}))
