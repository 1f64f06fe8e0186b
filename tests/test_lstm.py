"""The LSTM language model: nothing but a token's own document may change its result.

Invariances are checked in float64, where a leak between tokens stands far above rounding.
"""

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, DynamicCache, GenerationConfig

from philens.bases.lstm import LSTMBlock, LSTMConfig, LSTMForCausalLM, LSTMModel, LSTMState
from philens.support.errors import ConfigError, InputError

TINY = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "initializer_range": 0.3}
ONE = torch.ones(1, 2, dtype=torch.long)
LENGTHS = [5, 1, 9, 3, 14]


def build(**options) -> Any:
    return LSTMForCausalLM(LSTMConfig(**options))


def close(actual, expected, tolerance=1e-12):
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return build(**TINY).double().eval()


@pytest.fixture
def documents():
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(128, (length,), generator=generator) for length in LENGTHS]


@pytest.fixture
def alone(model, documents):
    """Logits (T, V) of each document read by itself."""
    with torch.no_grad():
        return [model(document[None]).logits[0] for document in documents]


def positions(*lengths):
    return torch.cat([torch.arange(length) for length in lengths])[None]


def reference(model, document):
    """The model of one document written out: a loop over tokens, straight from the definition of an LSTM."""
    x = model.model.embed_tokens(document)
    for block in model.model.layers:
        parameters = block.lstm
        hidden = cell = x.new_zeros(model.config.intermediate_size)
        outputs = []
        for token in block.norm(x):
            gates = parameters.weight_ih_l0 @ token + parameters.bias_ih_l0
            gates = gates + parameters.weight_hh_l0 @ hidden + parameters.bias_hh_l0
            take, keep, new, show = gates.chunk(4)
            cell = keep.sigmoid() * cell + take.sigmoid() * new.tanh()
            hidden = show.sigmoid() * cell.tanh()
            outputs.append(block.out_proj(hidden))
        x = x + torch.stack(outputs)
    return model.lm_head(model.model.norm(x))


@torch.no_grad()
def test_matches_the_definition(model, documents, alone):
    for document, logits in zip(documents, alone, strict=True):
        close(logits, reference(model, document))


@torch.no_grad()
@pytest.mark.parametrize("use_cache", [False, True])
def test_a_document_in_a_pack_equals_it_alone(model, documents, alone, use_cache):
    # Two rows with different packs; caching takes the packed-sequence path and plain reading the padded one.
    rows = torch.stack([torch.cat(documents), torch.cat(documents[::-1])])
    position_ids = torch.cat([positions(*LENGTHS), positions(*LENGTHS[::-1])])
    logits = model(rows, position_ids=position_ids, use_cache=use_cache).logits
    close(logits[0], torch.cat(alone))
    close(logits[1], torch.cat(alone[::-1]))


@torch.no_grad()
def test_very_uneven_documents(model):
    # 40 documents of one token beside one of 40: so much padding that they are packed without a cache too.
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(128, (1, 80), generator=generator)
    position_ids = positions(*[1] * 40, 40)
    logits = model(ids, position_ids=position_ids, use_cache=False).logits[0]
    close(logits[40:], model(ids[:, 40:]).logits[0])
    close(logits[:40], model(ids[:, :40].T).logits[:, 0])


