"""Generation: transformers' own, with scores that are those of the finished text, while it comes too."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    Gemma4TextConfig,
    GenerationConfig,
    MambaConfig,
    RwkvConfig,
    StoppingCriteria,
)
from transformers.generation import StoppingCriteriaList

from conftest import make_gpt2, make_llama
from philens.bases.lstm import LSTMConfig
from philens.bases.tokenizer import byte_tokenizer, character_tokenizer
from philens.lens.config import PHiConfig
from philens.lens.losses import token_surprisal
from philens.lens.model import attach
from philens.scoring.streaming import stream
from philens.support.errors import InputError

GREEDY = {"do_sample": False, "max_new_tokens": 8}
CONFIGS = {
    # The last two blocks read the keys and values of those below: the cache holds placeholders for them.
    "gemma4": lambda: Gemma4TextConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_kv_shared_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        global_head_dim=8,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=128,
        layer_types=["sliding_attention", "full_attention"] * 2,
        sliding_window=4,
        initializer_range=0.2,
    ),
    "mamba": lambda: MambaConfig(
        vocab_size=128, hidden_size=32, num_hidden_layers=3, state_size=8, initializer_range=0.2
    ),
    "lstm": lambda: LSTMConfig(
        vocab_size=128, hidden_size=32, intermediate_size=32, num_hidden_layers=3, initializer_range=0.2
    ),
}


def make(name, **options):
    if name in CONFIGS:
        torch.manual_seed(0)
        base = AutoModelForCausalLM.from_config(CONFIGS[name]()).eval()
    else:
        base = {"llama": make_llama, "gpt2": make_gpt2}[name](**options)
    base.generation_config = GenerationConfig(pad_token_id=0)
    return base


def shaken(base, **options):
    lens = attach(base, PHiConfig(**({"layer": 1, "prior_heads": 2, "prior_depth": 2} | options)))
    with torch.no_grad():
        for parameter in lens.phi.parameters():
            parameter.normal_(std=0.3)
    return lens.eval()


@pytest.fixture
def lens():
    return shaken(make("llama"))


def prompts(rows=2, length=6):
    return torch.randint(3, 128, (rows, length), generator=torch.Generator().manual_seed(1))


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4, equal_nan=True)


@torch.no_grad()
def directly(lens, ids):
    """Phi and surprisal (T,) of a text alone."""
    output = lens(ids[None])
    return None if output.phi is None else output.phi[0], token_surprisal(output, ids[None])[0]


def assert_scored(lens, generation, real=None):
    """Every row's scores are those of its real tokens read alone; NaN elsewhere."""
    real = torch.ones_like(generation.sequences, dtype=torch.bool) if real is None else real
    for row, ids in enumerate(generation.sequences):
        phi, surprisal = directly(lens, ids[real[row]])
        close(generation.surprisal[row, real[row]], surprisal)
        assert generation.surprisal[row, ~real[row]].isnan().all()
        if phi is None:
            assert generation.phi is None
        else:
            close(generation.phi[row, real[row]], phi)
            assert generation.phi[row, ~real[row]].isnan().all()


# A PeftModel, whose adapters are in its modules


@pytest.mark.parametrize("options", [{}, {"mode": "observe"}])
def test_a_peft_model(options):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    lens = shaken(peft.get_peft_model(make("llama"), config), **options)
    assert lens.module_paths == ["base_model.model.model.layers.1"]
    for settings in ({}, {"num_beams": 2}, {"do_sample": True}):
        assert_scored(lens, lens.generate(prompts(), **(GREEDY | settings)))
    seen = []
    generation = lens.generate(prompts(1), on_token=lambda *token: seen.append(token), **GREEDY)
    close(torch.tensor([phi for _, phi, _ in seen]), generation.phi[0, generation.prompt_length :])
    assert lens.check().ok


