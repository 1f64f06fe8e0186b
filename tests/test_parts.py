"""Thoughts, answers and steps: spans that a text has by itself or is asked for, and their means."""

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import philens
from conftest import make_llama
from philens import cli
from philens.bases.tokenizer import byte_tokenizer
from philens.explore.view import Look, result
from philens.scoring.parts import check_steps, parts_of, steps_of
from philens.scoring.score import score
from philens.scoring.scores import Span, TokenScores
from philens.show.page import MAX_PARTS, PageDocument, means_table
from philens.show.tokens import parts
from philens.support.errors import ConfigError
from test_chat import many_parts
from test_score import lens_of
from test_solutions import FORGETFUL

# As Qwen 3's: thoughts before the last reply alone, in front of its content.
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}{% set parts = m.content.split('</think>') %}"
    "{% if loop.last and parts|length > 1 %}<think>\n{{ parts[0].split('<think>')[-1].strip() }}\n</think>"
    "\n\n{% endif %}{{ parts[-1].strip() }}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
)
THOUGHT = "<think>It is 2 + 3 = 5. Sure?\nYes.</think>The answer is 5."
CHAT = [{"role": "user", "content": "2 + 3? No <think>."}, {"role": "assistant", "content": THOUGHT}]


def found(text: str, messages: Any = (), steps: Any = None) -> list[tuple[str, str]]:
    return [(name, text[start:end]) for name, start, end in parts_of(text, messages, steps)]


@pytest.fixture(scope="module")
def lens() -> philens.PHiModel:
    return lens_of(make_llama(vocab_size=300))


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("<think>\na b\n</think>\n\nc d\n", [("think", "a b"), ("answer", "c d")]),
        ("before <think>a</think> c", [("think", "a"), ("answer", "c")]),
        (
            "<think>a</think>b<think>c</think>d",
            [("think", "a"), ("answer", "b"), ("think", "c"), ("answer", "d")],
        ),
        ("begun by the prompt\n</think>\nc", [("think", "begun by the prompt"), ("answer", "c")]),
        ("begun by the prompt</think>", [("think", "begun by the prompt")]),
        (" <think>cut off", [("think", "cut off")]),
        ("<think>a <think> b</think>c", [("think", "a <think> b"), ("answer", "c")]),
        ("<think>\n\n</think>\n\nc", []),
        ("<reasoning>a <think> b</think></reasoning>c", [("think", "a <think> b</think>"), ("answer", "c")]),
        ("<thinking>a</thought>b</thinking>c", [("think", "a</thought>b"), ("answer", "c")]),
        ("<seed:think>a</seed:think>c", [("think", "a"), ("answer", "c")]),
        ("[THINK]a[/THINK]c", [("think", "a"), ("answer", "c")]),
        ("\u25c1think\u25b7a\u25c1/think\u25b7c", [("think", "a"), ("answer", "c")]),
        ("<|inner_prefix|>a<|inner_suffix|>c<|assistant_end|>", [("think", "a"), ("answer", "c")]),
        (
            "<|START_THINKING|>a<|END_THINKING|><|START_RESPONSE|>c<|END_RESPONSE|>",
            [("think", "a"), ("answer", "c")],
        ),
        ("<|channel>thought\na\n<channel|>c<turn|>", [("think", "a"), ("answer", "c")]),
        ("<|channel>thought\n<channel|>c", []),
        (
            "<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>final<|message|>c<|return|>",
            [("think", "a"), ("answer", "c")],
        ),
        (
            "<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>commentary to=functions.f "
            "<|constrain|>json<|message|>{}<|call|>",
            [("think", "a"), ("answer", "{}")],
        ),
        ("<|channel|>analysis<|message|>cut off", [("think", "cut off")]),
        ("<|user|>a<|end|>\n<|assistant|>b<|end|>\n", []),
        ("An array [THINK] of a.", []),
        ("c d", []),
        ("The tag `</think>` ends what `<think>` begins.", []),
        ("We write <think> first.", []),
    ],
)
def test_thoughts_and_answers(text: str, parts: list[tuple[str, str]]) -> None:
    assert found(text) == parts


