"""A PHi layer in a Transformer: the base stays what it was, losses are as defined, nothing leaks."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import DynamicCache

from conftest import make_gpt2, make_llama
from philens.lens.attention import document_ids
from philens.lens.config import PHiConfig
from philens.lens.model import attach
from philens.scoring.documents import score_documents
from philens.support.errors import ConfigError, InputError, InsertionError
from philens.tasks.automata import TaskConfig, concatenate, generate

LENGTHS = [5, 1, 9, 3]


def config(**options):
    return PHiConfig(**({"layer": 1, "init": "random", "prior_heads": 2} | options))


def shaken(lens):
    """With PHi weights so large that every part of the layer matters."""
    with torch.no_grad():
        for parameter in lens.phi.parameters():
            parameter.normal_(std=0.3)
    return lens


@pytest.fixture
def lens(base):
    return shaken(attach(base, config())).eval()


@pytest.fixture
def tokens():
    return torch.randint(128, (3, 8))


def close(actual, expected, tolerance=1e-5):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def hooks_of(model):
    return [
        hook for module in model.modules() for hook in (*module._forward_hooks, *module._forward_pre_hooks)
    ]


def documents():
    return [torch.randint(128, (length,)) for length in LENGTHS]


def packed(rows):
    """The documents in one row, and their positions."""
    return torch.cat(rows)[None], torch.cat([torch.arange(len(row)) for row in rows])[None]


def padded(rows, side, width=11):
    ids, mask = torch.randint(128, (len(rows), width)), torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        place = slice(width - len(row), None) if side == "left" else slice(len(row))
        ids[i, place], mask[i, place] = row, 1
    return ids, mask


# The base stays what it was


def test_disabled_is_exactly_the_base(base, tokens):
    ids, mask = padded(documents(), "right")
    pack, positions = packed(documents())
    with torch.no_grad():
        # transformers sees a pack only where it makes no cache.
        plain = [
            base(tokens).logits,
            base(ids, attention_mask=mask).logits,
            base(pack, position_ids=positions, use_cache=False).logits,
        ]
        before = {name: value.clone() for name, value in base.state_dict().items()}
        lens = shaken(attach(base, config())).eval()
        assert not torch.equal(lens(tokens).logits, plain[0])
        with lens.disabled():
            assert not lens.enabled
            disabled = lens(tokens), lens(ids, attention_mask=mask), lens(pack, position_ids=positions)
            assert torch.equal(base(tokens).logits, plain[0])
            with lens.disabled():
                pass
            assert not lens.enabled
        assert lens.enabled
    for out, logits in zip(disabled, plain, strict=True):
        assert torch.equal(out.logits, logits)
        assert out.phi is None
        assert out.layer_outputs == []
    for name, value in base.state_dict().items():
        assert torch.equal(value, before[name])


def test_disabled_ends_when_an_error_is_raised(lens, tokens):
    with pytest.raises(RuntimeError), lens.disabled():
        raise RuntimeError
    assert lens.enabled
    assert lens(tokens).phi is not None


def test_a_pass_ends_where_the_base_raises(llama, tokens):
    """Nothing of it stays: a later call of the base by itself has no mask of this one, and no activations."""
    lens = attach(llama, PHiConfig(layer=1)).eval()
    with torch.no_grad():
        expected, shorter = llama(tokens).logits, llama(tokens[:, :-1]).logits

    def fail(*_):
        raise RuntimeError("no more")

    handle = llama.model.layers[2].register_forward_pre_hook(fail)
    mask = torch.ones_like(tokens)
    mask[:, -2:] = 0
    with pytest.raises(RuntimeError, match="no more"):
        lens(tokens, attention_mask=mask)
    handle.remove()
    assert lens._pass is None
    with torch.no_grad():
        assert torch.equal(llama(tokens).logits, expected)
        assert torch.equal(llama(tokens[:, :-1]).logits, shorter)


def test_detach_gives_the_base_back(base, tokens):
    hooks = hooks_of(base)
    with torch.no_grad():
        plain = base(tokens).logits
        lens = shaken(attach(base, config()))
        assert len(hooks_of(base)) == len(hooks) + 2  # the layer, and a watch on what the head reads
        lens.enable()  # once more changes nothing
        assert len(hooks_of(base)) == len(hooks) + 2
        assert lens.detach() is base
        assert hooks_of(base) == hooks
        assert torch.equal(base(tokens).logits, plain)
        again = attach(base, config()).eval()
        assert again(tokens).phi.shape == tokens.shape


def test_the_layer_comes_after_its_block(base, tokens):
    """Logits are those of the base with the block's output replaced by hand."""
    lens = shaken(attach(base, config())).eval()
    blocks = base.get_submodule(lens.module_paths[0].rsplit(".", 1)[0])
    with torch.no_grad():
        out = lens(tokens)
        with lens.disabled():
            seen = []
            handle = blocks[1].register_forward_hook(lambda module, args, output: seen.append(output))
            base(tokens)
            handle.remove()
            hidden = seen[0] if isinstance(seen[0], torch.Tensor) else seen[0][0]
            close(lens.phi(hidden).phi, out.phi)
            handle = blocks[2].register_forward_pre_hook(
                lambda module, args: (lens.phi(hidden).hidden_states, *args[1:])
            )
            close(base(tokens).logits, out.logits)
            handle.remove()