# Every way of generating


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma4", "mamba", "lstm"])
@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False},
        {"do_sample": True, "temperature": 1.5, "top_k": 20},
        {"do_sample": False, "num_beams": 4, "num_return_sequences": 3},
        {"do_sample": True, "num_beams": 2},
        {"do_sample": True, "num_return_sequences": 2},
    ],
    ids=["greedy", "sampling", "beams", "sampled beams", "several"],
)
def test_scores_are_those_of_the_finished_text(name, options):
    lens, ids = shaken(make(name)), prompts()
    generation = lens.generate(ids, max_new_tokens=8, **options)
    count = options.get("num_return_sequences", 1)
    assert generation.sequences.shape == generation.phi.shape == generation.surprisal.shape == (2 * count, 14)
    assert generation.prompt_length == 6
    assert torch.equal(generation.sequences[:, :6], ids.repeat_interleave(count, 0))
    assert generation.output is generation.sequences
    assert_scored(lens, generation)
    with lens.disabled():
        assert_scored(lens, lens.generate(ids, max_new_tokens=8, **options))


def test_the_layer_is_in_the_path(lens):
    """Greedy tokens are the likeliest with the layer in the path, and others than the base's."""
    ids = prompts()
    generation = lens.generate(ids, **GREEDY)
    with torch.no_grad():
        logits = lens(generation.sequences).logits
    assert torch.equal(logits[:, 5:-1].argmax(-1), generation.sequences[:, 6:])
    with lens.disabled():
        plain = lens.generate(ids, **GREEDY)
        assert torch.equal(plain.sequences, lens.base.generate(ids, **GREEDY))
    assert not torch.equal(plain.sequences, generation.sequences)


@pytest.mark.parametrize("options", [{"layer": 1}, {"layer": None, "layers": [0, 2]}])
def test_observing_generates_exactly_the_text_of_the_base(options):
    base, ids = make("llama"), prompts()
    every = (
        GREEDY,
        {"do_sample": True, "max_new_tokens": 8},
        GREEDY | {"num_beams": 3},
    )
    plain = []
    for settings in every:
        torch.manual_seed(3)
        plain.append(base.generate(ids, **settings))
    lens = shaken(base, mode="observe", **options)
    for settings, expected in zip(every, plain, strict=True):
        torch.manual_seed(3)
        generation = lens.generate(ids, **settings)
        assert torch.equal(generation.sequences, expected)
        assert generation.phi.shape == (*expected.shape, 2)[: 2 + ("layers" in options)]
        assert_scored(lens, generation)


def test_a_seed_repeats_a_sample(lens):
    def sample(seed):
        torch.manual_seed(seed)
        return lens.generate(prompts(), do_sample=True, max_new_tokens=8).sequences

    assert torch.equal(sample(1), sample(1))
    assert not torch.equal(sample(1), sample(2))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_assisted_generation_gives_the_greedy_text(name):
    lens = shaken(make(name))
    ids = prompts(1, 4).repeat(1, 3)
    greedy = lens.generate(ids, **GREEDY)
    for assistance in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": make(name)}):
        generation = lens.generate(ids, **GREEDY, **assistance)
        assert torch.equal(generation.sequences, greedy.sequences)
        assert_scored(lens, generation)


def test_everything_that_transformers_returns_is_kept(lens):
    generation = lens.generate(
        prompts(), return_dict_in_generate=True, output_logits=True, max_new_tokens=4, do_sample=True
    )
    assert generation.sequences is generation.output.sequences
    logprobs = torch.stack(generation.output.logits, 1).log_softmax(-1)
    chosen = generation.sequences[:, 6:, None]
    close(generation.surprisal[:, 6:], -logprobs.gather(2, chosen)[..., 0])


def test_modes_are_as_before(lens):
    lens.train()
    lens.base.eval()
    before = [(module, module.training) for module in lens.modules()]
    lens.generate(prompts(), **GREEDY)
    assert all(module.training == training for module, training in before)
    hooks = [len(module._forward_hooks) for module in lens.modules()]
    lens.generate(prompts(1), on_token=lambda *_: None, **GREEDY)
    assert hooks == [len(module._forward_hooks) for module in lens.modules()]


# Padding and early ends


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma4", "mamba", "lstm"])
def test_prompts_of_different_lengths(name):
    lens, rows = shaken(make(name)), [prompts(1, length)[0] for length in (7, 3, 1)]
    ids, mask = torch.zeros(3, 7, dtype=torch.long), torch.zeros(3, 7, dtype=torch.long)
    for number, row in enumerate(rows):
        ids[number, 7 - len(row) :], mask[number, 7 - len(row) :] = row, 1
    generation = lens.generate(ids, attention_mask=mask, **GREEDY)
    real = torch.cat((mask, torch.ones(3, 8, dtype=torch.long)), 1) == 1
    assert_scored(lens, generation, real)
    for number, row in enumerate(rows):
        alone = lens.generate(row[None], **GREEDY)
        assert torch.equal(generation.sequences[number, 7 - len(row) :], alone.sequences[0])


