"""Muon beside AdamW, as one optimiser."""

import pytest
import torch
from torch import nn

from philens.training.optimizer import ChainedOptimizer, load_state, make_optimizer
from philens.training.recipe import OptimizerRecipe


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 6), nn.RMSNorm(6), nn.Linear(6, 3))


def train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: int, first: int = 0) -> None:
    for step in range(first, first + steps):
        optimizer.zero_grad()
        tokens = (torch.arange(5) + step) % 7
        net(tokens).square().sum().backward()
        optimizer.step()


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_every_parameter_is_trained_once(name: str) -> None:
    net = model()
    optimizer = make_optimizer(net, OptimizerRecipe(name=name))
    trained = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(trained) == sorted(id(p) for p in net.parameters())


def test_muon_has_the_hidden_matrices_and_only_matrices_decay() -> None:
    net = model()
    optimizer = make_optimizer(net, OptimizerRecipe(name="muon", weight_decay=0.1))
    assert isinstance(optimizer, ChainedOptimizer)
    muon, adamw = optimizer.optimizers
    assert [id(p) for p in muon.param_groups[0]["params"]] == [id(net[1].weight), id(net[3].weight)]
    decay = {id(p): group["weight_decay"] for group in adamw.param_groups for p in group["params"]}
    assert decay[id(net[0].weight)] == 0.1
    assert decay[id(net[1].bias)] == decay[id(net[2].weight)] == 0.0


def test_a_muon_step_is_orthogonal_and_as_large_as_adamws() -> None:
    net = nn.Sequential(nn.Linear(64, 64, bias=False))
    before = net[0].weight.detach().clone()
    optimizer = make_optimizer(net, OptimizerRecipe(name="muon", learning_rate=1e-2, weight_decay=0.0))
    net[0].weight.grad = torch.randn(64, 64)
    optimizer.step()
    update = before - net[0].weight.detach()
    singular = torch.linalg.svdvals(update)
    # Newton-Schulz brings all singular values near one value: 0.2 sqrt(64) times the learning rate.
    assert singular.min() > 0.5 * 0.2 * 8 * 1e-2
    assert singular.max() < 1.4 * 0.2 * 8 * 1e-2


def test_schedulers_reach_all_parts() -> None:
    optimizer = make_optimizer(model(), OptimizerRecipe(name="muon", learning_rate=1.0))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    optimizer.step()
    scheduler.step()
    assert {group["lr"] for group in optimizer.param_groups} == {0.5}


def test_a_reloaded_state_goes_on_exactly() -> None:
    one, two = model(), model()
    whole = make_optimizer(one, OptimizerRecipe(name="muon", learning_rate=1e-2))
    train(one, whole, 6)
    first = make_optimizer(two, OptimizerRecipe(name="muon", learning_rate=1e-2))
    train(two, first, 3)
    second = make_optimizer(two, OptimizerRecipe(name="muon", learning_rate=1e-2))
    second.load_state_dict(first.state_dict())
    train(two, second, 3, first=3)
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("name", "number"), [("adamw", 0), ("muon", 0), ("muon", 1)])
def test_a_moment_that_is_not_finite_is_refused(name: str, number: int) -> None:
    net = model()
    optimizer = make_optimizer(net, OptimizerRecipe(name=name))
    train(net, optimizer, 1)
    state = optimizer.state_dict()
    load_state(optimizer, state)
    part = state.get("optimizers", [state])[number]
    moment = next(value for value in part["state"][0].values() if value.dim())
    moment.view(-1)[-1] = torch.inf
    with pytest.raises(ValueError, match="a number in it is not finite"):
        load_state(optimizer, state)
