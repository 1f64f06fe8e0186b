"""Rows about the layer by itself: its arithmetic and its contrastive loss.

Shapes: B rows, T tokens, D hidden size, L latent size, H heads, C = L / H.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness import Bench, Comparison, Series, Target, Unavailable
from benchmarks.models import scratch_recipe
from benchmarks.peak import peak_bytes
from philens.lens.config import PHiConfig
from philens.lens.divergence import contrastive_loss
from philens.lens.layer import PHiLayer
from philens.support.errors import InputError

# Causal attention's products are cut into so many pieces, so that about half of the squares is left out.
PIECES = 8


def hidden_states(bench: Bench) -> Tensor:
    """(B, T, D) as they reach the paper's layer: float32, and wanting a gradient."""
    size = bench.pick((2, 32, 48), (2, 2048, 768), (16, 2048, 768))
    generator = torch.Generator().manual_seed(0)
    return torch.randn(*size, generator=generator).to(bench.device).requires_grad_()


def layer_work(bench: Bench, layer: PHiLayer, hidden: Tensor) -> Callable[[], None]:
    """Forward and backward of one of our layers, with the losses that its config weighs."""
    upstream = torch.randn_like(hidden)
    layer.train()

    def work() -> None:
        with bench.autocast():
            output = layer(hidden)
            loss = layer.config.phi_weight * output.phi.mean() / output.latent.shape[-1]
            if output.contrastive is not None:
                loss = loss + layer.config.contrastive_weight * output.contrastive.mean()
        torch.autograd.backward([loss, output.hidden_states], [None, upstream])
        hidden.grad = None
        layer.zero_grad()

    return work


def bare_products(layer: PHiLayer, rows: int, length: int, dtype: torch.dtype) -> Callable[[], None]:
    """The layer's matrix products and nothing else: of each map forward, to its input and to its weight; of
    causal attention forward, and to queries, keys and values."""
    device = layer.decoder.weight.device
    products: list[tuple[Tensor, Tensor, Tensor]] = []

    def add(left: Tensor, right: Tensor) -> None:
        products.append((left, right, (left @ right)))

    for module in layer.modules():
        if isinstance(module, nn.Linear):
            x = torch.randn(rows * length, module.in_features, device=device, dtype=dtype)
            weight = module.weight.detach().to(dtype)
            y = torch.randn(rows * length, module.out_features, device=device, dtype=dtype)
            add(x, weight.T)
            add(y, weight)
            add(y.T, x)
    if layer.config.prior == "attention":
        heads = layer.config.prior_heads or max(1, layer.latent_size // 64)
        size = (rows * heads, length, layer.latent_size // heads)
        q, k, v, upstream = (torch.randn(size, device=device, dtype=dtype) for _ in range(4))
        step = -(-length // PIECES)
        for start in range(0, length, step):
            end = min(start + step, length)
            query, key, value = q[:, start:end], k[:, :end], v[:, :end]
            weights = (query @ key.mT).contiguous()
            gradient = upstream[:, start:end]
            for left, right in (
                (query, key.mT),
                (weights, value),
                (gradient, value.mT),
                (weights.mT, gradient),
                (weights, key),
                (weights.mT, query),
            ):
                add(left, right)

    def work() -> None:
        for left, right, out in products:
            torch.matmul(left, right, out=out)

    return work


def layer_alone(bench: Bench) -> list[Comparison]:
    """The paper's layer, forward and backward, against its matrix products alone in the same precision."""
    recipe = scratch_recipe(bench)
    config = recipe.phi or PHiConfig()
    hidden = hidden_states(bench)
    rows, length, width = hidden.shape
    layers = {"the layer alone": PHiLayer(width, config).to(bench.device)}
    if recipe.train.compile:
        eager, compiled = PHiLayer(width, config).to(bench.device), layers["the layer alone"]
        compiled.compile(dynamic=False)
        layers = {"the layer alone, compiled": compiled, "the layer alone, not compiled": eager}
    works = {name: layer_work(bench, layer, hidden) for name, layer in layers.items()}
    first = next(iter(layers.values()))
    works["its matrix products"] = bare_products(first, rows, length, bench.dtype)
    seconds = bench.alternate(works)
    bare = seconds.pop("its matrix products")
    precision = str(bench.dtype).removeprefix("torch.")
    note = f"{rows} rows of {length:,} tokens, D {width}, {precision}; forward and backward"
    ours, *others = seconds.values()
    return [
        Comparison(ours, bare, Target(1.5), note),
        *(Comparison(other, bare, None, "as frozen bases' recipes run it") for other in others),
    ]


def literal_contrastive_loss(z: Tensor, mean: Tensor, logvar: Tensor) -> Tensor:
    """The contrastive loss as it is written down: the density of every row's latent under every row's
    posterior, (B, B, T, L) numbers, summed over L. (B, T) in nats."""
    density = -F.gaussian_nll_loss(mean[:, None], z[None], logvar.exp()[:, None], reduction="none").sum(-1)
    own = torch.arange(len(z), device=z.device)[:, None].expand(z.shape[:2])
    return F.cross_entropy(density.transpose(1, 2).flatten(0, 1), own.flatten(), reduction="none").view_as(
        own
    )


def contrastive(bench: Bench) -> list[Comparison]:
    """The contrastive loss, forward and backward: seconds and peak memory."""
    rows, length, width = size = bench.pick((4, 16, 32), (16, 2048, 768), (16, 2048, 768))
    _require_memory(bench, 8 * 4 * rows * rows * length * width)
    generator = torch.Generator().manual_seed(0)
    z, mean, logvar = (0.3 * torch.randn(3, *size, generator=generator)).to(bench.device).unbind()
    inputs = [value.clone().requires_grad_() for value in (z, mean, logvar)]

    def work(loss: Callable[..., Tensor]) -> Callable[[], None]:
        def run() -> None:
            loss(*inputs).mean().backward()
            for value in inputs:
                value.grad = None

        return run

    works = {
        "contrastive loss": work(contrastive_loss),
        "literal (B, B, T, L)": work(literal_contrastive_loss),
    }
    rows_few, length_few = min(rows, 4), min(length, 64)
    few = [value.detach()[:rows_few, :length_few] for value in inputs]
    apart = (contrastive_loss(*few) - literal_contrastive_loss(*few)).abs().max()
    if not float(apart) < 1e-3:
        raise InputError(
            f"The two contrastive losses differ by {float(apart):.2g} nats; one of them is wrong."
        )
    seconds = bench.alternate(works, min(bench.repetitions, 2))
    held = {
        name: Series(f"{name}, peak memory", [float(peak_bytes(bench.device, run, inputs))], "B")
        for name, run in works.items()
    }
    note = f"B {rows}, T {length}, D {width}, float32; forward and backward"
    (ours, theirs), (ours_held, theirs_held) = seconds.values(), held.values()
    gradients = {"gradients_bytes": sum(value.nbytes for value in inputs)}
    return [
        Comparison(ours, theirs, Target(1.0), note),
        Comparison(ours_held, theirs_held, Target(0.05, text="≤ 1/20"), "peak beyond the inputs", gradients),
    ]


def _require_memory(bench: Bench, needed: int) -> None:
    import psutil

    if bench.device.type == "cuda":
        free = torch.cuda.mem_get_info(bench.device)[0]
    else:
        free = psutil.virtual_memory().available
    if needed > free:
        raise Unavailable(
            f"the literal computation takes {needed / 1e9:.0f} GB and {free / 1e9:.0f} GB are free"
        )