def test_hooks_keep_tuples():
    class TupleBlock(nn.Linear):
        def forward(self, x):
            return super().forward(x), "attention"

    class Toy(nn.Module):
        def __init__(self):
            super().__init__()
            self.config = SimpleNamespace(hidden_size=8, num_hidden_layers=2)
            self.embed = nn.Embedding(10, 8)
            self.blocks = nn.ModuleList(TupleBlock(8, 8) for _ in range(2))

        def forward(self, input_ids, attention_mask=None, use_cache=None):
            x = self.embed(input_ids)
            for block in self.blocks:
                x, attention = block(x)
                assert attention == "attention"
            return SimpleNamespace(logits=x)

    lens = attach(Toy(), config(layer=-1))
    assert lens.module_paths[0] == "blocks.1"
    assert lens(torch.randint(10, (2, 4))).phi.shape == (2, 4)


def test_parameters_are_those_of_base_and_layer(base):
    count = len(list(base.parameters()))
    lens = attach(base, config())
    names = [name for name, _ in lens.named_parameters()]
    assert len(names) == count + len(list(lens.phi.parameters()))
    assert all(name.startswith(("base.", "phi.")) for name in names)
    assert all(key.startswith(("base.", "phi.")) for key in lens.state_dict())


# Insertion points


@pytest.mark.parametrize("layer", [0, 2, -1, -3])
def test_layers_are_counted_from_either_end(base, layer):
    lens = attach(base, config(layer=layer))
    assert lens.module_paths[0].endswith(f".{layer % 3}")
    path = lens.module_paths[0]
    lens.detach()
    assert attach(base, config(layer=None, module=path)).module_paths[0] == path


def test_any_module_will_do(llama, tokens):
    for path, width in (
        ("model.layers.1.mlp", 32),
        ("model.layers.0.mlp.up_proj", 48),
        ("model.embed_tokens", 32),
    ):
        lens = attach(llama, config(layer=None, module=path)).eval()
        assert lens.phi.hidden_size == width
        assert lens(tokens).layer_outputs[0].hidden_states.shape == (3, 8, width)
        lens.detach()


@pytest.mark.parametrize("layer", [3, -4, 100])
def test_layer_out_of_range(base, layer):
    with pytest.raises(InsertionError, match=rf"Layer {layer} is out of range: .* has 3 blocks, 0 to 2"):
        attach(base, config(layer=layer))
    assert not hooks_of(base)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"layer": None, "module": "model.blocks.5"},
            "There is no module 'model.blocks.5' in LlamaForCausalLM",
        ),
        ({"layer": None, "module": "layers.0.mlp"}, "did you mean model.layers.0.mlp, model.layers.1.mlp"),
        ({"layer": None, "module": ""}, "There is no module ''"),
        ({"layer": None}, "No insertion point was given; set layer"),
    ],
)
def test_unknown_insertion_points(llama, options, message):
    with pytest.raises(InsertionError) as caught:
        attach(llama, config(**options))
    assert message in str(caught.value)
    assert not hooks_of(llama)