@torch.no_grad()
@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("side", ["left", "right", "middle"])
def test_padding_changes_nothing(model, documents, alone, side, use_cache):
    width = max(LENGTHS) + 3
    ids = torch.full((len(documents), width), 77)
    mask = torch.zeros_like(ids)
    for row, document in enumerate(documents):
        columns = torch.arange(len(document))
        if side == "left":
            columns += width - len(document)
        elif side == "middle":
            columns[len(document) // 2 :] += 2
        ids[row, columns], mask[row, columns] = document, 1
    position_ids = (mask.cumsum(1) - 1).masked_fill(mask == 0, 0)  # what generate makes of a mask
    for given in ({}, {"position_ids": position_ids}):
        logits = model(ids, attention_mask=mask, use_cache=use_cache, **given).logits
        for row, expected in enumerate(alone):
            close(logits[row][mask[row].bool()], expected)


@torch.no_grad()
def test_only_earlier_tokens_of_the_same_document_matter(model, documents):
    ids, position_ids = torch.cat(documents)[None], positions(*LENGTHS)
    before = model(ids, position_ids=position_ids).logits[0]
    for changed in (3, 8, 20):
        other = ids.clone()
        other[0, changed] += 1 if other[0, changed] < 127 else -1
        moved = (model(other, position_ids=position_ids).logits[0] != before).any(-1)
        end = changed + 1
        while end < len(moved) and position_ids[0, end] != 0:
            end += 1
        assert moved[changed:end].all()
        assert not moved[:changed].any()
        assert not moved[end:].any()


def test_gradients_stay_within_a_document(model, documents):
    embeds = model.model.embed_tokens(torch.cat(documents)[None]).detach().requires_grad_()
    logits = model(inputs_embeds=embeds, position_ids=positions(*LENGTHS)).logits
    logits[0, 6:15].square().sum().backward()  # the third document
    moved = embeds.grad[0].abs().sum(-1) > 0
    assert moved.tolist() == [6 <= i < 15 for i in range(sum(LENGTHS))]


@torch.no_grad()
def test_float32_agrees_between_batch_sizes(documents):
    torch.manual_seed(0)
    model = build(**TINY).eval()
    ids, position_ids = torch.cat(documents)[None], positions(*LENGTHS)
    packed = model(ids, position_ids=position_ids).logits[0]
    apart = torch.cat([model(document[None]).logits[0] for document in documents])
    torch.testing.assert_close(packed, apart, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("chunks", [[1] * 32, [7, 25], [4, 1, 3, 24]])
def test_cache_continues_across_calls(model, documents, chunks):
    ids, position_ids = torch.cat(documents)[None], positions(*LENGTHS)
    ids = torch.cat([ids, ids.flip(1)])
    expected = model(ids, position_ids=position_ids).logits
    cache, parts, start = DynamicCache(config=model.config), [], 0
    for size in chunks:
        end = start + size
        out = model(ids[:, start:end], position_ids=position_ids[:, start:end], past_key_values=cache)
        parts.append(out.logits)
        assert out.past_key_values is cache
        assert cache.get_seq_length() == end
        start = end
    close(torch.cat(parts, 1), expected)


@torch.no_grad()
def test_a_row_of_padding_keeps_its_state(model, documents):
    first, second = documents[4][None, :7], documents[4][None, 7:]
    expected = model(documents[4][None]).logits[0, 7:]
    cache = model(first.expand(2, -1), use_cache=True).past_key_values
    gap = torch.ones(2, 10, dtype=torch.long)
    gap[0, 7:] = 0
    model(second[:, :3].expand(2, -1), attention_mask=gap, past_key_values=cache)
    close(model(second.expand(2, -1), past_key_values=cache).logits[0], expected)


@pytest.mark.parametrize("how", [{}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}])
def test_generation_with_and_without_cache(model, documents, how):
    ids = torch.zeros(2, 14, dtype=torch.long)
    mask = torch.zeros_like(ids)
    ids[0], mask[0] = documents[4], 1
    ids[1, 5:], mask[1, 5:] = documents[2], 1
    config = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, **how}
    reads = []
    block = model.model.layers[0]
    handle = block.register_forward_pre_hook(lambda module, args: reads.append(args[0].shape[1]))
    options = {"attention_mask": mask, "return_dict_in_generate": True, "output_logits": True}
    cached = model.generate(ids, generation_config=GenerationConfig(**config), **options)
    handle.remove()
    assert reads == [14] + [1] * 7, "generation read tokens again"
    plain = model.generate(ids, generation_config=GenerationConfig(use_cache=False, **config), **options)
    assert torch.equal(cached.sequences, plain.sequences)
    close(torch.stack(cached.logits), torch.stack(plain.logits))
    if not how:
        for row in range(2):  # the prompt's own padding and batch do not matter
            prompt = ids[row, mask[row].bool()][None]
            assert torch.equal(
                model.generate(prompt, generation_config=GenerationConfig(**config))[0, prompt.shape[1] :],
                cached.sequences[row, 14:],
            )


def test_state_follows_its_row():
    state: Any = LSTMState()
    hidden = torch.arange(6.0).view(3, 2)
    state.update(hidden, -hidden, tokens=5)
    state.reorder_cache(torch.tensor([2, 0, 0]))
    assert torch.equal(state.keys, hidden[[2, 0, 0]])
    assert torch.equal(state.values, -hidden[[2, 0, 0]])
    assert state.get_seq_length() == 5
    with pytest.raises(InputError, match="cropped"):
        state.crop(-1)
    state.reset()
    assert state.get_seq_length() == 0


