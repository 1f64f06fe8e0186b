"""Multiple-token divergence: a shallow head beside the base, by definition, and what it promises."""

import json
import math
import re

import numpy as np
import pytest
import torch
from transformers import OPTConfig, OPTForCausalLM

import philens
from conftest import make_gpt2, make_llama
from philens import LSTMConfig, LSTMForCausalLM, MTDConfig, PHiConfig, attach, load, score
from philens.cli import main
from philens.explore.models import Explored
from philens.findings import use_formula
from philens.lens.adapter import CONFIG_FILE, _hash_of
from philens.lens.metrics import METRICS
from philens.support.errors import AdapterError, ConfigError, InputError, PhilensError, RecipeError
from philens.training.recipe import load_recipe, recipe_yaml
from philens.training.source import ModelSource
from philens.training.trainer import train
from tiny import tiny_recipe, tiny_values

CHARACTERS = philens.character_tokenizer()
WATCHING = PHiConfig(layer=1, mode="observe", contrastive_weight=0.0)


def make_lens(base=None, **options):
    """A head whose weights are large enough for differences to stand far above rounding."""
    lens = attach(make_llama() if base is None else base, MTDConfig(**options))
    lens.freeze_base()
    with torch.no_grad():
        for weight in lens.mtd.parameters():
            weight += 0.3 * torch.randn_like(weight)
    return lens.eval()


def make_lstm():
    return LSTMForCausalLM(
        LSTMConfig(vocab_size=128, hidden_size=32, intermediate_size=32, num_hidden_layers=2)
    )


@pytest.fixture
def tokens():
    return torch.randint(3, 128, (3, 12))


# The definition.


def rms(x, weight=None):
    normed = x / math.sqrt(float((x * x).mean()) + 1e-5)
    return normed if weight is None else normed * weight


def turned(x, place):
    """One head's (C,) query or key, rotated by its place."""
    half = len(x) // 2
    angles = torch.tensor([place * 10_000.0 ** (-k / half) for k in range(half)], dtype=x.dtype)
    first, second = x[:half], x[half:]
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((first * cos - second * sin, second * cos + first * sin))


def block_by_definition(block, xs, heads):
    """A Transformer block on (D,) states of one document, token by token, head by head."""
    normed = [rms(x) for x in xs]
    own = block.attention
    q, k, v = ([p.weight @ x for x in normed] for p in (own.q_proj, own.k_proj, own.v_proj))
    size, found = len(xs[0]) // heads, []
    for t, x in enumerate(xs):
        read = []
        for head in range(heads):
            part = slice(head * size, (head + 1) * size)
            query = turned(q[t][part], t)
            scores = torch.stack([query @ turned(k[s][part], s) for s in range(t + 1)]) / math.sqrt(size)
            read.append(sum(w * v[s][part] for s, w in enumerate(scores.softmax(0))))
        x = x + own.o_proj.weight @ torch.cat(read)
        y, mlp = rms(x, block.norm.weight), block.mlp
        gate, up = mlp.gate_proj.weight @ y + mlp.gate_proj.bias, mlp.up_proj.weight @ y + mlp.up_proj.bias
        found.append(x + mlp.down_proj.weight @ (gate * gate.sigmoid() * up) + mlp.down_proj.bias)
    return found


@torch.no_grad()
def by_definition(lens, ids):
    """(T,) of one document's tokens (T,), plainly and in float64, on a Llama."""
    head, model = lens.mtd, lens.base.model
    before = []
    hook = model.layers[-1].register_forward_hook(lambda module, args, output: before.append(output))
    with lens.disabled():
        logits = lens.base(input_ids=ids[None]).logits[0].double()
    hook.remove()
    states = before[0][0].double()
    head.double(), lens.base.double()
    try:
        xs = []
        for t, token in enumerate(ids):
            x = rms(head.start[0, 0] if t == 0 else states[t - 1], head.norm.weight)
            if head.config.embedding:
                newest = rms(model.embed_tokens.weight[token], head.embedding_norm.weight)
                x = head.merge.weight @ torch.cat((x, newest)) + head.merge.bias
            xs.append(x)
        for block in head.blocks:
            xs = block_by_definition(block, xs, block.attention.heads)
        eps = lens.base.config.rms_norm_eps
        found = []
        for x, own in zip(xs, logits, strict=True):
            x = x / torch.sqrt((x * x).mean() + eps) * model.norm.weight
            p, q = own.log_softmax(0), (lens.base.lm_head.weight @ x).log_softmax(0)
            found.append((p.exp() * (p - q)).sum())
        return torch.stack(found)
    finally:
        head.float(), lens.base.float()