def test_an_output_that_is_no_hidden_state(llama, tokens):
    lens = attach(llama, config(layer=None, module="model"))  # a ModelOutput, with states in it
    assert lens(tokens).phi.shape == tokens.shape
    with pytest.raises(InputError, match="Hidden states must have shape"):
        attach(make_llama(), config(layer=None, module="model.rotary_emb"))(tokens)


def test_a_module_that_does_not_run(llama, tokens):
    llama.model.spare = nn.Linear(32, 32)
    lens = attach(llama, config(layer=None, module="model.spare"))
    with pytest.raises(InsertionError, match=r"model\.spare did not run in the forward pass"):
        lens(tokens)


def test_blocks_that_cannot_be_told_apart():
    model = nn.Module()
    model.one, model.two = (nn.ModuleList([nn.Linear(8, 8)]) for _ in range(2))
    with pytest.raises(InsertionError, match=r"candidates: one, two\); give the insertion point by its path"):
        attach(model, config(layer=0))
    with pytest.raises(InsertionError, match="candidates: none"):
        attach(nn.Linear(8, 8), config(layer=0))
    bare = nn.Sequential(nn.Embedding(4, 8), nn.ReLU())
    with pytest.raises(InsertionError, match="width of the hidden states of Sequential is not known"):
        attach(bare, config(layer=None, module="1"))


def test_what_cannot_be_attached_to(lens):
    with pytest.raises(ConfigError, match=r"needs a torch.nn.Module, not str"):
        attach("meta-llama/Llama-3.2-1B", config())
    with pytest.raises(ConfigError, match="already has a PHi layer"):
        attach(lens, config())


# Losses


def logprobs(lens, ids, **kwargs):
    return lens(ids, **kwargs).logits.log_softmax(-1)


@pytest.mark.parametrize(
    "options", [{}, {"reduction": "sum", "phi_weight": 0.3}, {"contrastive_weight": 0.0}, {"latent_size": 20}]
)
def test_losses_are_as_defined(base, tokens, options):
    lens = shaken(attach(base, config(**options))).eval()
    labels = tokens.clone()
    labels[0, 2], labels[1, :4] = -100, -100
    out = lens(tokens, labels=labels)
    log_probabilities = logprobs(lens, tokens)
    surprisals, phis, contrasts = [], [], []
    for b in range(3):
        for t in range(8):
            if labels[b, t] == -100:
                continue
            phis.append(out.phi[b, t])
            if out.layer_outputs[0].contrastive is not None:
                contrasts.append(out.layer_outputs[0].contrastive[b, t])
            if t > 0:
                surprisals.append(-log_probabilities[b, t - 1, tokens[b, t]])
    surprisal, phi = torch.stack(surprisals).mean(), torch.stack(phis).mean()
    close(out.losses["surprisal"], surprisal)
    close(out.losses["phi"], phi)
    scale = 1 if options.get("reduction") == "sum" else 1 / options.get("latent_size", 32)
    expected = surprisal + options.get("phi_weight", 1.0) * scale * phi
    if "contrastive_weight" in options:
        assert "contrastive" not in out.losses
        assert not contrasts
    else:
        contrastive = torch.stack(contrasts).mean()
        close(out.losses["contrastive"], contrastive)
        expected = expected + 0.1 * contrastive
    close(out.loss, expected)
    assert not any(value.requires_grad for value in out.losses.values())
    with lens.disabled():
        out = lens(tokens, labels=tokens)
        assert out.losses.keys() == {"surprisal"}
        close(out.loss, base(tokens, labels=tokens).loss)
    assert lens(tokens).loss is None
    assert lens(tokens).losses == {}