@pytest.mark.parametrize(
    ("steps", "text", "wanted"),
    [
        ("lines", " a\n\n b c \nd", ["a", "b c", "d"]),
        ("sentences", 'He, e.g. so 3.1. "Oh!" So?\n- a\nz', ["He, e.g. so 3.1.", '"Oh!"', "So?", "- a", "z"]),
        ("sentences", "中文。好\uff01", ["中文。", "好\uff01"]),
        ("equations", "48/2 = <<48/2=24>>24, so 3,000 * 1.5 = 4,500.", ["48/2=24", "3,000 * 1.5 = 4,500"]),
        ("equations", "$5 + $6 = $11, x = -3 and 2+3=5=5", ["$5 + $6 = $11", "x = -3", "2+3=5=5"]),
        ("equations", r"$a = \frac{1}{2}$, $b$, \[ y \] \[y = 2x\].", [r"$a = \frac{1}{2}$", r"\[y = 2x\]"]),
        ("equations", "version == 2, sin(x) = 2, no = sign", []),
    ],
)  # fmt: skip
def test_steps(steps: Any, text: str, wanted: list[str]) -> None:
    assert found(text, (), steps) == [(f"{steps[:-1]} {n}", one) for n, one in enumerate(wanted, 1)]


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        ("One word.", []),
        ("Two eggs. Two more.", ["sentences"]),
        ("Two eggs.\nTwo more.", ["lines"]),  # cut alike by sentences
        ("So 2 + 2 = 4.\nThen 4 * 3 = 12.", ["lines", "equations"]),
        ("Two. Three.\nFour: 2 + 2 = 4.", ["lines", "sentences"]),
        ("<think>One. Two.</think>\nThree", ["lines", "sentences"]),
        ("", []),
    ],
)
def test_the_kinds_of_steps_that_a_text_has(text: str, kinds: list[str]) -> None:
    found = steps_of(text)
    assert list(found) == kinds
    for kind, steps in found.items():
        assert len(steps) > 1
        assert steps == [span for span in parts_of(text, steps=kind) if span.name not in ("think", "answer")]


def test_steps_are_those_of_thoughts_and_answers() -> None:
    assert [name for name, _ in found(f"Before.\n{THOUGHT}", (), "sentences")] == [
        "think",
        "answer",
        *(f"sentence {n}" for n in range(1, 5)),
    ]
    chat = "Q?\n2 + 3 = 5.\nbye"
    messages = [Span("user", 0, 2), Span("assistant", 3, 13)]
    assert found(chat, messages, "lines") == [("line 1", "2 + 3 = 5.")]
    with pytest.raises(ConfigError, match=r"^steps must be one of lines, sentences, equations, not 'words'"):
        check_steps("words")


