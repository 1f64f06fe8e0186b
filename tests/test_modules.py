"""Any torch module that reads tokens: someone's own model, with a recurrent module of torch inside."""

from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForCausalLM, Gemma3nTextConfig
from transformers.modeling_outputs import BaseModelOutput

from philens.lens.config import PHiConfig
from philens.lens.losses import token_surprisal
from philens.lens.model import attach, load
from philens.support.errors import InputError, InsertionError

VOCABULARY = 40


class Own(nn.Module):
    """Token ids (B, T) to logits (B, T, V), as someone might write it; no config, no masks, no cache."""

    def __init__(self, kind=nn.LSTM, batch_first=True, layers=2, form="tensor", **options):
        super().__init__()
        self.batch_first, self.form = batch_first, form
        self.embed = nn.Embedding(VOCABULARY, 12)
        self.rnn = kind(12, 16, num_layers=layers, batch_first=batch_first, **options)
        self.out = nn.Linear(options.get("proj_size") or 16, VOCABULARY)

    def forward(self, x):
        states = self.embed(x)
        states = self.rnn(states if self.batch_first else states.transpose(0, 1))[0]
        logits = self.out(states if self.batch_first else states.transpose(0, 1))
        return {
            "tensor": logits,
            "tuple": (logits, states),
            "object": SimpleNamespace(logits=logits, more=1),
            "dict": {"logits": logits},
            "nothing": None,
        }[self.form]


