"""The affine map of each entry that stands before a first layer, found by three inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gradleak.types import DataSpec


def probes(data: DataSpec) -> list[Tensor]:
    """Inputs (1, *shape) in float64: all at the lower bound, all at the upper, and random ones."""
    low, high = data.bounds
    stream = torch.Generator().manual_seed(0)
    drawn = low + (high - low) * torch.rand((1, *data.shape), generator=stream, dtype=torch.float64)
    return [torch.full_like(drawn, low), torch.full_like(drawn, high), drawn]


def undoing(
    name: str, reached: Sequence[Tensor], data: DataSpec
) -> Callable[[Tensor], Tensor] | str:
    """The way from a first layer's input back to the network's, or why there is none.

    Args:
        name: of the layer.
        reached: what enters it for each of `probes`, of any shape.
        data: form of the network's input.
    """
    low, high = data.bounds
    at_low, at_high, at_probe = (h.flatten() for h in reached)
    probe = probes(data)[-1]
    width = at_high - at_low
    if at_low.numel() != probe.numel() or bool((width == 0).any()):
        return f"the first layer {name!r} does not see every input entry"
    share = (at_probe - at_low) / width
    if not torch.allclose(low + (high - low) * share, probe.flatten(), rtol=0, atol=1e-9):
        return f"the input of the first layer {name!r} is not an affine image of the data"

    def undo(hidden: Tensor) -> Tensor:
        scaled = (hidden.flatten() - at_low.to(hidden)) / width.to(hidden)
        return (low + (high - low) * scaled).reshape(data.shape)

    return undo