def test_weight_scale_multiplies_what_the_layer_adds(lens, tokens):
    def loss(scale):
        lens.weight_scale.fill_(scale)
        return lens(tokens, labels=tokens)

    none, half, full = loss(0), loss(0.5), loss(1)
    close(none.loss, none.losses["surprisal"])
    close(half.loss - none.loss, 0.5 * (full.loss - none.loss))
    assert full.loss - none.loss > 0.1
    assert full.losses["phi"] == none.losses["phi"]


def test_no_document_is_predicted_from_the_one_before(lens):
    rows = documents()
    ids, positions = packed(rows)
    out = lens(ids, position_ids=positions, labels=ids)
    log_probabilities = logprobs(lens, ids, position_ids=positions)[0]
    starts = np.cumsum([0, *LENGTHS[:-1]])
    expected = [-log_probabilities[t - 1, ids[0, t]] for t in range(ids.shape[1]) if t not in starts]
    close(out.losses["surprisal"], torch.stack(expected).mean())
    close(out.losses["phi"], out.phi.mean())
    # Equally: a first token's label makes no difference to it.
    for start in starts:
        other = ids.clone()
        other[0, start] = -100
        assert lens(ids, position_ids=positions, labels=other).losses["surprisal"] == out.losses["surprisal"]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_count(llama, side):
    lens = shaken(attach(llama, config(contrastive_weight=0.0))).eval()
    rows = [row for row in documents() if len(row) > 1]
    ids, mask = padded(rows, side)
    out = lens(ids, attention_mask=mask, labels=ids)  # labels on padding are left out of themselves
    alone = [lens(row[None], labels=row[None]) for row in rows]
    lengths = torch.tensor([len(row) for row in rows])
    surprisals = torch.stack([a.losses["surprisal"] for a in alone])
    close(out.losses["surprisal"], (surprisals * (lengths - 1)).sum() / (lengths - 1).sum())
    phis = torch.stack([a.losses["phi"] for a in alone])
    close(out.losses["phi"], (phis * lengths).sum() / lengths.sum())
    assert out.loss.isfinite()


def test_no_label_at_all_gives_zero_and_no_nan(lens, tokens):
    out = lens(tokens, labels=torch.full_like(tokens, -100))
    assert out.loss == 0
    out.loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in lens.parameters())
    assert lens(tokens[:, :1], labels=tokens[:, :1]).losses["surprisal"] == 0


# Invariances


def test_a_document_in_a_pack_equals_it_alone(lens):
    rows = documents()
    ids, positions = packed(rows)
    with torch.no_grad():
        out = lens(ids, position_ids=positions)
        alone = [lens(row[None]) for row in rows]
    close(out.phi[0], torch.cat([a.phi[0] for a in alone]))
    close(out.logits[0], torch.cat([a.logits[0] for a in alone]))


def test_a_pack_may_end_in_padding(lens):
    rows = documents()
    ids, positions = packed([*rows, torch.zeros(6, dtype=torch.long)])
    mask = torch.ones_like(ids)
    mask[:, -6:] = 0
    with torch.no_grad():
        out = lens(ids, attention_mask=mask, position_ids=positions, labels=ids)
        alone = [lens(row[None]) for row in rows]
    close(out.phi[0, :-6], torch.cat([a.phi[0] for a in alone]))
    assert (out.phi[0, -6:] == 0).all()
    close(out.losses["phi"], torch.cat([a.phi[0] for a in alone]).mean())


def test_padding_side_and_batch_size_change_nothing(base):
    lens = shaken(attach(base, config())).eval()
    rows = documents()
    with torch.no_grad():
        alone = [lens(row[None]) for row in rows]
        for side in ("left", "right"):
            ids, mask = padded(rows, side)
            # Absolute positions have to be given on the left, as with transformers.
            positions = (mask.cumsum(1) - 1).clamp(min=0) if side == "left" else None
            out = lens(ids, attention_mask=mask, position_ids=positions)
            real = mask == 1
            close(out.phi[real], torch.cat([a.phi[0] for a in alone]))
            close(out.logits[real], torch.cat([a.logits[0] for a in alone]))
            assert (out.phi[~real] == 0).all()