@torch.no_grad()
def test_a_reset_cache_starts_afresh(model, documents, alone):
    cache = model(documents[0][None], use_cache=True).past_key_values
    cache.reset()
    close(model(documents[2][None], past_key_values=cache).logits[0], alone[2])


@torch.no_grad()
def test_hook_on_a_block_replaces_its_output(model, documents):
    seen = []

    def replace(module, args, output):
        seen.append(output.shape)
        return torch.zeros_like(output)

    handle = model.model.layers[-1].register_forward_hook(replace)
    out = model(documents[2][None], output_hidden_states=True)
    handle.remove()
    assert seen == [(1, 9, 16)]
    assert not out.logits.any()
    assert not out.hidden_states[-1].any()


@torch.no_grad()
def test_hidden_states(model, documents):
    blocks, ids = {}, documents[2][None]
    handles = [
        block.register_forward_hook(lambda module, args, output: blocks.update({module.layer_idx: output}))
        for block in model.model.layers
    ]
    out = model(ids, output_hidden_states=True)
    for handle in handles:
        handle.remove()
    assert len(out.hidden_states) == 4
    assert torch.equal(out.hidden_states[0], model.model.embed_tokens(ids))
    assert torch.equal(out.hidden_states[1], blocks[0])
    assert torch.equal(out.hidden_states[2], blocks[1])
    assert torch.equal(out.hidden_states[3], model.model.norm(blocks[2]))
    assert model(ids).hidden_states is None
    assert model._can_record_outputs == {"hidden_states": LSTMBlock}
    logits, cache = model(ids, return_dict=False)
    assert torch.equal(logits, out.logits)
    assert len(cache) == 3


@torch.no_grad()
def test_logits_to_keep(model, documents, alone):
    ids = documents[4][None]
    close(model(ids, logits_to_keep=2).logits[0], alone[4][-2:])
    close(model(ids, logits_to_keep=torch.tensor([0, 5])).logits[0], alone[4][[0, 5]])


@torch.no_grad()
def test_loss_is_shifted_cross_entropy(model, documents, alone):
    labels = documents[4].clone()
    labels[[3, 9]] = -100
    loss = model(documents[4][None], labels=labels[None]).loss
    log_probabilities = alone[4].log_softmax(-1)
    terms = [-log_probabilities[t - 1, labels[t]] for t in range(1, 14) if labels[t] >= 0]
    close(loss.double(), torch.stack(terms).mean(), 1e-6)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(model, documents, reentrant):
    ids, position_ids = torch.cat(documents)[None], positions(*LENGTHS)

    def gradients():
        model.zero_grad()
        loss = model(ids, position_ids=position_ids, labels=ids, use_cache=True).loss
        loss.backward()
        return loss.detach(), [parameter.grad.clone() for parameter in model.parameters()]

    runs = []
    hook = model.model.layers[1].lstm.register_forward_hook(lambda *_: runs.append(1))
    model.train()
    loss, plain = gradients()
    count = len(runs)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    again, checkpointed = gradients()
    hook.remove()
    assert not {"cache", "past_key_values"} & model(ids, use_cache=True).keys(), "no state updated twice"
    with pytest.raises(InputError, match="while activations are checkpointed"):
        model(ids, cache=DynamicCache(config=model.config))
    assert (count, len(runs)) == (1, 3), "checkpointing runs a block twice"
    close(again, loss)
    for left, right in zip(plain, checkpointed, strict=True):
        close(left, right, 1e-9)


def test_gradients_in_eval_mode(model, documents):
    # cuDNN refuses them unless the LSTM itself is in training mode, whatever the rest of the model is in.
    model.eval()(documents[4][None], labels=documents[4][None]).loss.backward()
    assert model.model.layers[0].lstm.training
    with torch.no_grad():
        model(documents[4][None])
    assert not model.model.layers[0].lstm.training


