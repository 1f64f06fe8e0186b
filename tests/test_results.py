"""Where a result is worked out: exact places, known answers, the command from end to end."""

import csv
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM

import philens
from philens.bases.tokenizer import byte_tokenizer, train_bpe
from philens.cli import main
from philens.findings.places import place_before, score_places, written
from philens.findings.reproduce import reproduce_results
from philens.findings.results import GIVEN, PREDICTORS, measure_results
from philens.findings.results_figures import figure_tokens
from philens.findings.results_tables import layers_table, tables
from philens.findings.statistics import auroc, contrast, difference, fit_classifier, slope
from philens.lens.model import PHiModel
from philens.reasoning.problems import find_prompt, load_problems
from philens.scoring.score import score
from philens.support.errors import InputError
from philens.tasks.results import (
    KINDS,
    SENTENCE_KINDS,
    MarkedText,
    Place,
    make_questions,
    make_sentences,
    mark_answer,
    mark_solutions,
)

SENTENCES = make_sentences(12)
TEXTS = [text.text for text in SENTENCES]
TOKENIZERS = {
    "single digits": train_bpe(TEXTS, 700, split_digits=True),
    "merged digits": train_bpe(TEXTS * 3, 1500),
    "bytes": byte_tokenizer(),
}
GSM8K = [
    {
        "question": "Ann sold 48 clips in April and half as many in May, at $2 each. How much is it?",
        "answer": "In May it is 48/2=<<48/2=24>>24 clips.\nThat makes 48 + 24 = <<48+24=72>>72 of them.\n"
        "So she has $2*72=$<<2*72=144.00>>144.00 in the end, from <<8=8>>8 days.\n#### 144",
    },
    {"question": "What is left of 7?", "answer": "All of it.\n#### 7"},
]


# --- what is made


def calculated(text: str) -> int | None:
    """The result of the last calculation before the end, by reading it; not how it was made."""
    signs = {
        r"(\d+) (?:\+|plus) (\d+)(?: =| is)": lambda a, b: a + b,
        r"(\d+) added to (\d+) is": lambda a, b: a + b,
        r"(?:sum|total) of (\d+) and (\d+):": lambda a, b: a + b,
        r"(\d+) (?:-|minus|less) (\d+)(?: =| is)": lambda a, b: a - b,
        r"difference of (\d+) and (\d+):": lambda a, b: a - b,
        r"left of (\d+) without (\d+):": lambda a, b: a - b,
        r"(\d+) (?:\*|x|times|multiplied by) (\d+)(?: =| is)": lambda a, b: a * b,
        r"product of (\d+) and (\d+):": lambda a, b: a * b,
        r"in (\d+) boxes of (\d+) each:": lambda a, b: a * b,
    }
    for pattern, result in signs.items():
        if found := re.search(rf"{pattern} $", text):
            return result(int(found[1]), int(found[2]))
    return None


@pytest.mark.parametrize("kind", SENTENCE_KINDS)
def test_a_sentence_says_what_its_kind_promises(kind: str) -> None:
    chosen = [text for text in SENTENCES if text.places[0].kind == kind]
    assert len(chosen) == 12
    for text in chosen:
        check(text, *text.places)


def check(text: MarkedText, place: Place) -> None:
    before, number = text.text[: place.start], text.text[place.start : place.end]
    assert number.isdigit()
    assert not text.text[place.end :].startswith(tuple("0123456789"))
    sums = (
        "one_digit_sum",
        "three_digit_sum",
        "plus_zero",
        "wrong_result",
        "sum_after_sum",
        "same_sum_again",
    )
    if KINDS[place.kind] == "worked" or place.kind in sums:
        assert (calculated(before) == int(number)) == (place.kind != "wrong_result")
    else:
        assert calculated(before) is None
    if place.kind not in ("one_digit_sum", "three_digit_sum"):
        assert len(number) == 2
    if place.kind in ("copied", "identity", "plus_zero", "same_sum_again"):
        assert re.search(rf"\b{number}\b", before)
    elif place.kind != "difference":  # whose result may be the number taken away
        assert not re.search(rf"\b{number}\b", before)