@pytest.mark.parametrize(
    "piece",
    [
        "1+",
        "1 = ",
        "$",
        r"\[ = ",
        "<think>",
        "</think>",
        "<|a|> ",
        "[THINK]<|end|>",
        "a. ",
        "((((",
        "a=",
        ". ",
    ],
)
@pytest.mark.parametrize("steps", ["sentences", "equations"])
def test_long_texts_take_no_longer_for_each_character(piece: str, steps: Any) -> None:
    begun = time.process_time()
    parts_of(piece * (200_000 // len(piece)), (), steps)
    assert time.process_time() - begun < 10


# Of chats.


def test_thoughts_of_a_chat(lens: philens.PHiModel) -> None:
    """The assistant's alone, where the template puts them in front of the content."""
    tokenizer = many_parts(*["<|endoftext|>"] * 4, template=TEMPLATE)
    (scores,) = score(lens, tokenizer, [CHAT], metrics=["phi"], steps="lines")
    assert [(name, scores.text[start:end]) for name, start, end in scores.spans[-5:]] == [
        ("think", "It is 2 + 3 = 5. Sure?\nYes."),
        ("answer", "The answer is 5."),
        ("line 1", "It is 2 + 3 = 5. Sure?"),
        ("line 2", "Yes."),
        ("line 3", "The answer is 5."),
    ]
    assert [span.name for span in scores.spans[:2]] == ["user", "assistant"]


def test_a_message_without_the_thoughts_that_its_template_leaves_out(lens: philens.PHiModel) -> None:
    tokenizer = many_parts(*["<|endoftext|>"] * 4, template=FORGETFUL)
    (scores,) = score(lens, tokenizer, [[*CHAT, CHAT[0]]], metrics=["phi"])
    assert "It is 2 + 3" not in scores.text
    assert ("assistant", "The answer is 5.") in [(name, scores.text[a:b]) for name, a, b in scores.spans]
    assert "think" not in [span.name for span in scores.spans]


# Where means are shown.


@pytest.fixture(scope="module")
def scores(lens: philens.PHiModel) -> TokenScores:
    tokenizer = many_parts(*["<|endoftext|>"] * 4)
    return score(lens, tokenizer, THOUGHT, metrics=["phi", "surprisal"], steps="lines")[0]


def test_means_of_spans(scores: TokenScores) -> None:
    table = scores.spans()
    means = scores.span_means()
    assert (
        [one.name for one in means]
        == list(table["name"])
        == ["think", "answer", "line 1", "line 2", "line 3"]
    )
    assert [one.tokens for one in means] == list(table["tokens"])
    for column in ("phi", "surprisal"):
        np.testing.assert_array_equal([one.means[column] for one in means], table[f"{column}_mean"])
    start, end = scores.spans[1][1:]
    inside = (scores.offsets[:, 0] >= start) & (scores.offsets[:, 1] <= end)
    np.testing.assert_allclose(means[1].means["phi"], scores.phi[inside].mean(), rtol=1e-5)
    assert TokenScores.from_json(scores.to_json()).span_means() == means


def test_pages_terminals_and_notebooks_have_a_row_for_each(scores: TokenScores) -> None:
    phi = f"{scores.span_means()[1].means['phi']:.3f}"
    document = PageDocument.of(scores, 1)
    markup = means_table([document])
    assert f'<tr class="part"><th>· answer</th><td>16</td><td>{phi}</td>' in markup
    assert markup.count('<a href="#d') == 1
    assert "· answer</td><td style" in scores._repr_html_()
    assert "· answer" in result([scores], Look(), None)
    assert parts(scores)[1].startswith(f"  answer: 16 tokens, phi {phi}, surprisal ")
    many = score_of_lines(MAX_PARTS + 3)
    assert parts(many)[-1] == "  and 3 more"
    assert "· and 3 more" in means_table([PageDocument.of(many, 1)])
    assert parts(score_of_lines(0)) == []


def score_of_lines(count: int) -> TokenScores:
    text = "a\n" * max(count, 1)
    spans = [Span(f"line {n}", 2 * n, 2 * n + 1) for n in range(count)]
    offsets = np.array([[2 * n, 2 * n + 1] for n in range(max(count, 1))])
    phi = np.arange(len(offsets), dtype=np.float32)
    return TokenScores(text, np.arange(len(offsets)), offsets, {"phi": phi}, spans)  # pyright: ignore[reportArgumentType]


def test_the_command_writes_them(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    lens = lens_of(make_llama(vocab_size=len(byte_tokenizer())))
    lens.base.save_pretrained("run/model")  # pyright: ignore[reportCallIssue]
    byte_tokenizer().save_pretrained("run/model")
    lens.save_pretrained("run/adapter")
    Path("a.txt").write_text(THOUGHT)
    Path("b.txt").write_text("plain")
    options = ["a.txt", "b.txt", "--model", "run", "--steps", "sentences"]
    assert cli.main(["score", *options, "--format", "jsonl"]) == 0
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert [one["name"] for one in first["span_means"]][:3] == ["think", "answer", "sentence 1"]
    assert [one["name"] for one in second["span_means"]] == ["sentence 1"]
    names = {"phi", "surprisal", "surprisal_with_layer"}
    assert first["span_means"][0]["means"].keys() == names
    assert len(first["spans"]) == len(first["span_means"])
    assert cli.main(["score", *options, "--format", "parquet", "--output", "scores"]) == 0
    row = pd.read_parquet("scores").iloc[0]
    assert row["spans"][0].keys() == {"name", "start", "end", "tokens", *(f"{name}_mean" for name in names)}
    assert row["spans"][0]["phi_mean"] == first["span_means"][0]["means"]["phi"]
    assert cli.main(["score", *options[:4], "--format", "parquet", "--output", "scores"]) == 2
    assert "was begun with another steps ('sentences', now None)" in capsys.readouterr().err
    assert cli.main(["score", *options, "--format", "table"]) == 0
    assert "\n  answer: 16 tokens, phi " in capsys.readouterr().out
    assert cli.main(["score", "a.txt", "--steps", "words"]) == 2
    assert "--steps must be one of lines, sentences, equations" in capsys.readouterr().err