@pytest.mark.parametrize(
    "options", [{}, {"embedding": False}, {"depth": 2, "heads": 2}, {"mlp_size": 8, "heads": 4}]
)
def test_it_is_the_divergence_by_definition(options, tokens):
    lens = make_lens(**options)
    found = lens(tokens).mtd
    assert found.dtype == torch.float32
    assert found.mean() > 0.1
    for row, ids in zip(found, tokens, strict=True):
        torch.testing.assert_close(row.double(), by_definition(lens, ids), rtol=1e-4, atol=1e-5)


def test_the_loss_is_its_mean_where_a_token_is_predicted(tokens):
    lens = make_lens()
    labels = tokens.clone()
    labels[0, 5:8] = -100
    predicted = labels[:, 1:] != -100
    for returns in ("logits", "states"):
        out = lens(tokens, labels=labels, returns=returns)
        torch.testing.assert_close(out.loss, lens(tokens).mtd[:, :-1][predicted].mean())
        assert list(out.losses) == ["surprisal_base", "surprisal_shallow", "mtd"]
        assert out.losses["mtd"] == out.loss
        with torch.no_grad():
            shallow, base = lens(tokens).shallow().logits_at(slice(0, 12)), lens.base(input_ids=tokens).logits
        for name, logits in (("surprisal_shallow", shallow), ("surprisal_base", base)):
            expected = (
                -logits.log_softmax(-1)[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0][predicted].mean()
            )
            torch.testing.assert_close(out.losses[name], expected)


