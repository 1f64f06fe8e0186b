"""Numbers that overflow: told with dtype and block wherever scores are made, or kept as NaN and counted."""

import json

import numpy as np
import pytest
import torch

import philens
from conftest import make_llama
from philens import cli
from philens.bases.tokenizer import character_tokenizer
from philens.reasoning.engines import TransformersEngine
from philens.scoring.documents import score_documents
from philens.scoring.score import iter_scores, score
from philens.scoring.streaming import stream
from philens.support.errors import InputError
from philens.tasks.automata import TaskConfig, generate
from philens.training.source import ModelSource
from test_score import OwnModel, lens_of
from tiny import OF_A_LAYER

CHARACTERS = character_tokenizer()
TOLD = r"overflow in float16, from model\.layers\.2 on; load the model in a wider dtype"
LINES = ["hello world", "abc"]


def overflowing(**options):
    """In float16 what leaves block 2 of 4 overflows; its weights do not."""
    base = make_llama(num_hidden_layers=4)
    with torch.no_grad():
        base.model.layers[2].mlp.up_proj.weight *= 100
        base.model.layers[2].mlp.down_proj.weight *= 2e4
    return lens_of(base.half(), **options)


@pytest.fixture
def broken():
    return overflowing()


def first_tokens(values):
    return np.isnan(values[:1]), np.isfinite(values[1:])


AT_THE_LAYER = (
    "phi",
    "step_length",
    "state_norm",
    "phi_untrained",
)  # which stands below where numbers overflow here


@pytest.mark.parametrize("metric", [name for name in OF_A_LAYER if name not in AT_THE_LAYER])
def test_each_metric_is_told(broken, metric):
    with pytest.raises(InputError, match=rf"^texts\[1\] makes .* {TOLD}"):
        score(broken, CHARACTERS, ["a", "hello world"], metrics=[metric])


def test_below_the_place_all_is_well(broken):
    found = score(broken, CHARACTERS, LINES, metrics=AT_THE_LAYER)
    assert all(np.isfinite(one.phi).all() for one in found)
    assert all("overflowed" not in one.provenance for one in found)


def test_streams_replies_rank_and_reward_tell_it(broken):
    with pytest.raises(InputError, match=TOLD):
        next(iter_scores(broken, CHARACTERS, LINES, names=["one", "two"]))
    with pytest.raises(InputError, match=rf"candidate 0 of prompt 0 makes .*{TOLD}"):
        philens.rank(broken, CHARACTERS, "abc", ["ab", "cd"], rule="lowest_surprisal")
    with pytest.raises(InputError, match=TOLD):
        philens.PHiReward(broken, CHARACTERS, "lowest_surprisal")(["abc"], ["ab"])


def test_documents_of_formal_languages(broken):
    docs = generate(TaskConfig(), 0, "random", np.arange(3)).cut(20)
    with pytest.raises(InputError, match=rf"docs\[0\] makes .*{TOLD}"):
        score_documents(broken, docs)
    kept = score_documents(broken, docs, overflow="nan")
    assert np.isnan(kept.surprisal).all()
    assert np.isfinite(kept.phi).all()
    whole = score_documents(lens_of(make_llama()), docs)
    assert np.isnan(whole.surprisal).sum() == 3


@pytest.mark.parametrize("sample", [False, True])
def test_generation(broken, sample):
    ids = torch.tensor([[5, 40, 41], [40, 41, 42]])
    with pytest.raises(InputError, match=TOLD):
        broken.generate(ids, max_new_tokens=4, do_sample=sample)
    with pytest.raises(InputError, match=TOLD):
        stream(broken, CHARACTERS, "abc", lambda *values: None, max_new_tokens=3, do_sample=sample)
    if not sample:
        kept = broken.generate(ids, max_new_tokens=4, overflow="nan")
        assert kept.surprisal.isnan().all()
    assert torch.isfinite(lens_of(make_llama()).generate(ids, max_new_tokens=4).surprisal[:, 1:]).all()


def test_solving(tmp_path, broken):
    broken.base.config.eos_token_id = 3
    broken.base.save_pretrained(tmp_path)
    CHARACTERS.save_pretrained(tmp_path)
    engine = TransformersEngine(ModelSource(str(tmp_path), dtype="float16"), 1.0, 1.0)
    with pytest.raises(InputError, match=rf"A solution makes .*{TOLD}"):
        engine.draw([[40, 41], [42]], [3, 3], seed=0)


def test_kept_as_nan_and_counted(broken):
    found = score(broken, CHARACTERS, LINES, overflow="nan", metrics=OF_A_LAYER)
    for one in found:
        assert one.provenance["overflowed"] == len(one) - 1
        assert np.isnan(one.surprisal).all()
        assert np.isnan(one.columns["settling_depth"][1:]).all()
        assert np.isfinite(one.columns["phi"]).all()
        assert np.isfinite(one.columns["step_length"][1:]).all()