class Convolutions(nn.Module):
    """No attention and no recurrence: causal convolutions; takes a mask it does not need."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCABULARY, 16), nn.Linear(16, VOCABULARY)
        self.blocks = nn.ModuleList(nn.Conv1d(16, 16, 3) for _ in range(3))
        self.mixed = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))
        self.config = SimpleNamespace(hidden_size=16, num_hidden_layers=3, vocab_size=VOCABULARY)

    def forward(self, tokens, attention_mask=None):
        x = self.embed(tokens)
        for block, mix in zip(self.blocks, self.mixed, strict=True):
            x = x + mix(block(F.pad(x.mT, (2, 0))).mT.relu())
        return self.head(x)


def make(of=Own, **options):
    torch.manual_seed(0)
    model = of(**options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    return model.eval()


def shaken(base, **options):
    lens = attach(base, PHiConfig(**({"module": "rnn", "prior_heads": 1} | options)))
    with torch.no_grad():
        for parameter in lens.phi.parameters():
            parameter.normal_(std=0.3)
    return lens.eval()


@pytest.fixture
def tokens():
    return torch.randint(VOCABULARY, (3, 7))


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


RECURRENT = {
    "LSTM": {},
    "LSTM, time first": {"batch_first": False},
    "LSTM, projected": {"proj_size": 8},
    "GRU": {"kind": nn.GRU},
    "GRU, time first": {"kind": nn.GRU, "batch_first": False},
    "RNN, three layers": {"kind": nn.RNN, "layers": 3},
}


@pytest.mark.parametrize("options", RECURRENT.values(), ids=RECURRENT)
def test_inside_a_recurrent_model(options, tokens):
    base = make(**options)
    with torch.no_grad():
        plain = base(tokens)
    lens = shaken(base)
    width = options.get("proj_size", 16)
    assert lens.phi.hidden_size == width
    with torch.no_grad():
        out = lens(tokens)
        assert out.phi.shape == (3, 7)
        assert out.logits.shape == (3, 7, VOCABULARY)
        # By hand: the recurrent states, the layer, the head.
        with lens.disabled():
            assert torch.equal(lens(tokens).logits, plain)
            states = base.embed(tokens)
            states = (
                base.rnn(states)[0]
                if base.batch_first
                else base.rnn(states.transpose(0, 1))[0].transpose(0, 1)
            )
        expected = lens.phi(states)
        close(out.phi, expected.phi)
        close(out.logits, base.out(expected.hidden_states))
        # Neither later tokens nor other rows matter.
        other = torch.cat((tokens[:1, :4], torch.randint(VOCABULARY, (1, 3))), 1)
        close(lens(other).phi[:, :4], out.phi[:1, :4])
        close(lens(tokens, returns="phi").phi, out.phi)
        assert lens(tokens, returns="phi").logits is None
        states = lens(tokens, returns="states")
        close(token_surprisal(states, tokens)[:, 1:], -gathered(out.logits, tokens))
    out = lens.train()(tokens, labels=tokens)
    out.loss.backward()
    assert all(p.grad is not None for p in lens.parameters())
    with torch.no_grad():  # torch runs an LSTM otherwise where a gradient is wanted
        assert torch.equal(lens.detach().eval()(tokens), plain)


def gathered(logits, tokens):
    return logits[:, :-1].log_softmax(-1).gather(2, tokens[:, 1:, None])[..., 0]


@pytest.mark.parametrize("options", RECURRENT.values(), ids=RECURRENT)
def test_check_on_a_recurrent_model(options):
    report = shaken(make(**options)).check()
    assert report.ok, str(report)
    exceptions = {
        # It is not told of padding or documents, and has no cache, no generate, no blocks.
        "left padding": "not supported by the base",
        "packing": "not supported by the base",
        "cache": "not supported by the base",
        **dict.fromkeys(("greedy", "sampling", "beams", "assisted", "checkpointing"), "not applicable"),
    }
    assert report.results == {name: exceptions.get(name, "yes") for name in report.results}
    assert report.points[0].below is None
    assert "after rnn: width" in str(report)


@pytest.mark.parametrize("batch_first", [True, False])
def test_observing_a_recurrent_model(batch_first, tokens):
    base = make(batch_first=batch_first)
    lens = shaken(base)
    with torch.no_grad():
        expected = lens(tokens, labels=tokens)
    plain = lens.detach()(tokens)
    lens_observing = attach(base, PHiConfig(module="rnn", prior_heads=1, mode="observe"))
    lens_observing.phi.load_state_dict(lens.phi.state_dict())
    out = lens_observing.eval()(tokens, labels=tokens)
    assert torch.equal(out.logits, plain)
    close(out.phi, expected.phi)
    close(out.losses["surprisal"], expected.losses["surprisal"])
    out.loss.backward()
    assert all(p.grad is not None for p in lens_observing.phi.parameters())


@pytest.mark.parametrize("form", ["tensor", "tuple", "object"])
def test_forms_of_output(form, tokens):
    with torch.no_grad():
        expected = shaken(make())(tokens).logits
        torch.manual_seed(0)
        lens = attach(make(form=form), PHiConfig(module="rnn", prior_heads=1))
        lens.phi.load_state_dict(shaken(make()).phi.state_dict())
        assert lens.eval()(tokens).logits.shape == expected.shape


@pytest.mark.parametrize(("form", "kind"), [("dict", "dict"), ("nothing", "NoneType")])
def test_an_output_without_logits(form, kind, tokens):
    lens = attach(make(form=form), PHiConfig(module="rnn", prior_heads=1))
    with pytest.raises(InsertionError) as caught:
        lens(tokens)
    assert str(caught.value) == (
        f"Own returns {kind}, not logits; wrap it so that it returns logits of shape (B, T, V)."
    )


@pytest.mark.parametrize("form", ["mapping", "shape", "indices"])
def test_other_odd_outputs(form, tokens):
    class Odd(Own):
        def forward(self, x):
            logits = super().forward(x)
            return {
                "mapping": OrderedDict(scores=logits),
                "shape": logits[:, -1],
                "indices": logits.argmax(-1),
            }[form]

    with pytest.raises(InsertionError, match=r"Odd returns .*; wrap it so that it returns logits"):
        attach(make(Odd), PHiConfig(module="rnn", prior_heads=1))(tokens, labels=tokens)


def test_modules_that_are_not_causal(tokens):
    with pytest.raises(
        InsertionError, match="A bidirectional LSTM has read the later tokens; choose a causal"
    ):
        attach(make(bidirectional=True), PHiConfig(module="rnn", prior_heads=1))


@pytest.mark.parametrize("layer", [0, -1])
def test_blocks_of_ones_own_are_given_by_path(layer, tokens):
    base = make(Convolutions)
    with pytest.raises(
        InsertionError, match=r"candidates: blocks, mixed\); give the insertion point by its path"
    ):
        attach(base, PHiConfig(layer=layer, prior_heads=1))
    lens = shaken(base, module=f"mixed.{layer % 3}")
    mask = torch.ones_like(tokens)
    mask[1, 4:] = 0
    with torch.no_grad():
        out = lens(tokens, attention_mask=mask)
        close(out.phi[1, :4], lens(tokens[1:2, :4]).phi[0])
        close(out.logits[1, :4], lens(tokens[1:2, :4]).logits[0])
    assert (out.phi[1, 4:] == 0).all()
    assert lens.check().ok


@dataclass
class Block:
    """What a block returns."""

    weights: torch.Tensor
    hidden_states: torch.Tensor


Named = namedtuple("Named", ["weights", "hidden_states"])
FORMS = {
    "tensor": lambda states, weights: states,
    "tuple": lambda states, weights: (states, weights),
    "list": lambda states, weights: [states, weights, None],
    "dict": lambda states, weights: {"weights": weights, "hidden_states": states},
    "dict without the name": lambda states, weights: {"x": states, "weights": weights},
    "named tuple": lambda states, weights: Named(weights, states),
    "dataclass": lambda states, weights: Block(weights, states),
    "ModelOutput": lambda states, weights: BaseModelOutput(last_hidden_state=states, attentions=(weights,)),
}


class Blocks(nn.Module):
    """Blocks that return hidden states and something of each token beside them, which is read above."""

    def __init__(self, form):
        super().__init__()
        self.form = form
        self.embed, self.head = nn.Embedding(VOCABULARY, 16), nn.Linear(16, VOCABULARY)
        self.blocks = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))
        for block in self.blocks:
            block.register_forward_hook(lambda module, args, output: FORMS[form](output, args[0].mean(-1)))

    def forward(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            output = block(x)
            assert type(output) is type(FORMS[self.form](x, x))
            states, weights = self.taken_apart(output)
            x = x + states.tanh() + (0 if weights is None else weights[..., None])
        return self.head(x)

    def taken_apart(self, output):
        match self.form:
            case "tensor":
                return output, None
            case "dict without the name":
                return output["x"], output["weights"]
            case "dict":
                return output["hidden_states"], output["weights"]
            case "ModelOutput":
                return output.last_hidden_state, output.attentions[0]
            case "tuple" | "list":
                return output[0], output[1]
        return output.hidden_states, output.weights


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("options", [{}, {"mode": "observe"}, {"pressure_share": 0.5}])
def test_outputs_of_blocks_in_every_form(form, options, tokens):
    """The same numbers and gradients as from tensors or tuples, whatever is skipped or run again."""
    found = {}
    for name in (form, "tensor" if form == "tensor" else "tuple"):
        base = make(Blocks, form=name)
        lens = shaken(base, module=None, layer=1, **options)
        assert lens.module_paths == ["blocks.1"]
        with torch.no_grad():
            plain = lens(tokens)
        torch.manual_seed(3)
        out = lens.train()(tokens, labels=tokens, returns="states")
        out.loss.backward()
        gradient = lens.phi.decoder.weight.grad
        found[name] = (plain.phi, plain.logits, out.phi, out.loss, gradient)
    first, second = found[form], found[name]
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_a_form_that_holds_no_states(tokens):
    FORMS["odd"] = lambda states, weights: SimpleNamespace(states=states)
    try:
        lens = attach(make(Blocks, form="odd"), PHiConfig(layer=0, prior_heads=1))
        with pytest.raises(InsertionError, match="Linear returns SimpleNamespace, not hidden states; choose"):
            lens(tokens)
    finally:
        del FORMS["odd"]


def test_states_of_several_streams():
    """Gemma 3n carries four streams from block to block."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(
        Gemma3nTextConfig(
            vocab_size=VOCABULARY,
            vocab_size_per_layer_input=VOCABULARY,
            hidden_size=16,
            hidden_size_per_layer_input=8,
            intermediate_size=24,
            num_hidden_layers=4,
            num_kv_shared_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=8,
            laurel_rank=4,
            layer_types=["sliding_attention", "full_attention"] * 2,
            activation_sparsity_pattern=[0.0] * 4,
        )
    ).eval()
    tokens = torch.randint(3, VOCABULARY, (1, 5))
    lens = attach(base, PHiConfig(layer=1, prior_heads=1))
    with pytest.raises(InsertionError) as caught:
        lens(tokens)
    message = str(caught.value)
    assert message.startswith(
        "model.layers.1 does not fit, nor do others of its kind: a Gemma3nTextDecoderLayer returns states of "
        "shape (4, 1, 5, 16), not (B, T, D); choose one in it that does (input_layernorm, "
    )
    assert message.endswith("by its path, such as module='model.layers.1.input_layernorm'.")
    lens.detach()
    lens = attach(base, PHiConfig(module=message.split("'")[1], prior_heads=1)).eval()
    assert lens(tokens).phi.shape == (1, 5)
    assert lens.check().ok


def test_saved_and_loaded(tmp_path, tokens):
    lens = shaken(make())
    lens.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        expected = lens(tokens)
        loaded = load(make(), tmp_path / "adapter")
        close(loaded(tokens).phi, expected.phi)
        close(loaded(tokens).logits, expected.logits)


def test_what_ones_own_model_cannot_do(tokens):
    lens = shaken(make())
    with pytest.raises(InputError, match="Own has no cache of the usual kind; read the whole text at once"):
        lens(tokens, use_cache=True)
    with pytest.raises(InputError, match="Own has no generate"):
        lens.generate(tokens)
    with pytest.raises(InsertionError, match="give the insertion point by its path"):
        lens.checkpoint_activations()