def test_in_parts_it_is_what_it_is_in_one(tokens, monkeypatch):
    lens = make_lens()
    whole, learned = lens(tokens).mtd, lens(tokens, labels=tokens, returns="states")
    learned.loss.backward()
    gradients = {name: p.grad.clone() for name, p in lens.mtd.named_parameters()}
    lens.zero_grad()
    sizes, head = [], lens.base.get_output_embeddings()
    monkeypatch.setattr("philens.lens.losses.POSITIONS_AT_ONCE", 5)
    monkeypatch.setattr("philens.lens.losses.LOGITS_READ_AT_ONCE", 128 * 5)
    monkeypatch.setattr("philens.lens.losses.COMPARED_AT_ONCE", 128 * 7)
    hook = head.register_forward_hook(lambda module, args, output: sizes.append(output.numel() // 128))
    parts = lens(tokens, returns="states").mtd
    hook.remove()
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-6)
    assert max(sizes) == 5
    again = lens(tokens, labels=tokens, returns="states")
    again.loss.backward()
    torch.testing.assert_close(again.loss, learned.loss)
    for name, p in lens.mtd.named_parameters():
        torch.testing.assert_close(p.grad, gradients[name], rtol=1e-4, atol=1e-6)


# What it knows, and what it leaves alone.


@pytest.mark.parametrize("make", [make_llama, make_gpt2, make_lstm])
def test_a_later_token_changes_no_earlier_value(make, tokens):
    lens = make_lens(make())
    before, place = lens(tokens).mtd, 7
    tokens[:, place] = (tokens[:, place] + 1) % 128
    after = lens(tokens).mtd
    assert torch.equal(after[:, :place], before[:, :place])
    assert (after[:, place] != before[:, place]).all()


def test_without_the_embedding_the_newest_token_is_unknown_to_the_head(tokens):
    other = tokens.clone()
    other[:, -1] = (other[:, -1] + 1) % 128
    for embedding in (True, False):
        lens = make_lens(embedding=embedding)
        one, two = (lens(ids, returns="states").shallow().logits_at(slice(11, 12)) for ids in (tokens, other))
        assert torch.equal(one, two) == (not embedding)


@pytest.mark.parametrize("embedding", [True, False])
def test_documents_of_a_pack_are_read_alone(embedding, tokens):
    lens = make_lens(embedding=embedding)
    positions = torch.cat([torch.arange(n) for n in (5, 1, 6)])[None].expand(3, -1)
    packed = lens(tokens, position_ids=positions).mtd
    alone = torch.cat([lens(part).mtd for part in tokens.split((5, 1, 6), 1)], 1)
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-5)
    labels = tokens.clone()
    out = lens(tokens, position_ids=positions, labels=labels)
    counted = torch.ones(11, dtype=torch.bool)
    counted[[4, 5]] = False  # what follows is another document's
    torch.testing.assert_close(out.loss, alone[:, :-1][:, counted].mean(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", [make_llama, make_gpt2, make_lstm])
@pytest.mark.parametrize("config", [MTDConfig(), [WATCHING, MTDConfig(embedding=False)]])
def test_what_is_promised_of_every_model_holds(make, config):
    report = attach(make(), config).check()
    assert report.ok, str(report)
    results = report.results
    assert results["causal"] == results["packing"] == results["saved"] == results["left padding"] == "yes"
    assert results["early exit"] == ("not applicable" if isinstance(config, MTDConfig) else "yes")


def test_compiled(tokens):
    assert attach(make_llama(), MTDConfig()).check(compile="eager").results["compiled"] == "yes"


def test_the_base_gets_no_gradient_and_gives_what_it_gave(tokens):
    base = make_llama()
    plain = base(input_ids=tokens).logits
    lens = make_lens(base)
    lens.train()
    out = lens(tokens, labels=tokens)
    assert torch.equal(out.logits, plain)
    out.loss.backward()
    assert all(weight.grad is None for weight in base.parameters())
    assert all(weight.grad.abs().sum() > 0 for weight in lens.mtd.parameters())
    assert torch.equal(lens.detach()(input_ids=tokens).logits, plain)
    assert all(weight.requires_grad for weight in base.parameters())


@pytest.mark.parametrize("returns", ["logits", "states"])
@pytest.mark.parametrize("frozen_head", [False, True])
def test_trained_with_the_base_no_gradient_is_held_back(tokens, returns, frozen_head):
    lens = attach(make_llama(tie_word_embeddings=False), MTDConfig())
    model, head = lens.base.model, lens.base.lm_head
    head.requires_grad_(not frozen_head)
    trained = [p for p in lens.parameters() if p.requires_grad]
    states = []
    with lens.disabled():
        handle = model.layers[-1].register_forward_hook(lambda *args: states.append(args[-1]))
        base = lens.base(input_ids=tokens).logits[:, :-1].log_softmax(-1)
        handle.remove()
    shallow = lens.mtd(states[0], model.embed_tokens(tokens)).hidden_states
    shallow = head(model.norm(shallow))[:, :-1].log_softmax(-1)
    surprisal = -base.gather(-1, tokens[:, 1:, None]).mean()
    mtd = (base.exp() * (base - shallow)).sum(-1).mean()
    expected = torch.autograd.grad(surprisal + mtd, trained)
    out = lens(tokens, labels=tokens, returns=returns)
    torch.testing.assert_close(out.loss, surprisal + mtd)
    torch.testing.assert_close(out.losses["mtd"], mtd.detach())
    torch.testing.assert_close(out.losses["surprisal_base"], surprisal.detach())
    for one, other in zip(torch.autograd.grad(out.loss, trained), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def test_training_lowers_it(tokens):
    lens = attach(make_llama(), MTDConfig())
    lens.freeze_base()
    optimizer = torch.optim.AdamW(lens.mtd.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        loss = lens(tokens, labels=tokens, returns="states").loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] / 5
    assert float(lens(tokens).mtd[:, :-1].mean()) < losses[0] / 5


# Several instruments.


def test_several_watch_one_pass_as_each_would_alone(tokens):
    base = make_llama()
    together = attach(base, [MTDConfig(), WATCHING])
    together.freeze_base()
    calls = []
    base.model.layers[0].mlp.register_forward_hook(lambda *_: calls.append(1))
    together.eval()
    out = together(tokens, labels=tokens, returns="states")
    assert len(calls) == 1
    phi, mtd, state, head = out.phi, out.mtd, together.phi.state_dict(), together.mtd.state_dict()
    together.detach()
    alone = attach(base, WATCHING).eval()
    alone.phi.load_state_dict(state)
    alone.freeze_base()
    of_phi = alone(tokens, labels=tokens, returns="states")
    assert torch.equal(of_phi.phi, phi)
    alone.detach()
    alone = attach(base, MTDConfig()).eval()
    alone.mtd.load_state_dict(head)
    alone.freeze_base()
    of_mtd = alone(tokens, labels=tokens, returns="states")
    assert torch.equal(of_mtd.mtd, mtd)
    torch.testing.assert_close(out.loss, of_phi.loss + of_mtd.loss)
    for name, value in (of_phi.losses | of_mtd.losses).items():
        torch.testing.assert_close(out.losses[name], value)


def test_a_pass_that_stops_at_the_layer_leaves_the_head_out(tokens):
    """Also where the layer stands after all blocks."""
    for place in ({"layer": 0}, {"layer": -1}, {"module": "model.norm"}):
        config = PHiConfig(mode="observe", contrastive_weight=0.0, **place)
        lens = attach(make_llama(), [config, MTDConfig()]).eval()
        runs = []
        lens.mtd.register_forward_hook(lambda *_, runs=runs: runs.append(1))
        phi = lens(tokens, returns="phi").phi
        assert not runs
        assert torch.equal(phi, lens(tokens).phi)
        assert len(runs) == 1


def test_several_are_saved_and_scored_together(tmp_path, tokens):
    base = make_llama()
    lens = attach(base, [WATCHING, MTDConfig()]).eval()
    text = "abcab abcab"
    expected = score(lens, CHARACTERS, text)[0]
    assert list(expected.columns) == ["phi", "mtd", "surprisal"]
    lens.save_pretrained(tmp_path / "both")
    assert {path.name for path in (tmp_path / "both").iterdir()} == {
        CONFIG_FILE,
        "README.md",
        "phi_layer.safetensors",
        "mtd_head.safetensors",
    }
    lens.detach()
    again = load(base, tmp_path / "both")
    found = score(again, CHARACTERS, text)[0]
    for name, values in expected.columns.items():
        assert np.array_equal(found.columns[name], values, equal_nan=True)
    assert found.provenance["instruments"] == ["phi", "mtd"]


def test_what_was_trained_apart_is_loaded_together(tmp_path, tokens):
    base = make_llama()
    expected = {}
    for name, config in {"layer": PHiConfig(layer=1), "head": MTDConfig(depth=2)}.items():
        lens = attach(base, config).eval()
        lens.save_pretrained(tmp_path / name)
        expected[name] = lens(tokens)
        lens.detach()
    both = load(base, [tmp_path / "head", tmp_path / "layer"])
    out = both(tokens)
    assert torch.equal(out.phi, expected["layer"].phi)
    assert torch.equal(out.mtd, expected["head"].mtd)
    assert torch.equal(out.logits, expected["head"].logits)  # the layer, which stood in the path, observes
    assert not both.training
    both.save_pretrained(tmp_path / "both")
    both.detach()
    for folder in (tmp_path / "both", [tmp_path / "both"]):
        lens = load(base, folder)
        assert torch.equal(lens(tokens).mtd, expected["head"].mtd)
        lens.detach()
    assert load(base, [tmp_path / "layer"]).config.mode == "bottleneck"  # one alone stays as it is


@pytest.mark.parametrize(
    ("names", "mode", "said"),
    [
        (["head", "head"], None, "each of PHiConfig and MTDConfig once"),
        (["layer", "head"], "bottleneck", "shallow head only observes"),
        ([], None, "not an empty list"),
        (["layer", "none"], None, "none"),
    ],
)
def test_what_cannot_be_loaded_together_leaves_the_base_alone(tmp_path, tokens, names, mode, said):
    base = make_llama()
    for name, config in {"layer": PHiConfig(layer=1), "head": MTDConfig()}.items():
        lens = attach(base, config).eval()
        lens.save_pretrained(tmp_path / name)
        lens.detach()
    expected = base(tokens).logits
    with pytest.raises(PhilensError, match=said):
        load(base, [tmp_path / name for name in names], mode=mode)
    assert torch.equal(base(tokens).logits, expected)
    load(base, tmp_path / "layer")


# Saved, scored, generated with.


def test_saved_and_loaded(tmp_path, tokens):
    base = make_llama()
    lens = make_lens(base, depth=2, embedding=False)
    expected = lens(tokens).mtd
    lens.save_pretrained(tmp_path / "head")
    with pytest.raises(ConfigError, match=r"already has a shallow head; detach\(\) it first"):
        load(lens, tmp_path / "head")
    lens.detach()
    description = json.loads((tmp_path / "head" / CONFIG_FILE).read_text())
    assert description["instruments"] == ["mtd"]
    assert description["mtd"]["depth"] == 2
    assert "phi" not in description
    again = load(base, tmp_path / "head", mode="observe")
    assert torch.equal(again(tokens).mtd, expected)
    again.detach()
    with pytest.raises(ConfigError, match="shallow head only observes"):
        load(base, tmp_path / "head", mode="bottleneck")
    card = (tmp_path / "head" / "README.md").read_text()
    assert "# Shallow head after `model.layers.2`" in card
    assert "does not read the newest token; depth 2" in card


def rewritten(folder, **changes):
    description = json.loads((folder / CONFIG_FILE).read_text()) | changes
    description["config_sha256"] = _hash_of(description)
    (folder / CONFIG_FILE).write_text(json.dumps(description))


def test_an_adapter_without_a_word_of_it_is_of_a_phi_layer(tmp_path):
    base = make_llama()
    lens = attach(base, PHiConfig(layer=1))
    lens.save_pretrained(tmp_path)
    lens.detach()
    assert "instruments" not in json.loads((tmp_path / CONFIG_FILE).read_text())
    rewritten(tmp_path, instruments=["phi"])
    assert load(base, tmp_path).layers


def test_what_is_not_known_is_refused(tmp_path):
    base = make_llama()
    make_lens(base).save_pretrained(tmp_path)
    description = json.loads((tmp_path / CONFIG_FILE).read_text())
    base = make_llama()
    base.load_state_dict(make_llama().state_dict())
    rewritten(tmp_path, instruments=["mtd", "gong"], gong={})
    with pytest.raises(AdapterError, match=r"an instrument 'gong' that this philens .* install philens"):
        load(base, tmp_path)
    (tmp_path / CONFIG_FILE).write_text(json.dumps(description))
    rewritten(tmp_path, mtd=description["mtd"] | {"colour": 1})
    with pytest.raises(AdapterError, match=r"an option 'colour' that this philens"):
        load(base, tmp_path)


def test_scored_as_any_metric(tokens):
    lens = make_lens()
    texts = ["abcab abcab", "a", "zyx" * 20]
    found = score(lens, CHARACTERS, texts, batch_tokens=64)
    for text, one in zip(texts, found, strict=True):
        ids = torch.tensor([CHARACTERS(text)["input_ids"]])
        assert list(one.columns) == ["mtd", "surprisal"]
        assert one.units["mtd"] == "nats"
        np.testing.assert_allclose(one.columns["mtd"], lens(ids).mtd[0], rtol=1e-4, atol=1e-5)
    alone = score(lens, CHARACTERS, texts[2], metrics=["mtd"])[0]
    np.testing.assert_allclose(alone.columns["mtd"], found[2].columns["mtd"], rtol=1e-4, atol=1e-5)
    assert "mtd" in found[0]._repr_html_()


def test_what_a_lens_has_is_said(tokens):
    head, layer = make_lens(), attach(make_llama(), PHiConfig(layer=0))
    said = head.supports()
    assert {name for name, reason in said.items() if reason is None} == {
        "mtd",
        *(name for name, metric in METRICS.items() if not {"head", "layers", "path"} & set(metric.needs)),
    }
    for lens, name, reason in (
        (
            head,
            "phi",
            "phi needs a PHi layer, and this model has a shallow head alone; ask for other metrics.",
        ),
        (
            layer,
            "mtd",
            "mtd needs a shallow head, and this model has a PHi layer alone; ask for other metrics.",
        ),
    ):
        assert lens.supports()[name] == reason
        with pytest.raises(InputError, match=re.escape(reason)):
            score(lens, CHARACTERS, "abc", metrics=[name])
    with head.disabled():
        assert "shallow head is disabled" in (head.supports()["mtd"] or "")
        assert head(tokens).mtd is None


def test_generated_text_is_scored(tokens):
    lens = make_lens()
    found = lens.generate(tokens[:, :5], max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert found.phi is None
    torch.testing.assert_close(found.mtd, lens(found.sequences).mtd, rtol=1e-4, atol=1e-5)


# Trained by a recipe.


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    values = {"phi": None, "phi_schedule__start_step": 0, "phi_schedule__warmup_steps": 0}
    plain = {k: v for k, v in tiny_values(**values).items() if not k.startswith(("phi.", "phi_schedule."))}
    train(load_recipe(None, plain), folder / "run")
    return folder / "run" / "model"


def options(base, **changes):
    values = tiny_values(model__base=str(base), mtd__heads=2, train__steps=30, optimizer__learning_rate=3e-2)
    kept = {k: v for k, v in values.items() if not k.startswith(("phi", "model.")) or k == "model.base"}
    return kept | changes


@pytest.mark.parametrize("both", [False, True])
def test_trained_by_a_recipe(base, tmp_path, both):
    more = {"phi.layer": 0, "phi.mode": "observe", "phi.prior_heads": 2} if both else {}
    recipe = load_recipe(None, options(base, **more))
    assert (recipe.phi is not None) == both
    train(recipe, tmp_path / "run")
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    course = [record["mtd"] for record in records if "mtd" in record]
    assert course[-1] < course[0]
    last = records[-1] if "eval/random/mtd" in records[-1] else records[-2]
    assert all(math.isfinite(last[f"eval/{task}/mtd"]) for task in ("copy", "in_context_language"))
    assert ("eval/copy/phi" in last) == both
    lens, again = philens.load_run(tmp_path / "run")
    assert again == recipe
    assert (len(lens.layers), len(lens.parts_of("mtd"))) == (both, 1)
    assert score(lens, CHARACTERS, "abc")[0].columns.keys() >= {"mtd", "surprisal"}


def together(**changes):
    """A head and its base, both from nothing."""
    values = tiny_values(mtd__heads=2, train__steps=30, optimizer__learning_rate=1e-2)
    return load_recipe(None, {k: v for k, v in values.items() if not k.startswith("phi")} | changes)


def test_trained_with_its_base_from_nothing(tmp_path):
    recipe = together()
    train(recipe, tmp_path / "run")
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    course = [record for record in records if "mtd" in record]
    for name in ("surprisal_base", "surprisal_shallow"):
        assert course[-1][name] < course[0][name] - 0.5
    assert course[-1]["mtd"] < 0.2 * max(record["mtd"] for record in course)
    for record in course:
        assert record["loss"] == pytest.approx(record["surprisal_base"] + record["mtd"], rel=1e-4)
    lens, again = philens.load_run(tmp_path / "run")
    assert again == recipe
    assert score(lens, CHARACTERS, "abc")[0].columns.keys() >= {"mtd", "surprisal"}


@pytest.mark.parametrize("alone", [False, True])
def test_a_resumed_run_is_the_run(base, tmp_path, alone):
    changes = {"train.steps": 6, "train.save_every": 3}
    recipe = load_recipe(None, options(base, **changes)) if alone else together(**changes)
    run, files = tmp_path / "whole", ["adapter/mtd_head.safetensors"]
    files += [] if alone else ["model/model.safetensors"]
    train(recipe, run)
    whole = [(run / file).read_bytes() for file in files]
    for name in ("checkpoint-6", *(file.split("/")[0] for file in files)):
        (run / name).rename(tmp_path / name)
    train(recipe, run, resume=True)
    assert [(run / file).read_bytes() for file in files] == whole


def test_its_key_in_a_recipe(tmp_path):
    path = tmp_path / "one.yaml"
    path.write_text("model: {base: somewhere}\nmtd: {}\n")
    recipe = load_recipe(path)
    assert recipe.mtd == MTDConfig()
    assert recipe.phi is None
    both = load_recipe(path, {"phi.mode": "observe", "mtd.depth": 3})
    assert both.mtd is not None
    assert both.mtd.depth == 3
    assert both.phi is not None
    assert load_recipe(path, {"mtd": None, "phi": {}}).mtd is None
    for changes, told in (
        ({"model.base": None, "phi.mode": "observe"}, "give model.base"),
        ({"model.frozen": False, "phi.mode": "observe"}, "leave model.frozen true"),
        ({"phi.layer": 1}, "set phi.mode to observe"),
        ({"mtd.depth": 1001}, "mtd.depth must be at most 1000"),
        ({"mtd.depth": 0}, "depth must be positive"),
        ({"mtd.width": 3}, "unknown key 'mtd.width'"),
    ):
        with pytest.raises(RecipeError, match=told):
            load_recipe(path, changes)
    assert tiny_recipe().mtd is None


# Errors.


def test_a_base_that_would_be_trained_beside_a_layer(tokens):
    lens = attach(make_llama(), [WATCHING, MTDConfig()])
    assert lens(tokens).mtd is not None
    with pytest.raises(InputError, match=r"stays as it is; call freeze_base\(\) first"):
        lens(tokens, labels=tokens)
    with torch.no_grad():
        assert lens(tokens, labels=tokens).loss > 0


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ([], "attach needs PHiConfig and MTDConfig, one or several of them, not an empty list"),
        ("mtd", "attach needs PHiConfig and MTDConfig"),
        ([MTDConfig(), MTDConfig(depth=2)], "once; several PHi layers are one PHiConfig with layers"),
        ([MTDConfig(), PHiConfig(layer=1)], 'disturb the other instrument; set mode="observe"'),
        (MTDConfig(heads=3), "must be a multiple of twice the shallow head's 3 attention heads"),
    ],
)
def test_configurations_that_do_not_fit(config, told):
    with pytest.raises(ConfigError, match=told):
        attach(make_llama(), config)


def test_embeddings_of_another_width(tokens):
    sizes = {"hidden_size": 32, "word_embed_proj_dim": 16, "ffn_dim": 32, "num_hidden_layers": 2}
    base = OPTForCausalLM(OPTConfig(vocab_size=128, num_attention_heads=2, **sizes)).eval()
    with pytest.raises(ConfigError, match="Embeddings have width 16 and hidden states 32"):
        attach(base, MTDConfig())(tokens)
    assert attach(make_llama(), MTDConfig(embedding=False))(tokens).mtd is not None


def test_what_is_of_phi_layers_alone_says_so(tmp_path):
    base = make_llama()
    lens = make_lens(base)
    with pytest.raises(
        ConfigError, match="philens reproduce needs a PHi layer, and this model has a shallow"
    ):
        use_formula(lens, None)
    base.save_pretrained(tmp_path / "model")
    CHARACTERS.save_pretrained(tmp_path / "model")
    lens.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ConfigError, match="philens explore needs a PHi layer"):
        Explored.open(ModelSource(str(tmp_path / "model")), [str(tmp_path / "adapter")])


def test_without_a_phi_layer_there_is_no_early_exit(tokens):
    with pytest.raises(InputError, match='returns="phi" needs a PHi layer, and there is none'):
        make_lens()(tokens, returns="phi")


def test_on_the_command_line(base, tmp_path, capsys):
    recipe = tmp_path / "head.yaml"
    recipe.write_text(recipe_yaml(load_recipe(None, options(base, **{"train.steps": 3}))))
    assert main(["train", str(recipe), "--output", str(tmp_path / "run")]) == 0
    (tmp_path / "a.txt").write_text("abc abc")
    capsys.readouterr()
    call = ["score", str(tmp_path / "a.txt"), "--model", str(tmp_path / "run")]
    assert main([*call, "--metrics", "mtd"]) == 0
    assert "mtd" in capsys.readouterr().out
    assert main(call) == 0
    assert "token                   mtd  surprisal\n" in capsys.readouterr().out
    assert main([*call, "--metrics", "phi"]) == 2
    assert "phi needs a PHi layer" in capsys.readouterr().err


def test_written_on_the_command_line(base, tmp_path, capsys):
    folder = tmp_path / "run"
    train(load_recipe(None, options(base, **{"train.steps": 3})), folder)
    call = ["score", "--generate", "abc", "--model", str(folder), "--max-new-tokens", "20"]
    texts = {}
    for alpha in ("0", "0.9", "-0.9"):
        capsys.readouterr()
        assert main([*call, "--steer", alpha]) == 0
        head, *rows = capsys.readouterr().out.splitlines()
        assert head.split() == ["token", "mtd", "surprisal"]
        texts[alpha] = [row.split()[1] for row in rows]
        assert len(rows) == 23
    assert main(call) == 0
    assert [row.split()[1] for row in capsys.readouterr().out.splitlines()[1:]] == texts["0"]
    assert len({*map("".join, texts.values())}) > 1
    assert main([*call, "--steer", "2"]) == 2
    assert "steer must be from -1 to 1, not 2.0." in capsys.readouterr().err