def test_sentences_are_functions_of_seed_and_number() -> None:
    assert make_sentences(12) == SENTENCES
    few = make_sentences(6)
    assert few == [SENTENCES[k * 12 + i] for k in range(len(SENTENCE_KINDS)) for i in range(6)]
    assert [text.text for text in make_sentences(6, seed=1)] != [text.text for text in few]
    assert [text.held_out for text in few[:6]] == [False] * 3 + [True] * 3
    # Held-out templates begin otherwise than those that are fitted on.
    compared = [text for text in few if KINDS[text.places[0].kind] in ("worked", "other")]
    openings = [
        {re.sub(r"\b[A-Z]\w\w\b", "", t.text)[:5] for t in compared if t.held_out == h} for h in (0, 1)
    ]
    assert openings == [{" has "}, {"There"}]


def test_carries_take_turns() -> None:
    for text in SENTENCES:
        (place,) = text.places
        if place.kind in ("sum", "one_digit_sum", "three_digit_sum"):
            a, b = map(int, re.findall(r"\d+", text.text)[-3:-1])
            assert (a % 10 + b % 10 > 9) == (place.detail == "with carry")
    assert {text.places[0].detail for text in SENTENCES if text.places[0].kind == "product"} == {
        "of the times table",
        "beyond the times table",
    }


def test_solutions_are_marked_where_their_author_calculated(tmp_path: Path) -> None:
    path = tmp_path / "gsm8k.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in GSM8K))
    (text,) = mark_solutions(load_problems(str(path)), find_prompt("gsm8k"))
    assert "<<" not in text.text
    assert "####" not in text.text
    found = [
        (place.kind.removeprefix("problem_"), text.text[place.start : place.end]) for place in text.places
    ]
    assert found == [
        *(("operand", "48"), ("operand", "2"), ("result", "24")),
        *(("operand", "48"), ("result_again", "24"), ("result", "72")),
        *(("operand", "2"), ("result_again", "72"), ("result", "144.00")),
    ]
    assert text.chat[-1]["role"] == "user"
    assert GSM8K[0]["question"] in text.chat[-1]["content"]


def test_questions_and_answers() -> None:
    for question in make_questions(5):
        *shots, asked = question.text.splitlines()
        for line in [*shots, f"{asked} {question.answer}"]:
            left, right = line.split(" = ")
            assert eval(left) == int(right)  # as made here, digits and a sign
        assert len(shots) == 4
        assert f"{asked} {question.answer}" not in shots
    right = mark_answer(question, f" {question.answer}\n1 + 1")
    wrong = mark_answer(question, f"{question.answer + 1}")
    assert right is not None
    assert wrong is not None
    assert right.text == f"{question.text} {question.answer}"
    assert (right.places[0].kind, wrong.places[0].kind) == ("written_right", "written_wrong")
    assert wrong.text[wrong.places[0].start :] == str(question.answer + 1)
    assert mark_answer(question, " x = 5") is None


# --- places


@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_place_is_the_token_before_the_numbers_first(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    for text in SENTENCES:
        (mark,) = text.places
        encoded = tokenizer(text.text, return_offsets_mapping=True)
        offsets = np.array(encoded["offset_mapping"])
        place = place_before(offsets, mark.start)
        assert place is not None
        # Nothing of the number has been read at the place, and what comes next begins it.
        read = tokenizer.decode(encoded["input_ids"][1 : place + 1])
        following = tokenizer.decode(encoded["input_ids"][1 : place + 2])
        assert text.text[: mark.start].startswith(read)
        assert following.strip() != read.strip()
        assert following.startswith(text.text[: mark.start])
        assert following[mark.start].isdigit()
        # A number whose first token takes the space with it is measured before that space.
        assert read == text.text[: mark.start - (following[len(read)] == " ")]


def test_the_three_tokenizers_differ() -> None:
    pieces = {name: t.tokenize("n = 68 and 12") for name, t in TOKENIZERS.items()}
    assert "6" in pieces["single digits"]
    assert any(re.fullmatch("Ġ?[0-9]{2}", piece) for piece in pieces["merged digits"])
    assert len(pieces["bytes"]) == len("n = 68 and 12")


def test_no_place_before_a_number_that_begins_the_text() -> None:
    offsets = np.array([[0, 1], [1, 2], [2, 4]])
    assert [place_before(offsets, at) for at in (0, 1, 2, 3, 4)] == [None, 0, 1, 1, None]


# --- measures


def tiny(tokenizer: Any, **options: Any) -> PHiModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 3}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=2048, **sizes))
    lens = philens.attach(base, philens.PHiConfig(**({"layer": 1, "prior_heads": 2} | options)))
    with torch.no_grad():
        for parameter in lens.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    lens.phi.requires_grad_(True)
    return lens.eval()


