"""Which noise levels a client of a diffusion model drew, from layers that see nothing else.

A linear layer whose input ψ(t) depends on the time alone has the gradient

    ∂L/∂W = Σ_i δ_i ψ(t_i)ᵀ

whatever the images and the noise are. The times are those whose ψ span its rows: as in MUSIC
(Schmidt, IEEE TAP 1986) every t is scored by how much of ψ(t) lies outside the row space, and the
set is then refined, one time after another, to explain most of all such layers' gradients together
(maximum likelihood under Gaussian noise). Local steps of plain SGD leave the first of these layers
a sum of the same form, as no weight comes before it.

Source: gradleak; found for this project and not known to be published.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from gradleak.defenses.wrapped import undefended
from gradleak.errors import NotApplicable
from gradleak.mechanisms.client import own_buffers, template
from gradleak.mechanisms.denoising import Denoising, Diffusing
from gradleak.types import ModelState, Observation

Layers = Literal["first", "all"]

_SMALL = 8
"""Side of the images that layers are probed with, where the network takes them."""
_AT_ONCE = 250
_ABOVE = 1.1
"""Singular values count that exceed the largest which noise would have by this factor."""
_EDGE = 64.0
"""Singular values count that exceed rounding, in units of it, by this factor."""
_ROUNDS = 20
_LEAST = 1e-9


@dataclass(frozen=True)
class Times:
    """What the gradient says of the times.

    Attributes:
        distinct: different times found, ascending.
        unexplained: share of the layers' gradients, squared, that these leave over.
        runner_up: the smallest such share once one of the times is replaced by any other.
        layers: names of the layers used.
    """

    distinct: tuple[int, ...]
    unexplained: float
    runner_up: float
    layers: tuple[str, ...]

    @property
    def margin(self) -> float:
        """How much better these times explain the gradient than the next best: 1 is none."""
        return self.runner_up / max(self.unexplained, torch.finfo(torch.float64).tiny)

    def assigned(self, size: int) -> list[tuple[int, ...]]:
        """All ways in which `size` images can share these times; their order means nothing."""
        extra = itertools.combinations_with_replacement(self.distinct, size - len(self.distinct))
        return [tuple(sorted((*self.distinct, *more))) for more in extra]


def recovered_times(seen: Observation, *, layers: Layers = "all") -> Times:
    """The distinct times of a round, in closed form.

    Args:
        seen: an update of a client that trains a diffusion model.
        layers: use every layer that the time alone enters, or the first one only.

    Raises:
        NotApplicable: no such layer's gradient was sent, or it holds too many times to tell.
    """
    core = undefended(seen.mechanism)
    if not isinstance(core, Diffusing):
        raise NotApplicable("times: the client is not known to train a diffusion model")
    size = seen.knowledge.batch_size or 1
    draws = size * core.visits(size)
    inputs = time_inputs(seen.state, seen.data.shape, core.timesteps)
    # Local steps move the weights ahead of all but the first layer.
    single = layers == "first" or not isinstance(core, Denoising)
    chosen = dict(list(inputs.items())[:1]) if single else inputs
    sent = {name: seen.update.values[f"{name}.weight".lstrip(".")] for name in chosen}
    usable = {
        name: (value.detach().double().cpu(), inputs[name])
        for name, value in sent.items()
        if value.isfinite().all() and value.any()
    }
    if not usable:
        raise NotApplicable(
            "times: no gradient of a layer that the time alone enters was sent"
            + (f" ({', '.join(inputs)})" if inputs else "")
        )
    eps = max(torch.finfo(value.dtype).eps for value in sent.values())
    return _solved(usable, draws, eps)


def time_inputs(state: ModelState, shape: tuple[int, ...], timesteps: int) -> dict[str, Tensor]:
    """ψ(t) (timesteps, width) of every trained linear layer that the time alone enters, in order.

    Layers are found by probing: what enters them is equal for different images and differs
    between times.

    Args:
        state: of a network (x_t, times) → prediction.
        shape: of an image.
        timesteps: T.
    """
    network = template(state.model, "eval")
    reference = next(iter(state.params.values()))
    numbers = {**own_buffers(network, state), **state.params}

    def entered(images: Tensor, times: Tensor) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}

        def recorder(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            def record(_: nn.Module, given: tuple[Tensor, ...]) -> None:
                found.setdefault(name, given[0].detach())

            return record

        handles = [
            layer.register_forward_pre_hook(recorder(name))
            for name, layer in network.named_modules()
            if isinstance(layer, nn.Linear) and f"{name}.weight".lstrip(".") in state.params
        ]
        try:
            with torch.no_grad():
                torch.func.functional_call(network, numbers, (images.to(reference), times))
        finally:
            for handle in handles:
                handle.remove()
        return {k: v for k, v in found.items() if v.ndim == 2 and len(v) == len(times)}

    def alone(shape: tuple[int, ...]) -> list[str]:
        """Layers that the time alone enters."""
        stream = torch.Generator().manual_seed(0)
        images = torch.randn((4, *shape), generator=stream)
        probes = torch.tensor([0, 0, timesteps - 1, timesteps // 2], device=reference.device)
        told = entered(images, probes)
        return [
            name
            for name, h in told.items()
            if torch.allclose(h[0], h[1], rtol=1e-6, atol=1e-9)
            and not torch.allclose(h[0], h[2], rtol=1e-3)
            and not torch.allclose(h[0], h[3], rtol=1e-3)
        ]

    names = alone(shape)
    small = (*shape[:1], *(min(side, _SMALL) for side in shape[1:]))
    probe = shape
    if small != shape:
        try:
            probe = small if alone(small) == names else shape
        except (RuntimeError, ValueError):  # a network of one size alone
            probe = shape
    parts = []
    for times in torch.split(torch.arange(timesteps, device=reference.device), _AT_ONCE):
        told = entered(torch.zeros(len(times), *probe), times)
        parts.append({name: told[name].double().cpu() for name in names})
    return {name: torch.cat([part[name] for part in parts]) for name in names}


def _solved(usable: Mapping[str, tuple[Tensor, Tensor]], draws: int, eps: float) -> Times:
    """The times that explain gradients (out, width) by inputs (T, width), layer by layer."""
    count, widest = 0, 0
    outside = torch.zeros(len(next(iter(usable.values()))[1]), dtype=torch.float64)
    kept: dict[str, tuple[Tensor, Tensor]] = {}
    for name, (gradient, inputs) in usable.items():
        most = min(inputs.shape[1], len(gradient))
        if draws >= most:
            continue
        widest = max(widest, most)
        _, values, rows = torch.linalg.svd(gradient, full_matrices=False)
        rank = min(draws, _rank(values, draws, gradient.shape, eps))
        if rank == 0:
            continue
        kept[name] = gradient, inputs
        count = max(count, rank)
        unit = inputs / inputs.norm(dim=1, keepdim=True)
        outside += 1 - (unit @ rows[:rank].T).square().sum(1)
    if not kept:
        if widest:
            raise NotApplicable("times: the layers that the time alone enters hold noise only")
        raise NotApplicable(f"times: {draws} draws are more than the time's layers tell apart")
    problem = list(kept.values())
    # Two starts: the row space, exact without noise, and one time after another, robust with it.
    starts = [[int(t) for t in outside.argsort()[:count]], []]
    found = [_refined(problem, start, count) for start in starts]
    chosen, left = min(found, key=lambda pair: pair[1])
    whole = sum(float(g.square().sum()) for g, _ in problem)
    runner = math.inf
    for i in range(count):
        scores = _explained(problem, [t for j, t in enumerate(chosen) if j != i])
        scores[chosen] = -math.inf
        runner = min(runner, whole - float(scores.max()))
    return Times(
        tuple(sorted(chosen)), max(left, 0.0) / whole, max(runner, 0.0) / whole, tuple(kept)
    )


def _rank(values: Tensor, most: int, shape: Sequence[int], eps: float) -> int:
    """Singular values above what rounding, or the noise that the smallest ones show, would give."""
    rows, columns = shape
    spread = (float(values[most:].square().sum()) / ((rows - most) * (columns - most))) ** 0.5
    noise = _ABOVE * spread * (rows**0.5 + columns**0.5)
    return int((values > max(noise, _EDGE * eps * float(values[0]))).sum())


def _explained(problem: Sequence[tuple[Tensor, Tensor]], others: list[int]) -> Tensor:
    """(T,) squares of the gradients that `others` and one more time explain together."""
    total = torch.zeros(len(problem[0][1]), dtype=torch.float64)
    for gradient, inputs in problem:
        own = inputs
        if others:
            basis, _ = torch.linalg.qr(inputs[others].T)
            total += (gradient @ basis).square().sum()
            own = inputs - (inputs @ basis) @ basis.T
        length = own.square().sum(1)
        fresh = length > _LEAST * inputs.square().sum(1)
        gain = (own @ gradient.T).square().sum(1) / length.clamp(min=torch.finfo(length.dtype).tiny)
        total += torch.where(fresh, gain, torch.zeros_like(gain))
    return total


def _refined(
    problem: Sequence[tuple[Tensor, Tensor]], start: list[int], count: int
) -> tuple[list[int], float]:
    """Times and the square that they leave over, each chosen given the others until none moves."""
    times = list(start)
    while len(times) < count:
        times.append(int(_explained(problem, times).argmax()))
    for _ in range(_ROUNDS):
        before = list(times)
        for i in range(count):
            others = [t for j, t in enumerate(times) if j != i]
            scores = _explained(problem, others)
            best = int(scores.argmax())
            if float(scores[best]) > float(scores[times[i]]):
                times[i] = best
        if times == before:
            break
    left = 0.0
    for gradient, inputs in problem:
        basis, _ = torch.linalg.qr(inputs[times].T)
        left += float((gradient - (gradient @ basis) @ basis.T).square().sum())
    return times, left