@pytest.mark.parametrize("where", ["option", "option list", "config given", "config of the model"])
@pytest.mark.parametrize("pad", [0, "the same"])
def test_rows_that_end_early(lens, where, pad):
    ids = prompts()
    text = lens.generate(ids, **GREEDY).sequences
    end = int(text[0, 9])  # the first row's fourth new token
    assert end not in text[0, 6:9]
    assert end not in text[1]
    pad = end if pad == "the same" else pad
    options = {
        "option": {"eos_token_id": end, "pad_token_id": pad},
        "option list": {"eos_token_id": [127, end], "pad_token_id": pad},
        "config given": {"generation_config": GenerationConfig(eos_token_id=end, pad_token_id=pad, **GREEDY)},
        "config of the model": {},
    }[where]
    if not options:
        lens.base.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=pad)
    generation = lens.generate(ids, **options, **({} if "generation_config" in options else GREEDY))
    assert torch.equal(generation.sequences[1], text[1])
    assert torch.equal(generation.sequences[0, :10], text[0, :10])
    assert (generation.sequences[0, 10:] == pad).all()
    real = torch.ones_like(text, dtype=torch.bool)
    real[0, 10:] = False  # the token that ends is scored
    assert_scored(lens, generation, real)


def test_the_token_that_ends_may_be_number_0(lens):
    ids = prompts()
    lens.base.generation_config = GenerationConfig(eos_token_id=0, pad_token_id=0)
    forced = torch.full((2, 128), -1e9)

    def force(input_ids, scores):
        # The first row ends at once, the second never does.
        scores = scores.clone()
        scores[0] = forced[0].index_fill(0, torch.tensor([0]), 0.0)
        scores[1, 0] = -1e9
        return scores

    generation = lens.generate(ids, logits_processor=[force], **GREEDY)
    assert (generation.sequences[0, 6:] == 0).all()
    real = torch.ones_like(generation.sequences, dtype=torch.bool)
    real[0, 7:] = False
    assert_scored(lens, generation, real)


def test_without_an_end_padding_ids_are_tokens_like_others(lens):
    """Nothing is padded where no token ends a row, so a generated 0 is a token."""

    def force(input_ids, scores):
        return torch.full_like(scores, -1e9).index_fill(1, torch.tensor([0]), 0.0)

    generation = lens.generate(prompts(), logits_processor=[force], **GREEDY)
    assert (generation.sequences[:, 6:] == 0).all()
    assert_scored(lens, generation)


@pytest.mark.parametrize("beams", [1, 3])
def test_stop_strings(beams):
    lens, tokenizer = shaken(make("llama")), character_tokenizer()
    ids = prompts()
    text = lens.generate(ids, num_beams=beams, **GREEDY).sequences
    stop = tokenizer.decode([int(text[0, 8])])
    assert stop not in tokenizer.decode(text[1])
    # A token that ends, which is never generated: only then does transformers pad.
    ends = {"eos_token_id": 0, "pad_token_id": 2, "suppress_tokens": [0, 2]}
    options = {"stop_strings": [stop], "tokenizer": tokenizer, "num_beams": beams} | GREEDY
    generation = lens.generate(ids, **options, **ends)
    finished = generation.sequences == 2
    assert beams > 1 or finished[0].nonzero()[0] == 9
    assert_scored(lens, generation, ~finished)


