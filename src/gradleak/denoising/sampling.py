"""Drawing with a denoising network: DDIM (Song, Meng & Ermon, ICLR 2021)."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from gradleak.denoising.schedule import Schedule
from gradleak.errors import InvalidInput
from gradleak.seeding import normal

Denoise = Callable[[Tensor, Tensor], Tensor]
"""(x_t (b, *shape) in [−1, 1], times (b,)) → the network's output (b, *shape)."""


def grid(schedule: Schedule, steps: int, *, start: int | None = None) -> list[int]:
    """`steps` times from `start`, or else from T − 1, down to 0, as even as they can be.

    Raises:
        InvalidInput: more steps than there are times.
    """
    last = schedule.timesteps - 1 if start is None else start
    if not 1 <= steps <= last + 1:
        raise InvalidInput(f"{steps} steps of sampling: expected 1 to {last + 1}")
    return [int(t) for t in torch.linspace(last, 0, steps, dtype=torch.float64).round()]


def ddim(
    schedule: Schedule,
    denoise: Denoise,
    latents: Tensor,
    *,
    steps: int,
    eta: float = 0.0,
    start: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """x_0 (b, *shape) that latents x_T lead to; differentiable in them and in the network.

    Args:
        schedule: of the network.
        denoise: the network.
        latents: x at time `start`, N(0, 1) at the last one.
        steps: evaluations of the network.
        eta: 0 is deterministic, 1 as random as the diffusion itself.
        start: time of the latents; None for the last one.
        generator: of the noise, where eta > 0.
    """
    x = latents
    for time, following in _pairs(grid(schedule, steps, start=start)):
        times = torch.full((len(x),), time, device=x.device)
        output = denoise(x, times)
        clean = schedule.clean(x, output, times).clamp(-1, 1)
        if following is None:
            return clean
        now, after = schedule.alphas[time], schedule.alphas[following]
        # ε of the clamped estimate: the two must belong together.
        noise = (x - now.sqrt().item() * clean) / (1 - now).sqrt().item()
        sigma = eta * ((1 - after) / (1 - now) * (1 - now / after)).sqrt().item()
        x = after.sqrt().item() * clean + (1 - after - sigma**2).clamp(min=0).sqrt().item() * noise
        if sigma:
            assert generator is not None
            x = x + sigma * normal(x.shape, generator=generator, dtype=x.dtype).to(x.device)
    raise AssertionError("a grid ends at time 0")


def guided_output(conditional: Tensor, free: Tensor, weight: float) -> Tensor:
    """Classifier-free guidance (Ho & Salimans, 2022): (1 + w) · conditional − w · free."""
    return (1 + weight) * conditional - weight * free


def _pairs(times: list[int]) -> Iterator[tuple[int, int | None]]:
    following: list[int | None] = [*times[1:], None]
    return zip(times, following, strict=True)
