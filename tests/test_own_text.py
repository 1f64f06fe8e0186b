"""Text that a base writes itself, and a layer trained on nothing else."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from conftest import make_llama
from philens.bases.tokenizer import byte_tokenizer
from philens.support.errors import AdapterError, RecipeError
from philens.training import own_text
from philens.training.folder import RunFolder
from philens.training.opening import load_run
from philens.training.own_text import with_own_text
from philens.training.trainer import train
from tiny import tiny_recipe

PARTS = {
    "chats": {"source": "self", "documents": 5},
    "texts": {"source": "self", "name": "text", "documents": 7},
}


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture(scope="module")
def base(tokenizer):
    return make_llama(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)


@pytest.fixture(autouse=True)
def few_at_once(monkeypatch):
    monkeypatch.setattr(own_text, "AT_ONCE", 3)


def recipe_of(base: str = "base", **changes):
    values = {"data__mixture": {"in_context_language": 1}, "data__parts": PARTS, "model__base": base}
    return tiny_recipe(
        **(values | {"phi_schedule__start_step": 0, "phi_schedule__warmup_steps": 0} | changes)
    )


def written(folder: Path, part: str) -> list[dict]:
    return [json.loads(line) for line in (folder / f"self-{part}.jsonl").read_text().splitlines()]


def test_as_many_documents_as_wanted_of_each_kind(base, tokenizer, tmp_path):
    recipe = with_own_text(recipe_of(), base, tokenizer, RunFolder(tmp_path), True)
    parts = recipe.data.parts
    assert {name: part.source for name, part in parts.items()} == {
        name: str(tmp_path / f"self-{name}.jsonl") for name in PARTS
    }
    chats, texts = (written(tmp_path, name) for name in PARTS)
    assert len(chats) == 5
    assert len(texts) == 7
    assert all([m["role"] for m in chat["messages"]] == ["user", "assistant"] for chat in chats)
    assert len({text["text"] for text in texts}) == 7
    assert all(0 < len(tokenizer(text["text"]).input_ids) <= 2 * recipe.data.length for text in texts)


def test_what_is_written_depends_on_the_seed_alone(base, tokenizer, tmp_path):
    folders = [tmp_path / name for name in ("one", "again", "other")]
    for folder, seed in zip(folders, (0, 0, 1), strict=True):
        folder.mkdir()
        torch.manual_seed(hash(folder))  # whatever was drawn before
        with_own_text(recipe_of(seed=seed), base, tokenizer, RunFolder(folder), True)
    one, again, other = (written(folder, "texts") for folder in folders)
    assert one == again != other


def test_it_goes_on_after_a_stop(base, tokenizer, tmp_path, monkeypatch):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    whole.mkdir(), cut.mkdir()
    with_own_text(recipe_of(), base, tokenizer, RunFolder(whole), True)
    lines = (whole / "self-texts.jsonl").read_text().splitlines(keepends=True)
    (cut / "self-texts.jsonl").write_text("".join(lines[:4]))  # a batch and one document
    (cut / "self-chats.jsonl").write_bytes((whole / "self-chats.jsonl").read_bytes())
    calls = []
    go_on = own_text._go_on
    monkeypatch.setattr(own_text, "_go_on", lambda *args: calls.append(args) or go_on(*args))
    with_own_text(recipe_of(), base, tokenizer, RunFolder(cut), True)
    assert len(calls) == 2  # the second batch and the third of texts, nothing of chats
    assert (cut / "self-texts.jsonl").read_bytes() == (whole / "self-texts.jsonl").read_bytes()


def test_a_damaged_text_is_told(base, tokenizer, tmp_path):
    (tmp_path / "self-texts.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(AdapterError, match=r"self-texts\.jsonl is not readable as text"):
        with_own_text(recipe_of(), base, tokenizer, RunFolder(tmp_path), True)


def test_a_process_that_does_not_write_waits(base, tokenizer, tmp_path):
    recipe = with_own_text(recipe_of(), base, tokenizer, RunFolder(tmp_path), False)
    assert not list(tmp_path.iterdir())
    assert recipe.data.parts["chats"].source.endswith("self-chats.jsonl")


def test_a_chat_is_asked_and_answered_by_the_template(base, tokenizer, tmp_path, monkeypatch):
    prompts = []
    go_on = own_text._go_on
    monkeypatch.setattr(
        own_text,
        "_go_on",
        lambda *args: prompts.append([tokenizer.decode(p) for p in args[2]]) or go_on(*args),
    )
    recipe = recipe_of(data__parts={"chats": PARTS["chats"]})
    with_own_text(recipe, base, tokenizer, RunFolder(tmp_path), True)
    user = written(tmp_path, "chats")[0]["messages"][0]["content"]
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": user}], tokenize=False, add_generation_prompt=True
    )
    assert rendered.startswith(prompts[0][0])
    assert prompts[1][0] == rendered


def test_a_layer_is_trained_without_any_data(base, tokenizer, tmp_path):
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    recipe = recipe_of(
        str(tmp_path / "base"), phi__pressure="distill", phi__mode="observe", phi__pressure_share=0.5
    )
    assert train(recipe, tmp_path / "run") is not None
    lens, found = load_run(tmp_path / "run")
    assert found.data.parts["chats"].source == "self"  # the recipe says what it said
    assert lens.config.pressure == "distill"
    steps = [record for record in RunFolder(tmp_path / "run").metrics() if "divergence" in record]
    assert len(steps) == recipe.train.steps
    assert str(tmp_path) not in (tmp_path / "run" / "adapter" / "README.md").read_text()


def test_a_model_without_generate_cannot_write(tokenizer, tmp_path):
    with pytest.raises(RecipeError, match="Linear has no generate and cannot write the text of source self"):
        with_own_text(recipe_of(), nn.Linear(1, 1), tokenizer, RunFolder(tmp_path), True)


def test_fresh_weights_have_nothing_to_say():
    with pytest.raises(RecipeError, match="A source self is text that a trained base writes"):
        tiny_recipe(data__mixture={"in_context_language": 1}, data__parts=PARTS)