def test_beams_that_a_criterion_ends(lens):
    """transformers fills such rows with -1, which is no token, where no token ends a row."""

    class Short(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return (input_ids[:, -1] % 3 == 0) & (input_ids[:, -1] > 2)

    generation = lens.generate(
        prompts(4), num_beams=3, stopping_criteria=StoppingCriteriaList([Short()]), **GREEDY
    )
    assert (generation.sequences == -1).any()
    assert_scored(lens, generation, generation.sequences != -1)


# Streaming


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma4", "mamba", "lstm"])
@pytest.mark.parametrize("sampled", [False, True])
def test_tokens_come_in_order_each_once_with_their_final_values(name, sampled):
    lens, seen, new = shaken(make(name)), [], []
    options = GREEDY | {"do_sample": sampled}
    torch.manual_seed(4)
    generation = lens.generate(
        prompts(1), on_token=lambda *token: seen.append(token), skip_prompt=False, **options
    )
    assert [token for token, _, _ in seen] == generation.sequences[0].tolist()
    close(torch.tensor([phi for _, phi, _ in seen]), generation.phi[0])
    close(torch.tensor([surprisal for _, _, surprisal in seen]), generation.surprisal[0])
    torch.manual_seed(4)
    assert torch.equal(generation.sequences, lens.generate(prompts(1), **options).sequences)
    assert_scored(lens, generation)
    torch.manual_seed(4)
    lens.generate(prompts(1), on_token=lambda *token: new.append(token), **options)
    assert [token for token, *_ in new] == generation.sequences[0, generation.prompt_length :].tolist()
    close(torch.tensor([values for _, *values in new]), torch.tensor([values for _, *values in seen[-8:]]))


def test_tokens_are_handed_on_while_the_rest_is_generated(lens):
    steps, seen = [], []
    handle = lens.base.register_forward_hook(lambda *_: steps.append(len(seen)))
    lens.generate(prompts(1), on_token=lambda *token: seen.append(token), **GREEDY)
    handle.remove()
    # The prompt; each token but the last, which is not read; the scores of all.
    assert steps == [0, *range(7), 7]
    assert len(seen) == 8


def test_a_stream_that_ends_early(lens):
    text = lens.generate(prompts(1), **GREEDY).sequences
    end = int(text[0, 9])
    seen = []
    lens.generate(
        prompts(1),
        on_token=lambda *token: seen.append(token[0]),
        eos_token_id=end,
        pad_token_id=end,
        **GREEDY,
    )
    assert seen == text[0, 6:10].tolist()


def test_the_prior_goes_on_when_observing():
    lens, seen = shaken(make("llama"), mode="observe"), []
    generation = lens.generate(prompts(1), on_token=lambda *token: seen.append(token), **GREEDY)
    close(torch.tensor([phi for _, phi, _ in seen]), generation.phi[0, generation.prompt_length :])


def test_pieces_join_to_the_text(lens):
    tokenizer, pieces = character_tokenizer(), []
    generation = stream(lens, tokenizer, "some words", lambda *piece: pieces.append(piece), **GREEDY)
    assert "".join(text for text, _, _ in pieces) == tokenizer.decode(generation.sequences[0])
    assert [text for text, _, _ in pieces[:10]] == list("some words")
    close(torch.tensor([phi for _, phi, _ in pieces]), generation.phi[0])


@pytest.mark.parametrize("count", [6, 8, 9, 10])
def test_characters_of_several_tokens_come_whole(count):
    """With a token for each byte, é is two, 🙂 four; values of a character's tokens are summed."""
    tokenizer = byte_tokenizer()
    lens = shaken(make("llama", vocab_size=len(tokenizer)))
    prompt, wanted = "aé", "b🙂é\N{GREEK SMALL LETTER PI}!"
    prompt_ids = tokenizer(prompt)["input_ids"]
    forced = tokenizer(wanted, add_special_tokens=False)["input_ids"]

    def force(input_ids, scores):
        place = input_ids.shape[1] - len(prompt_ids)
        token = forced[place] if place < len(forced) else forced[-1]
        return torch.full_like(scores, -1e9).index_fill(1, torch.tensor([token]), 0.0)

    pieces = []
    generation = stream(
        lens,
        tokenizer,
        prompt,
        lambda *piece: pieces.append(piece),
        do_sample=False,
        max_new_tokens=count,
        logits_processor=[force],
    )
    text = tokenizer.decode(generation.sequences[0])
    assert "".join(piece for piece, _, _ in pieces) == text
    assert sum(phi for _, phi, _ in pieces) == pytest.approx(float(generation.phi.sum()), rel=1e-4)
    characters = [piece for piece, _, _ in pieces]
    assert characters[1:4] == ["a", "é", "b"]
    assert "🙂" in characters
    at = characters.index("🙂")
    assert pieces[at][1] == pytest.approx(float(generation.phi[0, 5:9].sum()), rel=1e-4)
    # A text may end within a character: what there is of it is written all the same.
    assert text.endswith("\N{REPLACEMENT CHARACTER}") == (count in (6, 8))


# Errors


def refused(lens, message, ids=None, **options):
    with pytest.raises(InputError, match=message):
        lens.generate(prompts(1) if ids is None else ids, **(GREEDY | options))


def test_what_cannot_be_streamed(lens):
    follow = {"on_token": lambda *_: None}
    refused(lens, "in one row without padding", prompts(2), **follow)
    refused(lens, "in one row without padding", attention_mask=torch.tensor([[0, 1, 1, 1, 1, 1]]), **follow)
    refused(lens, "not with beams", num_beams=2, **follow)
    refused(lens, "not with beams", num_return_sequences=2, do_sample=True, **follow)
    refused(lens, "not with beams", prompts(1, 3).repeat(1, 2), prompt_lookup_num_tokens=2, **follow)
    refused(lens, "without a cache", use_cache=False, **follow)
    with lens.disabled():
        refused(lens, "with one PHi layer or a shallow head, enabled", **follow)
    several = shaken(make("llama"), layer=None, layers=[0, 1], mode="observe")
    refused(several, "with one PHi layer", **follow)
    # All is as before after an error.
    assert_scored(lens, lens.generate(prompts(), **GREEDY))


def test_models_that_cannot_generate_or_keep_no_cache():
    class Bare(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = torch.nn.Embedding(8, 4), torch.nn.Linear(4, 8)

        def forward(self, x):
            return self.head(self.embed(x))

    lens = attach(Bare(), PHiConfig(module="head", prior_heads=1))
    refused(lens, "Bare has no generate; use a causal model of transformers")
    config = RwkvConfig(vocab_size=128, hidden_size=32, num_hidden_layers=2, attention_hidden_size=32)
    lens = shaken(AutoModelForCausalLM.from_config(config).eval())
    refused(lens, "generates without a cache", on_token=lambda *_: None)
    assert_scored(lens, lens.generate(prompts(1), **GREEDY))
    with pytest.raises(InputError, match="has no cache of the usual kind"):
        lens(prompts(1), use_cache=True)


def test_an_empty_prompt(lens):
    with pytest.raises(InputError, match="The prompt is empty"):
        stream(lens, character_tokenizer(), "", print)


# Cost


def calls_of(lens, *args, **options):
    """The tokens of each row that each run of the first block read, and generation's result."""
    read = []
    hook = lens.base.get_submodule(lens.module_paths[0]).register_forward_hook(
        lambda module, inputs, output: read.append(
            (output if torch.is_tensor(output) else output[0]).shape[1]
        )
    )
    try:
        return read, lens.generate(*args, **options)
    finally:
        hook.remove()


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma4", "mamba", "lstm"])
@pytest.mark.parametrize(
    "options", [{}, {"mode": "observe"}, {"mode": "observe", "layer": None, "layers": [0, 2]}]
)
def test_every_token_is_read_once(name, options):
    lens, ids = shaken(make(name), **options), prompts(3)
    lens.generate(ids, **GREEDY)
    for settings in ({"do_sample": False}, {"do_sample": True, "num_return_sequences": 2}):
        read, generation = calls_of(lens, ids, max_new_tokens=8, **settings)
        assert read == [6] + [1] * 8
        assert_scored(lens, generation)


def test_what_is_not_read_once_takes_one_more_pass():
    lens, ids = shaken(make("llama")), prompts()
    for settings in ({"num_beams": 2}, {"use_cache": False}, {"return_dict_in_generate": True}):
        read, generation = calls_of(lens, ids, **GREEDY, **settings)
        assert read[-1] == 14
        assert_scored(lens, generation)
    # A cache of the user's own is left where generation ended.
    for settings in ({}, {"past_key_values": DynamicCache(config=lens.base.config)}):
        assert_scored(lens, lens.generate(ids, **GREEDY, **settings))
    assert settings["past_key_values"].get_seq_length() == 13


def test_the_head_makes_no_logits_of_the_prompt_but_the_last(lens):
    lens.generate(prompts(), **GREEDY)
    shapes = []
    hook = lens.base.lm_head.register_forward_hook(lambda *call: shapes.append(tuple(call[2].shape)))
    lens.generate(prompts(), **GREEDY)
    hook.remove()
    # What is scored is made in parts: two rows of 14, the last of which predicts nothing.
    assert shapes == [(2, 1, 128)] * 9 + [(26, 128)]