def test_left_padding_needs_no_positions_where_they_are_relative(llama):
    lens = shaken(attach(llama, config())).eval()
    rows = documents()
    ids, mask = padded(rows, "left")
    with torch.no_grad():
        phi = lens(ids, attention_mask=mask).phi[mask == 1]
        close(phi, torch.cat([lens(row[None]).phi[0] for row in rows]))


def test_later_tokens_change_nothing(lens, tokens):
    other = tokens.clone()
    other[:, 5:] = (tokens[:, 5:] + 1) % 128
    with torch.no_grad():
        one, two = lens(tokens), lens(other)
    close(one.phi[:, :5], two.phi[:, :5])
    close(one.logits[:, :5], two.logits[:, :5])
    assert not torch.allclose(one.phi[:, 5:], two.phi[:, 5:])


def test_document_ids():
    positions = torch.tensor([[0, 1, 2, 0, 0, 1], [3, 4, 0, 1, 1, 2]])
    assert document_ids(positions).tolist() == [[0, 0, 0, 1, 2, 2], [0, 0, 1, 1, 2, 2]]


# Initialisation


def test_near_identity_leaves_the_loss_of_a_trained_model_almost_unchanged():
    llama = make_llama(initializer_range=0.02).train()
    source = generate(TaskConfig(noise_probability=0.0), 1, "memorized_programs", np.arange(64)).cut(65)
    ids = torch.from_numpy(source.tokens.reshape(64, 65).astype(np.int64))
    optimizer = torch.optim.AdamW(llama.parameters(), lr=1e-2)
    for _ in range(40):
        loss = llama(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        plain = llama.eval()(ids, labels=ids).loss.item()
        assert plain < 2.5
        lens = attach(llama, config(init="near_identity"))
        evaluated = lens.eval()(ids, labels=ids).losses["surprisal"].item()
        trained = np.mean([lens.train()(ids, labels=ids).losses["surprisal"].item() for _ in range(5)])
        lens.detach()
        spoilt = attach(llama, config()).eval()(ids, labels=ids).losses["surprisal"].item()
    assert evaluated == pytest.approx(plain, abs=1e-4)
    assert trained == pytest.approx(plain, abs=0.05)
    assert spoilt > plain + 0.5


def test_calibration_takes_the_mean_and_deviation_of_real_tokens(base, tokens):
    lens = attach(base, config(init="near_identity")).eval()
    mask = torch.ones_like(tokens)
    mask[0, -3:] = 0
    seen = lens(tokens, attention_mask=mask).layer_outputs[0].observed
    rows = zip(tokens, mask, strict=True)
    lens.calibrate([{"input_ids": row[None], "attention_mask": kept[None]} for row, kept in rows])
    real = seen[mask == 1].double()
    close(lens.phi.shift, real.mean(0).float())
    close(lens.phi.scale, real.std(0, correction=0).float())
    with lens.disabled():
        plain = lens(tokens, attention_mask=mask, labels=tokens).losses["surprisal"]
    with_layer = lens(tokens, attention_mask=mask, labels=tokens).losses["surprisal"]
    assert with_layer == pytest.approx(float(plain), rel=1e-3)


# Training


def gradients(lens, ids):
    lens.zero_grad()
    torch.manual_seed(5)
    out = lens(ids, labels=ids)
    out.loss.backward()
    return out, {name: p.grad.clone() for name, p in lens.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("module", [None, "mlp"])
@pytest.mark.parametrize("where", ["lens", "base before", "base after"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing_and_runs_the_layer_once(
    base, tokens, module, where, reentrant
):
    plain = shaken(attach(base, config()))
    path = plain.module_paths[0]
    plain.detach()
    options = config() if module is None else config(layer=None, module=f"{path}.{module}")
    arguments = {"gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}

    lens = shaken(attach(base, options)).train()
    expected, expected_gradients = gradients(lens, tokens)
    calls = []
    lens.phi.register_forward_pre_hook(lambda *_: calls.append(1))
    blocks = []
    earlier = base.get_submodule(f"{path.rsplit('.', 1)[0]}.0.mlp")
    earlier.register_forward_pre_hook(lambda *_: blocks.append(1))
    if where == "lens":
        lens.checkpoint_activations()
    elif where == "base after":
        base.gradient_checkpointing_enable(**arguments)
    else:
        layer = lens.phi.state_dict()
        lens.detach()
        base.gradient_checkpointing_enable(**arguments)
        lens = attach(base, options).train()
        lens.phi.load_state_dict(layer)
        lens.phi.register_forward_pre_hook(lambda *_: calls.append(1))
    out, found = gradients(lens, tokens)
    assert len(calls) == 1
    assert len(blocks) == 2  # another block is recomputed
    close(out.loss, expected.loss)
    close(out.phi, expected.phi)
    assert found.keys() == expected_gradients.keys()
    for name in found:
        close(found[name], expected_gradients[name])
    lens.detach()
    block = base.get_submodule(path)
    assert block.gradient_checkpointing == (where != "lens")
    assert "forward" not in block.__dict__


def test_a_training_step_moves_every_parameter(llama, tokens):
    lens = attach(llama, config()).train()
    before = {name: p.detach().clone() for name, p in lens.named_parameters()}
    optimizer = torch.optim.AdamW(lens.parameters(), lr=1e-2, weight_decay=0.0)
    lens(tokens, labels=tokens).loss.backward()
    optimizer.step()
    assert not [name for name, p in lens.named_parameters() if torch.equal(p, before[name])]


def test_a_frozen_base_passes_gradients_to_the_layer(llama, tokens):
    llama.requires_grad_(False)
    lens = attach(llama, config()).train()
    lens(tokens, labels=tokens).loss.backward()
    assert all(p.grad is None for p in llama.parameters())
    assert all(p.grad.abs().max() > 0 for p in lens.phi.parameters())


def test_base_in_half_precision(tokens):
    lens = attach(make_llama().bfloat16(), config()).eval()
    assert {p.dtype for p in lens.phi.parameters()} == {torch.float32}
    out = lens(tokens, labels=tokens)
    assert out.logits.dtype == torch.bfloat16
    assert out.phi.dtype == out.loss.dtype == torch.float32
    out.loss.backward()


@pytest.mark.slow  # tests/test_held.py compiles training steps in every run
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_equals_eager(backend, tokens):
    torch._dynamo.reset()
    lens = shaken(attach(make_llama(num_hidden_layers=2), config(layer=0))).eval()
    compiled = torch.compile(lens, backend=backend)
    mask = torch.ones_like(tokens)
    mask[0, 5:] = 0

    def check():
        one = lens(tokens, attention_mask=mask, labels=tokens)
        two = compiled(tokens, attention_mask=mask, labels=tokens)
        close(two.loss, one.loss)
        close(two.logits, one.logits)
        assert (two.phi is None) == (one.phi is None)
        if one.phi is not None:
            close(two.phi, one.phi)
        return two.loss

    check().backward()
    found = {name: p.grad.clone() for name, p in lens.named_parameters()}
    lens.zero_grad()
    lens(tokens, attention_mask=mask, labels=tokens).loss.backward()
    for name, parameter in lens.named_parameters():
        close(found[name], parameter.grad, 1e-4)
    with lens.disabled():
        check()
    check()
    lens.weight_scale.fill_(0.25)
    check()


# Errors


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"input_ids": (8,)}, r"input_ids must have shape \(B, T\).*not \(8,\)"),
        ({"input_ids": (2, 0)}, r"with at least one token, not \(2, 0\)"),
        ({"input_ids": (0, 3)}, "at least one token"),
        ({"input_ids": (2, 8, 3)}, "input_ids must have shape"),
        (
            {"attention_mask": (2, 9)},
            r"attention_mask must have the shape \(2, 8\) of input_ids, not \(2, 9\)",
        ),
        ({"position_ids": (1, 8)}, "position_ids must have the shape"),
        ({"labels": (8,)}, "labels must have the shape"),
    ],
)
def test_wrong_shapes(llama, shapes, message):
    inputs = {
        name: torch.ones(shape, dtype=torch.long) for name, shape in ({"input_ids": (2, 8)} | shapes).items()
    }
    with pytest.raises(InputError, match=message):
        attach(llama, config())(**inputs)


def test_caches_that_cannot_carry_the_prior(llama, tokens):
    lens = attach(llama, config())
    with lens.disabled():
        filled = llama(tokens, use_cache=True).past_key_values
    with pytest.raises(InputError, match="filled without the PHi layer"):
        lens(tokens, past_key_values=filled)
    with pytest.raises(InputError, match="made from the model's config"):
        lens(tokens, past_key_values=DynamicCache())


def test_sizes_that_do_not_fit_the_base(llama):
    with pytest.raises(ConfigError, match="set prior_heads"):
        attach(llama, config(prior_heads=3))
    assert not hooks_of(llama)


# Scoring documents


@pytest.fixture
def docs():
    return generate(TaskConfig(max_length=90), 3, np.arange(20) % 6, np.arange(20))


@pytest.mark.parametrize("make", [make_llama, make_gpt2])
def test_scores_do_not_depend_on_the_batch(make, docs):
    docs = concatenate([docs.select([i]).cut(1 + 7 * i % 90) for i in range(20)])
    lens = shaken(attach(make(), config())).eval()
    one, many = score_documents(lens, docs, batch_size=1), score_documents(lens, docs, batch_size=16)
    for name in ("phi", "surprisal"):
        np.testing.assert_allclose(getattr(many, name), getattr(one, name), rtol=1e-5, atol=1e-5)
    first = np.zeros(len(docs.tokens), bool)
    first[docs.offsets[:-1]] = True
    np.testing.assert_array_equal(np.isnan(one.surprisal), first)
    assert np.isfinite(one.phi).all()
    assert (one.phi > 0).all()
    np.testing.assert_array_equal(one.document, np.repeat(np.arange(20), docs.lengths))
    # They are the model's own numbers, in the order of the tokens.
    for i in range(20):
        place = slice(docs.offsets[i], docs.offsets[i + 1])
        ids = torch.from_numpy(docs.tokens[place].astype(np.int64))[None]
        with torch.no_grad():
            out = lens(ids)
        np.testing.assert_allclose(one.phi[place], out.phi[0].numpy(), rtol=1e-5, atol=1e-5)
        expected = F.cross_entropy(out.logits[0, :-1], ids[0, 1:], reduction="none").numpy()
        np.testing.assert_allclose(one.surprisal[place][1:], expected, rtol=1e-5, atol=1e-5)


def test_scores_of_the_disabled_model_are_those_of_the_base(llama, docs):
    lens = attach(llama, config()).eval()
    with lens.disabled():
        table = score_documents(lens, docs, batch_size=8)
    assert np.isnan(table.phi).all()
    for i in range(3):
        ids = torch.from_numpy(docs.select(i).tokens.astype(np.int64))[None]
        with lens.disabled(), torch.no_grad():
            loss = llama(ids, labels=ids).loss.item()
        assert np.nanmean(table.surprisal[table.document == i]) == pytest.approx(loss, rel=1e-5)


def test_scoring_restores_the_mode_and_takes_no_gradient(llama, docs):
    lens = attach(llama, config()).train()
    first = score_documents(lens, docs.select([0, 1]))
    assert lens.training
    assert llama.training
    again = score_documents(lens, docs.select([0, 1]))
    np.testing.assert_array_equal(first.phi, again.phi)  # the mean latent, not a sample
    score_documents(lens.eval(), docs.select([0]))
    assert not lens.training


def test_what_cannot_be_scored(llama, docs):
    lens = attach(llama, config())
    with pytest.raises(InputError, match="give at least one document"):
        score_documents(lens, docs.select(np.array([], int)))
    with pytest.raises(InputError, match="every document needs at least one token"):
        score_documents(lens, docs.cut(0))
    for size in (0, -2):
        with pytest.raises(InputError, match="batch_size must be at least 1"):
            score_documents(lens, docs, batch_size=size)
