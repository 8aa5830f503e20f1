"""Noise schedules of diffusion models (Ho, Jain & Abbeel, NeurIPS 2020).

    x_t = √ᾱ_t x_0 + √(1 − ᾱ_t) ε,  t = 0 … T − 1

Names, constants and numbers are those of `diffusers.DDPMScheduler`, against which tests compare
them (importing it takes seconds, which every worker of an audit would pay), plus
"sigmoid_alphas", which GIDM's published code uses through another package.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from gradleak.errors import InvalidInput, nearest

Prediction = Literal["epsilon", "v_prediction"]
"""What the network predicts: ε, or v = √ᾱ ε − √(1 − ᾱ) x_0 (Salimans & Ho, ICLR 2022)."""

_FIRST, _LAST = 1e-4, 0.02
"""β of the first and of the last step."""
_MOST = 0.999


def _linear(steps: int) -> Tensor:
    return torch.linspace(_FIRST, _LAST, steps, dtype=torch.float64)


def _scaled_linear(steps: int) -> Tensor:
    return torch.linspace(_FIRST**0.5, _LAST**0.5, steps, dtype=torch.float64) ** 2


def _sigmoid(steps: int) -> Tensor:
    rising = torch.linspace(-6, 6, steps, dtype=torch.float64).sigmoid()
    return rising * (_LAST - _FIRST) + _FIRST


def _cosine(steps: int) -> Tensor:
    def remaining(share: float) -> float:
        return math.cos((share + 0.008) / 1.008 * math.pi / 2) ** 2

    ratios = [remaining((i + 1) / steps) / remaining(i / steps) for i in range(steps)]
    return torch.tensor([min(1 - ratio, _MOST) for ratio in ratios], dtype=torch.float64)


def _sigmoid_alphas(steps: int) -> Tensor:
    """ᾱ itself falls as a sigmoid does from −3 to 3 (Jabri, Fleet & Chen, ICML 2023)."""
    falling = 1 - torch.linspace(-3, 3, steps + 1, dtype=torch.float64).sigmoid()
    alphas = (falling - falling[-1]) / (falling[0] - falling[-1])
    return (1 - alphas[1:] / alphas[:-1]).clamp(0, _MOST)


SCHEDULES: Mapping[str, Callable[[int], Tensor]] = {
    "linear": _linear,
    "scaled_linear": _scaled_linear,
    "sigmoid": _sigmoid,
    "squaredcos_cap_v2": _cosine,
    "sigmoid_alphas": _sigmoid_alphas,
}
"""Steps → β_0 … β_{T−1}."""


@dataclass(frozen=True)
class Schedule:
    """A noise schedule and what networks under it predict.

    Images are (b, *shape) in [−1, 1] and times (b,), whole or, in between, interpolated, or (b, T)
    shares of all times, whose mean ᾱ counts: all functions are differentiable in both.

    Attributes:
        name: of `SCHEDULES`.
        timesteps: T.
        prediction: what the network predicts.
    """

    name: str = "linear"
    timesteps: int = 1000
    prediction: Prediction = "epsilon"

    def __post_init__(self) -> None:
        if self.name not in SCHEDULES:
            raise InvalidInput(f"schedule {self.name!r}: {nearest(self.name, SCHEDULES)}")
        if self.timesteps < 2:
            raise InvalidInput(f"timesteps={self.timesteps}: expected at least 2")
        if self.prediction not in ("epsilon", "v_prediction"):
            raise InvalidInput(
                f"prediction {self.prediction!r}: expected 'epsilon' or 'v_prediction'"
            )

    @cached_property
    def alphas(self) -> Tensor:
        """ᾱ, (T,) float64."""
        return (1 - SCHEDULES[self.name](self.timesteps)).cumprod(0)

    def alpha(self, times: Tensor, like: Tensor) -> Tensor:
        """ᾱ at `times`, in the type of `like` and (b, 1, …) so as to multiply it."""
        known = self.alphas.to(like)
        if times.ndim == 2:
            found = times.to(like) @ known
        elif times.is_floating_point():
            low = times.detach().floor().clamp(0, self.timesteps - 2)
            share = times.to(like) - low.to(like)
            index = low.long()
            found = known[index] * (1 - share) + known[index + 1] * share
        else:
            found = known[times]
        return found.reshape(-1, *[1] * (like.ndim - 1))

    def noised(self, clean: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """x_t of x_0 and ε."""
        alpha = self.alpha(times, clean)
        return alpha.sqrt() * clean + (1 - alpha).sqrt() * noise

    def target(self, clean: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """What a network should predict from x_t: ε or v."""
        if self.prediction == "epsilon":
            return noise
        alpha = self.alpha(times, clean)
        return alpha.sqrt() * noise - (1 - alpha).sqrt() * clean

    def clean(self, noised: Tensor, output: Tensor, times: Tensor) -> Tensor:
        """The network's estimate of x_0, from its output at x_t (Tweedie's formula)."""
        alpha = self.alpha(times, noised)
        if self.prediction == "epsilon":
            return (noised - (1 - alpha).sqrt() * output) / alpha.sqrt()
        return alpha.sqrt() * noised - (1 - alpha).sqrt() * output

    def noise(self, noised: Tensor, output: Tensor, times: Tensor) -> Tensor:
        """The network's estimate of ε, from its output at x_t."""
        if self.prediction == "epsilon":
            return output
        alpha = self.alpha(times, noised)
        return alpha.sqrt() * output + (1 - alpha).sqrt() * noised