def test_infinities_become_nan_and_leave_others_as_they_are():
    """A length that is infinite is not averaged over."""
    plain = lens_of(make_llama(), layer=2)
    text = "hello wide world"
    before = score(plain, CHARACTERS, text, metrics=["step_length"])[0].columns["step_length"]
    place, hook = 9, None

    def spoil(module, args, output):
        output = output.clone()
        output[:, place] = torch.inf
        return output

    hook = plain.base.model.layers[2].mlp.register_forward_hook(spoil)
    with pytest.raises(InputError, match=r"overflow in float32, from model\.layers\.2 on"):
        score(plain, CHARACTERS, text, metrics=["step_length"])
    after = score(plain, CHARACTERS, text, metrics=["step_length"], overflow="nan")[0]
    hook.remove()
    values = after.columns["step_length"]
    assert np.flatnonzero(np.isnan(values)).tolist() == [0, place, place + 1]
    assert after.provenance["overflowed"] == 2
    kept = np.isfinite(values)
    ratio = before[kept] / values[kept]
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-4)
    assert 0.5 < ratio[0] < 2


def test_where_it_began():
    def told(lens, **options):
        with pytest.raises(InputError) as caught:
            score(lens, CHARACTERS, "hello", **options)
        return str(caught.value).partition(", from ")[2].partition(" on;")[0]

    head = lens_of(make_llama(tie_word_embeddings=False))
    with torch.no_grad():
        head.base.lm_head.weight[3] = torch.inf
    assert told(head) == "the output head"
    embedded = lens_of(make_llama())
    embedded.base.model.embed_tokens.register_forward_hook(lambda *args: args[-1] * torch.inf)
    assert told(embedded) == "what comes before model.layers.0"
    layer = lens_of(make_llama())
    with torch.no_grad():
        layer.phi.decoder.weight.mul_(1e38)
    assert told(layer, metrics=["surprisal_with_layer"]) == "model.layers.1"
    with torch.no_grad():
        layer.phi.encoder.weight.mul_(torch.inf)
    assert told(layer, metrics=["phi"]) == "the PHi layer after model.layers.1"
    own = lens_of(OwnModel(), layer=None, module="lstm")
    own.base.lstm.register_forward_hook(lambda module, args, output: (output[0] * torch.nan, output[1]))
    assert told(own, metrics=["surprisal"]) == "lstm"


def test_first_tokens_bos_and_padding_stay_what_they_are():
    """A sink that overflows alone is no token with a predecessor; nor is what fills a batch."""
    lens = lens_of(make_llama())
    lens.phi.register_forward_hook(spoil_first_phi)
    found = score(lens, CHARACTERS, ["a", "hello world", "abc"])
    assert all(np.isinf(one.phi[0]) and np.isfinite(one.phi[1:]).all() for one in found)
    assert all(np.isnan(one.surprisal[0]) for one in found)


def test_what_fills_a_batch_may_overflow():
    """A batch is filled with token 0; alone, no text has it."""
    lens = lens_of(make_llama())
    texts = ["ab", "hello wide world, hello", "xyz"]
    docs = generate(TaskConfig(), 0, "random", np.arange(4))
    assert len(set(docs.lengths)) > 1
    before, table = score(lens, CHARACTERS, texts), score_documents(lens, docs)
    with torch.no_grad():
        lens.base.get_input_embeddings().weight[0] = torch.inf
    lens.base.lm_head.weight = torch.nn.Parameter(lens.base.lm_head.weight.nan_to_num(0, 0, 0))
    after = score(lens, CHARACTERS, texts)
    for one, other in zip(before, after, strict=True):
        np.testing.assert_allclose(one.phi, other.phi, rtol=1e-4, atol=1e-4)
        assert np.isfinite(other.surprisal[1:]).all()
    np.testing.assert_allclose(score_documents(lens, docs).phi, table.phi, rtol=1e-4, atol=1e-4)


def spoil_first_phi(module, args, output):
    output.phi[:, 0] = torch.inf


def test_the_command(tmp_path, monkeypatch, capsys, broken):
    monkeypatch.chdir(tmp_path)
    broken.base.save_pretrained("base")
    CHARACTERS.save_pretrained("base")
    broken.save_pretrained("adapter")
    (tmp_path / "lines.txt").write_text("\n".join(LINES))
    model = ["--model", "base", "--adapter", "adapter", "--dtype", "float16"]
    words = ["score", "lines.txt", "--by", "line", *model]
    assert cli.main([*words, "--format", "jsonl", "--output", "out"]) == 2
    assert "lines.txt:1 makes the model's numbers overflow in float16, from model.layers.2 on" in (
        capsys.readouterr().err
    )
    for form in ("jsonl", "parquet"):
        options = ["--format", form, "--output", f"{form}.out", "--overflow", "nan"]
        assert cli.main([*words, *options]) == 0
        said = capsys.readouterr().out
        assert "2 documents with 14 tokens, 12 of them NaN as the model overflowed." in said
        manifest = json.loads((tmp_path / f"{form}.out" / "_manifest.json").read_text())
        assert manifest["progress"]["overflowed"] == 12
        assert manifest["options"]["overflow"] == "nan"
        assert "overflowed" not in manifest["provenance"]
    lines = (tmp_path / "jsonl.out" / "part-00000.jsonl").read_text().splitlines()
    assert [json.loads(line)["provenance"]["overflowed"] for line in lines] == [10, 2]
    assert cli.main([*words, "--format", "table", "--overflow", "nan"]) == 0
    assert "12 of them NaN" in capsys.readouterr().err
    assert cli.main(["score", "--generate", "abc", *model]) == 2
    assert "from model.layers.2 on" in capsys.readouterr().err


def test_an_unknown_way():
    with pytest.raises(InputError, match="overflow must be error or nan, not 'zero'"):
        score(lens_of(make_llama()), CHARACTERS, "abc", overflow="zero")  # pyright: ignore[reportArgumentType]