@pytest.mark.parametrize("tied", [True, False])
def test_reload_gives_the_same_model(documents, tmp_path, tied):
    torch.manual_seed(3)
    model = build(tie_word_embeddings=tied, **TINY).eval()
    model.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path, local_files_only=True)
    assert isinstance(config, LSTMConfig)
    assert config.intermediate_size == 24
    pair: Any = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    loaded, report = pair
    assert isinstance(loaded, LSTMForCausalLM)
    assert not any(report.values()), report
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    state, other = model.state_dict(), loaded.state_dict()
    assert state.keys() == other.keys()
    assert all(torch.equal(state[key], other[key]) for key in state)
    ids = documents[4][None]
    with torch.no_grad():
        assert torch.equal(loaded.eval()(ids).logits, model(ids).logits)
        assert isinstance(AutoModel.from_pretrained(tmp_path), LSTMModel)


def test_paper_size():
    with torch.device("meta"):
        model = build()
    assert len(model.model.layers) == 2
    assert model.config.hidden_size == 768
    assert 0.09e9 < sum(parameter.numel() for parameter in model.parameters()) < 0.11e9


def test_initialisation():
    torch.manual_seed(0)
    model = build(hidden_size=64, intermediate_size=100)
    for block in model.model.layers:
        bias = (block.lstm.bias_ih_l0 + block.lstm.bias_hh_l0).view(4, 100)
        assert torch.equal(bias, torch.tensor([0.0, 1, 0, 0])[:, None].expand(4, 100))
        for weight in (block.lstm.weight_ih_l0, block.lstm.weight_hh_l0):
            assert 0.095 < weight.abs().max() <= 0.1
        assert abs(block.out_proj.weight.std() - 0.02) < 0.002
        assert torch.equal(block.norm.weight, torch.ones(64))
    ids = torch.randint(128, (4, 32))
    assert abs(model(ids, labels=ids).loss - torch.tensor(128.0).log()) < 0.1


@pytest.mark.parametrize("use_cache", [False, True])
def test_bfloat16(documents, use_cache):
    torch.manual_seed(0)
    model = build(hidden_size=16, intermediate_size=24)
    ids, position_ids = torch.cat(documents)[None], positions(*LENGTHS)
    exact = model(ids, position_ids=position_ids).logits
    with torch.autocast("cpu", torch.bfloat16):
        out = model(ids, position_ids=position_ids, labels=ids, use_cache=use_cache)
        if use_cache:
            model(ids[:, :2], past_key_values=out.past_key_values)
    out.loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    torch.testing.assert_close(out.logits.float(), exact, rtol=0, atol=0.02)
    whole = model.to(torch.bfloat16)(ids, position_ids=position_ids, use_cache=use_cache)
    torch.testing.assert_close(whole.logits.float(), exact, rtol=0, atol=0.02)


def test_learns_to_recall():
    # The same letter three times, told apart only by the state of its own document.
    torch.manual_seed(0)
    model = build(hidden_size=32, intermediate_size=64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    position_ids = positions(*[4] * 16)
    loss = torch.tensor(0.0)
    for _ in range(60):
        letters = torch.randint(97, 115, (16, 1))
        ids = torch.cat([letters, torch.full((16, 1), 32), letters, letters], 1).view(1, -1)
        loss = model(ids, position_ids=position_ids, labels=ids.masked_fill(position_ids < 2, -100)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.05


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "either input_ids or inputs_embeds"),
        ({"input_ids": ONE, "inputs_embeds": torch.ones(1, 2, 16)}, "not both"),
        ({"input_ids": torch.ones(3).long()}, "shape \\(B, T\\)"),
        ({"input_ids": torch.ones(1, 0).long()}, "no token to read"),
        ({"input_ids": ONE, "attention_mask": torch.zeros(1, 2)}, "no token to read"),
        ({"input_ids": ONE, "attention_mask": torch.ones(1, 1)}, "attention_mask has shape"),
        ({"input_ids": torch.ones(2, 2).long(), "position_ids": torch.ones(2, 3)}, "position_ids has shape"),
        ({"input_ids": ONE, "past_key_values": DynamicCache()}, "cache is not of this model"),
    ],
)
def test_bad_input(model, given, message):
    with pytest.raises(InputError, match=message):
        model(**given)


def test_bad_config():
    with pytest.raises(ConfigError, match="intermediate_size of an LSTMConfig must be at least 1, not 0"):
        LSTMConfig(intermediate_size=0)