@pytest.mark.parametrize("name", TOKENIZERS)
def test_every_measure_is_that_of_scoring_at_the_place(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    lens = tiny(tokenizer)
    chosen = SENTENCES[::37]
    (table,) = score_places(lens, tokenizer, chosen).values()
    metrics = [
        "phi",
        "surprisal",
        "surprisal_with_layer",
        "entropy",
        "margin",
        "state_norm",
        "phi_untrained",
        "settling_depth",
    ]
    scored = score(lens, tokenizer, [text.text for text in chosen], metrics=metrics)
    assert len(table) == len(chosen)
    for row, text, one in zip(table.to_dict("records"), chosen, scored, strict=True):
        at = place_before(one.offsets, text.places[0].start)
        assert row["position"] == at
        assert row["text"] == text.name
        assert row["number"] == text.text[slice(*text.places[0][1:3])]
        for metric in metrics:
            np.testing.assert_allclose(row[metric], one.columns[metric][at], rtol=1e-4)
            if metric in ("surprisal", "surprisal_with_layer", "entropy", "margin"):
                np.testing.assert_allclose(row[f"{metric}_next"], one.columns[metric][at + 1], rtol=1e-4)


def test_solutions_are_read_after_their_problems(tmp_path: Path) -> None:
    path = tmp_path / "gsm8k.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in GSM8K))
    marked = mark_solutions(load_problems(str(path)), find_prompt("gsm8k"))
    lengths = []
    for has_template in (True, False):
        tokenizer = byte_tokenizer()
        if not has_template:
            tokenizer.chat_template = None
        (table,) = score_places(tiny(tokenizer), tokenizer, marked).values()
        assert table["number"].tolist()[2] == "24"
        # In bytes the token before a number is the character before it.
        before = [marked[0].text[place.start - 1] for place in marked[0].places]
        assert table["token"].tolist() == before
        assert table["position"].min() > len(GSM8K[0]["question"])
        lengths.append(table["position"].tolist())
    assert lengths[0] != lengths[1]


def test_several_layers_have_a_table_each() -> None:
    tokenizer = TOKENIZERS["bytes"]
    lens = tiny(tokenizer, layer=None, layers=(0, 2), mode="observe")
    found = score_places(lens, tokenizer, SENTENCES[:4])
    assert list(found) == ["model.layers.0", "model.layers.2"]
    scores = score(lens, tokenizer, SENTENCES[0].text)[0]
    for path, table in found.items():
        assert "surprisal_with_layer" not in table
        np.testing.assert_allclose(
            table["phi"][0], scores.columns[f"phi@{path}"][table["position"][0]], rtol=1e-4
        )
        assert {"phi_untrained", "state_norm", "step_length", "entropy_next"} <= set(table)
    first, second = found.values()
    assert (first["phi_untrained"] != second["phi_untrained"]).all()


def test_quick_leaves_out_the_logit_lens() -> None:
    tokenizer = TOKENIZERS["bytes"]
    lens = tiny(tokenizer)
    whole, quick = (
        next(iter(score_places(lens, tokenizer, SENTENCES[:4], quick=quick).values()))
        for quick in (False, True)
    )
    assert set(whole) - set(quick) == {"settling_depth", "logit_lens_divergence"}
    pd.testing.assert_frame_equal(quick, whole[list(quick)], rtol=1e-4)


def test_columns_of_the_base_are_taken_over() -> None:
    tokenizer = TOKENIZERS["bytes"]
    lens = tiny(tokenizer)
    (whole,) = score_places(lens, tokenizer, SENTENCES[:4]).values()
    (again,) = score_places(lens, tokenizer, SENTENCES[:4], base_of=whole).values()
    pd.testing.assert_frame_equal(again[list(whole)], whole, rtol=1e-4)


class Digits(torch.nn.Module):
    """After a sign, a space, a seven and a line break: 7, whatever was asked."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__()
        self.config = LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=4, num_attention_heads=1, num_hidden_layers=1
        )
        self.embed = torch.nn.Embedding(len(tokenizer), 4)
        self.blocks = torch.nn.ModuleList([torch.nn.Identity()])
        self.following = {a: tokenizer(b).input_ids[1] for a, b in (("=", " "), (" ", "7"), ("7", "\n"))}
        self.following = {tokenizer(a).input_ids[1]: b for a, b in self.following.items()}

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        states = self.blocks[0](self.embed(input_ids))
        logits = torch.zeros(*input_ids.shape, len(self.embed.weight)) + 0 * states.sum()
        for token, after in self.following.items():
            logits[..., after] += 5.0 * (input_ids == token)
        return logits


def test_right_and_wrong_answers_are_told_apart() -> None:
    tokenizer = TOKENIZERS["bytes"]
    lens = philens.attach(
        Digits(tokenizer), philens.PHiConfig(module="blocks.0", prior_heads=1, mode="observe")
    )
    questions = [question for question in make_questions(30) if question.detail == "difference"]
    found = written(lens, tokenizer, questions)
    assert [text.text for text in found] == [f"{question.text} 7" for question in questions]
    right = [text.places[0].kind == "written_right" for text in found]
    assert right == [question.answer == 7 for question in questions]
    assert 0 < sum(right) < len(right)


# --- statistics


def made(effect: float, noise: float = 1.0, count: int = 40, seed: int = 0) -> pd.DataFrame:
    """A table of places where phi is surprisal and norm with weights, and where worked out `effect` more."""
    random = np.random.default_rng(seed)
    rows = []
    for text in make_sentences(count):
        kind = text.places[0].kind
        role = KINDS[kind]
        row = {name: random.normal() for name in (*GIVEN["baselines"], "phi_untrained")}
        row["state_norm"] += role == "worked"
        row["surprisal_next"] -= role == "worked"
        row |= {"text": text.name, "kind": kind, "role": role, "detail": text.places[0].detail}
        row |= {"template": text.template, "held_out": text.held_out}
        row["phi"] = 3 * row["state_norm"] - 2 * row["surprisal_next"] + effect * (role == "worked")
        row["phi"] += noise * random.normal()
        rows.append(row)
    return pd.DataFrame(rows)


def test_what_is_planted_is_found() -> None:
    results = measure_results(made(4.0), resamples=300)
    effects = results["effects"]
    # 3 from the norm and 2 from the surprisal go when they are held fixed.
    assert abs(effects["nothing"]["nats"]["value"] - 9) < 0.8
    low, high = effects["baselines"]["nats"]["ci95"]
    assert low < 4 < high
    assert high - low < 1.5
    assert results["holds"]
    assert results["above_every_other"]
    assert len([item for item in results["contrasts"] if item["first"] == "worked"]) == 7
    assert results["classifiers"]["phi"]["sentences"]["value"] > 0.9
    gain = next(item for item in results["gains"] if item["first"] == "baselines_and_phi")
    assert gain["sentences"]["ci95"][0] > 0


def test_forms_of_sentences_are_told_apart() -> None:
    """Phi is high where the model calculates: in equations, here."""
    table = made(0.0)
    worked, equation = table["role"] == "worked", table["template"].isin(("equation", "held-out equation"))
    table.loc[worked & equation, "phi"] += 50
    forms = measure_results(table, resamples=100)["forms"]
    assert list(forms) == ["equation", "statement", "list"]
    for form, sides in forms.items():
        rows = table[table["template"].isin((form, f"held-out {form}"))]
        for side in ("worked", "other"):
            phi = rows[rows["role"] == side]["phi"]
            assert sides[side]["places"] == len(phi) > 30
            assert sides[side]["phi"]["mean"] == pytest.approx(phi.mean())
        high = sides["worked"]["phi"]["ci95"][0] > sides["other"]["phi"]["ci95"][1] + 30
        assert high == (form == "equation")


def test_what_the_controls_explain_does_not_hold() -> None:
    results = measure_results(made(0.0), resamples=300)
    assert results["effects"]["nothing"]["nats"]["ci95"][0] > 3
    low, high = results["effects"]["baselines"]["nats"]["ci95"]
    assert low < 0 < high
    assert results["above_every_other"]
    assert not results["beyond_controls"]
    assert not results["holds"]


def test_groups_against_each_other_by_hand() -> None:
    random = np.random.default_rng(0)
    values, group = random.normal(size=60), np.arange(60) % 3 == 0
    found = contrast(values, group, np.arange(60), resamples=200)
    first, second = values[group], values[~group]
    pooled = np.sqrt((19 * first.var(ddof=1) + 39 * second.var(ddof=1)) / 58)
    assert found.difference.value == pytest.approx(first.mean() - second.mean())
    assert found.d.value == pytest.approx((first.mean() - second.mean()) / pooled)
    low, high = found.difference.ci95
    assert high - low == pytest.approx(
        2 * 2.0 * np.sqrt(first.var(ddof=1) / 20 + second.var(ddof=1) / 40), rel=0.25
    )
    assert np.isnan(contrast([1.0, 1.0, 1.0], [True, False, False], [0, 1, 2]).d.value)


def test_auroc_by_counting_pairs() -> None:
    random = np.random.default_rng(1)
    scores, positive = random.integers(0, 6, 50).astype(float), random.random(50) < 0.4
    pairs = [(a > b) + 0.5 * (a == b) for a in scores[positive] for b in scores[~positive]]
    found = auroc(scores, positive, np.arange(50), resamples=200)
    assert found.value == pytest.approx(np.mean(pairs))
    assert auroc(-scores, positive, np.arange(50), resamples=50).value == pytest.approx(1 - np.mean(pairs))
    assert found.ci95[0] < found.value < found.ci95[1]
    assert auroc([0.0, 1.0, 2.0], [False, False, True], [0, 1, 2]).value == 1.0
    assert np.isnan(auroc([1.0, 2.0], [True, True], [0, 1]).value)
    same = difference(found, auroc(scores, positive, np.arange(50), resamples=200))
    assert same.value == 0
    assert not same.samples.any()  # the same documents are drawn for both


def test_a_slope_is_that_of_least_squares() -> None:
    random = np.random.default_rng(2)
    x, z = (random.random(80) < 0.5).astype(float), random.normal(size=80)
    z = z + x
    y = 5 * x - 3 * z + 100 + random.normal(size=80)
    by_hand = np.linalg.lstsq(np.stack([np.ones(80), x, z], 1), y, rcond=None)[0]
    assert slope(x, y, np.arange(80), [z]).value == pytest.approx(by_hand[1])
    assert slope(x, y, np.arange(80)).value == pytest.approx(y[x == 1].mean() - y[x == 0].mean())
    # A covariate twice, or a constant, changes nothing; one that is x leaves nothing.
    assert slope(x, y, np.arange(80), [z, z, np.ones(80)]).value == pytest.approx(by_hand[1])
    assert np.isnan(slope(x, y, np.arange(80), [2 * x + 1]).value)


def test_a_classifier_finds_the_direction() -> None:
    random = np.random.default_rng(3)
    positive = random.random(400) < 0.3
    columns = [random.normal(size=400) * 10 + 100, random.normal(size=400) - 2.0 * positive]
    fitted = fit_classifier(columns, positive)
    assert abs(fitted.weights[0]) < 0.4
    assert fitted.weights[1] < -1.5
    # Both groups weigh the same, however many rows they have.
    assert fitted(columns)[positive].mean() > 0 > fitted(columns)[~positive].mean()
    assert np.isnan(fitted([[np.nan], [0.0]]))[0]
    with pytest.raises(InputError, match="A classifier is fitted on rows of two groups;"):
        fit_classifier(columns, np.ones(400))


def test_a_table_without_other_numbers() -> None:
    table = made(1.0, count=6)
    with pytest.raises(InputError, match="There are no places to compare;"):
        measure_results(table[table["role"] == "worked"])


def test_constant_columns_are_no_obstacle() -> None:
    table = made(1.0, count=6).assign(margin=1.0)
    assert measure_results(table, resamples=50)["effects"]["baselines"]["nats"]["value"] is not None


# --- the command


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with two layers kept beside it, and problems."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = TOKENIZERS["single digits"]
    for name, layer in (("one", 1), ("two", 0)):
        lens = tiny(tokenizer, layer=layer, mode="observe")
        lens.save_pretrained(folder / name)
    lens.base.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    (folder / "gsm8k.jsonl").write_text("".join(json.dumps(row) + "\n" for row in GSM8K))
    (folder / "plain.jsonl").write_text(json.dumps({"problem": "1 + 1?", "answer": "2"}) + "\n")
    return folder


def test_the_command(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapters = f"{model / 'one'},{model / 'two'}"
    options = f"--sentences 6 --problems {model / 'gsm8k.jsonl'} --output {tmp_path}"
    command = f"reproduce results --model {model / 'base'} --adapter {adapters} {options}"
    assert main(command.split()) == 0
    said = capsys.readouterr().out
    assert "layer by layer" in said
    assert f"Wrote {tmp_path / 'results'}." in said
    folder = tmp_path / "results"
    assert {path.name for path in folder.iterdir()} == {
        "results.json",
        *(f"{name}.csv" for name in ("kinds", "forms", "contrasts", "effects", "places")),
        *(f"{name}.{end}" for name in ("results", "results-2", "worked_sum") for end in ("png", "svg")),
        "examples.html",
    }
    results = json.loads((folder / "results.json").read_text())
    assert [layer["insertion_point"] for layer in results["layers"]] == ["model.layers.1", "model.layers.0"]
    assert [layer["adapter"] for layer in results["layers"]] == adapters.split(",")
    for layer in results["layers"]:
        assert set(SENTENCE_KINDS) <= set(layer["kinds"])
        assert {"problem_result", "problem_operand", "problem_result_again"} <= set(layer["kinds"])
        assert set(layer["effects"]) == set(GIVEN)
        assert set(layer["classifiers"]) == set(PREDICTORS)
        assert set(layer["classifiers"]["phi"]) == {"sentences", "problems"}
    first, second = results["layers"]
    # What belongs to the base is the same, what belongs to the layer is not.
    assert first["kinds"]["sum"]["surprisal_next"] == second["kinds"]["sum"]["surprisal_next"]
    assert first["kinds"]["sum"]["phi"] != second["kinds"]["sum"]["phi"]
    rows = list(csv.DictReader(io.StringIO((folder / "places.csv").read_text())))
    assert len(rows) >= 2 * (6 * len(SENTENCE_KINDS) + 9)
    assert (folder / "worked_sum.png").read_bytes()[:4] == b"\x89PNG"
    console = Console(file=io.StringIO(), width=100)
    for table in tables(results):
        console.print(table)
    console.print(layers_table(results))


def test_a_tables_lines_fit_eighty_characters(model: Path, tmp_path: Path) -> None:
    results = reproduce_results(model / "base", tmp_path, [str(model / "one")], sentences=6)
    console = Console(file=io.StringIO(), width=80)
    for table in tables(results):
        console.print(table)
    text = console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    assert "…" not in text
    assert "unknown operation" in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--model {base}", "No PHi layer was named for {base}; give --adapter, or the folder of a run."),
        (
            "--model {base} --adapter {one} --sentences 5",
            "sentences must be at least 6, one for each template, not 5.",
        ),
        (
            "--model {base} --adapter {one} --problems {plain}",
            "No solution of {plain} says where a result was calculated (<<48/2=24>>); give GSM8K's.",
        ),
        ("--model {base} --adapter {one},", "An --adapter is empty; give folders or Hub ids as A,B,C."),
    ],
)
def test_bad_input(
    options: str, message: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = {name: model / name for name in ("base", "one")} | {"plain": model / "plain.jsonl"}
    command = f"reproduce results {options.format(**names)} --output {tmp_path / 'out'}"
    assert main(command.split()) == 2
    assert capsys.readouterr().err == f"philens: error: {message.format(**names)}\n"
    assert not (tmp_path / "out").exists()


def test_a_text_with_its_tokens_coloured() -> None:
    tokenizer = TOKENIZERS["single digits"]
    lens = tiny(tokenizer)
    text = "23 + 45 = 68 $x$ " + "and so on " * 12
    scores = score(lens, tokenizer, text)[0]
    figure = figure_tokens(scores)
    assert len(figure.axes) >= 2
    drawn = "".join(item.get_text() for item in figure.axes[0].texts)
    assert drawn == "".join(scores.pieces())
    assert figure.axes[0].get_title(loc="left") == "phi (nats)"
    with pytest.raises(InputError, match="There is no column 'ph'"):
        figure_tokens(scores, ["ph"])
