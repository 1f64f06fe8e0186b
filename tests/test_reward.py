"""A lens as a reward function, by itself and in TRL's GRPOTrainer."""

import numpy as np
import pandas as pd
import pytest
import torch

from conftest import make_llama
from philens.bases.tokenizer import byte_tokenizer, character_tokenizer
from philens.reasoning.reward import PHiReward
from philens.reasoning.solutions import measure_replies
from philens.support.errors import ConfigError, InputError
from test_score import Calls, lens_of

CHARACTERS = character_tokenizer()
BYTES = byte_tokenizer()
CHAT = [{"role": "user", "content": "What is 2 + 3?"}]


def reply(text):
    return [{"role": "assistant", "content": text}]


@pytest.fixture
def small():
    return lens_of(make_llama())


@pytest.mark.parametrize(
    ("rule", "column", "sign"),
    [
        ("highest_phi", "phi_mean", 1),
        ("lowest_phi", "phi_mean", -1),
        ("lowest_surprisal", "surprisal_mean", -1),
        ("highest_entropy_max", "entropy_max", 1),
        ("shortest", "tokens", -1),
    ],
)
def test_the_reward_is_the_rules_column(small, rule, column, sign):
    reward = PHiReward(small, CHARACTERS, rule)
    assert reward.__name__ == rule
    prompts, completions = ["2 + 3 = ", "x"], ["5", "hello"]
    found = reward(prompts=prompts, completions=completions, completion_ids=[[1], [2]], answer=["5", "y"])
    table = measure_replies(small, CHARACTERS, prompts, completions)
    assert found == pytest.approx((sign * table[column]).tolist(), rel=1e-5)
    assert all(isinstance(value, float) for value in found)


def test_columns_of_a_table(small):
    table = pd.DataFrame({"prompt": ["a", "b"], "completion": ["cd", "ef"]}, index=[5, 5])
    reward = PHiReward(small, CHARACTERS)
    assert reward(table["prompt"], table["completion"]) == reward(["a", "b"], ["cd", "ef"])


def test_chats():
    lens = lens_of(make_llama(vocab_size=512))
    reward = PHiReward(lens, BYTES)
    found = reward([CHAT] * 3, [reply("5"), reply("six"), [*reply("5?"), *CHAT, *reply("six")]])
    longer = [*CHAT, *reply("5?"), *CHAT]
    expected = measure_replies(lens, BYTES, [CHAT, CHAT, longer], ["5", "six", "six"])
    assert found == pytest.approx(expected["phi_mean"].tolist(), rel=1e-5)


@pytest.mark.parametrize("rule", ["highest_phi", "lowest_surprisal"])
def test_silence_does_not_pay(small, rule):
    reward = PHiReward(small, CHARACTERS, rule)
    found = reward(["a"] * 4, ["", "bcd", "e", ""])
    assert found[0] == found[3] == min(found[1], found[2])
    assert reward(["a"] * 2, ["", ""]) == [0.0, 0.0]
    assert reward([CHAT], [reply("")]) == [0.0]


def test_only_what_the_rule_needs_runs(small):
    calls = Calls(small)
    PHiReward(small, CHARACTERS)(["a"], ["b"])
    assert calls.count == {"below": 1, "above": 0, "head": 0, "layer": 1}


def test_the_lens_stays_as_it_was(small):
    small.train()
    small.base.model.layers[0].eval()
    modes = [module.training for module in small.modules()]
    before = {name: value.clone() for name, value in small.state_dict().items()}
    with torch.enable_grad():
        PHiReward(small, CHARACTERS)(["a"], ["b"])
        assert torch.is_grad_enabled()
    assert [module.training for module in small.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in small.state_dict().items())
    assert all(parameter.grad is None for parameter in small.parameters())


def test_what_cannot_be_rewarded(small):
    with pytest.raises(ConfigError, match="There is no rule"):
        PHiReward(small, CHARACTERS, "best")
    with pytest.raises(InputError, match="did you mean highest_phi "):
        PHiReward(small, CHARACTERS, "highest_phy")(["a"], ["b"])
    for prompt, completion in ((CHAT, [{"role": "assistant"}]), (CHAT, ["b"]), ("a", reply("b")), (CHAT, [])):
        with pytest.raises(InputError, match="A completion is a string, or after a chat a list of messages"):
            PHiReward(small, CHARACTERS)([prompt], [completion])


@pytest.mark.parametrize("conversational", [False, True], ids=["text", "chat"])
def test_grpo_trains_by_it(tmp_path, conversational):
    pytest.importorskip("trl")
    from datasets import Dataset
    from pyarrow import parquet
    from trl import GRPOConfig, GRPOTrainer

    lens = lens_of(make_llama(vocab_size=512))
    # The policy has weights of its own.
    torch.manual_seed(7)
    policy = make_llama(vocab_size=512, initializer_range=0.02)
    policy_before = {name: value.clone() for name, value in policy.state_dict().items()}
    lens_before = {name: value.clone() for name, value in lens.state_dict().items()}
    questions = [f"What is {number} + 3?" for number in range(4)]
    rows = [{"prompt": [{"role": "user", "content": text}] if conversational else text} for text in questions]
    trainer = GRPOTrainer(
        model=policy,
        reward_funcs=PHiReward(lens, BYTES),
        args=GRPOConfig(
            output_dir=str(tmp_path),
            max_steps=3,
            per_device_train_batch_size=4,
            num_generations=4,
            max_completion_length=12,
            learning_rate=1e-3,
            logging_steps=1,
            log_completions=True,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            bf16=False,
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=byte_tokenizer(),
    )
    trainer.train()
    means = [entry["rewards/highest_phi/mean"] for entry in trainer.state.log_history if "reward" in entry]
    files = sorted((tmp_path / "completions").iterdir())
    assert len(means) == len(files) == 3
    for mean, file in zip(means, files, strict=True):
        logged = parquet.read_table(file).to_pydict()
        # Older versions of TRL wrote the text of a conversation.
        texts = [one if isinstance(one, str) else one[0]["content"] for one in logged["completion"]]
        by_hand = measure_replies(lens, BYTES, logged["prompt"], texts)["phi_mean"]
        assert len(texts) == 4
        assert logged["highest_phi"] == pytest.approx(by_hand.tolist(), rel=1e-4)
        assert mean == pytest.approx(by_hand.mean(), rel=1e-4)
        assert np.std(logged["highest_phi"]) > 0
    assert not all(torch.equal(value, policy_before[name]) for name, value in policy.state_dict().items())
    assert all(torch.equal(value, lens_before[name]) for name, value in lens.state_dict().items())
    assert not any(parameter.grad is not None for parameter in lens.parameters())
