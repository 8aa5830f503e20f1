"""What determines the input of one layer of a chain: its outputs and its weight gradient."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, unfold
from torch.nn.grad import conv2d_input, conv2d_weight

from gradleak.attacks.closed_form.chain import Link, unknowns

_REFINEMENTS = 30
_CONVERGED = 1e-15


def output_shape(link: Link, numbers: int) -> tuple[int, ...]:
    """Shape of one example where it leaves the layer with so many numbers."""
    if isinstance(link.layer, nn.Linear):
        return 1, numbers
    blank = torch.zeros((1, *link.shape), dtype=torch.float64)
    shape: tuple[int, ...] = tuple(
        conv2d(blank, torch.zeros_like(link.layer.weight).double(), None, *_geometry(link)).shape
    )
    return shape


def back(link: Link, weight: Tensor, d: Tensor) -> Tensor:
    """∂L/∂x of the layer's input."""
    if isinstance(link.layer, nn.Linear):
        return d @ weight
    found: Tensor = conv2d_input(  # type: ignore[no-untyped-call]
        (1, *link.shape), weight, d, *_geometry(link)
    )
    return found


def _geometry(link: Link) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int]:
    layer = link.layer
    assert isinstance(layer, nn.Conv2d)
    assert not isinstance(layer.padding, str)
    return layer.stride, layer.padding, layer.dilation, 1


class Convolution:
    """Both sets of equations of one convolution, scaled to equal right-hand sides."""

    def __init__(self, link: Link, weight: Tensor, d: Tensor, precision: float) -> None:
        self.link, self.weight = link, weight
        matrix = d[0].flatten(1)
        left, strengths, right = torch.linalg.svd(matrix, full_matrices=False)
        kept = strengths > 100 * precision * strengths[0]
        self.compressed = right[kept].view(1, -1, *d.shape[2:])
        self.to_compressed = (left[:, kept] / strengths[kept]).T
        self.ranks = int(kept.sum())

    def inputs(self, z: Tensor, gradient: Tensor) -> tuple[Tensor, float] | str:
        """(1, *shape) and the share not explained, by refined normal equations."""
        wanted_gradient = torch.tensordot(self.to_compressed, gradient, 1)
        if not z.any() or not wanted_gradient.any():
            return f"no gradient reaches {self.link.name!r}"
        self.first, self.second = float(1 / z.norm()), float(1 / wanted_gradient.norm())
        factor, info = torch.linalg.cholesky_ex(self.gram())
        if int(info):
            return f"{self.link.name!r} has fewer independent equations than unknowns"
        x = torch.zeros((1, *self.link.shape), dtype=torch.float64)
        for _ in range(_REFINEMENTS):
            left = (
                self.first * (z - self.outputs(x)),
                self.second * (wanted_gradient - self.gradients(x)),
            )
            step = torch.cholesky_solve(self.transposed(*left).reshape(-1, 1), factor).view_as(x)
            x = x + step
            if not step.norm() > _CONVERGED * x.norm():
                break
        gap = math.sqrt(sum(float((part**2).sum()) for part in left) / 2)
        return x, gap

    def outputs(self, x: Tensor) -> Tensor:
        return conv2d(x, self.weight, None, *_geometry(self.link))

    def gradients(self, x: Tensor) -> Tensor:
        shape = (self.ranks, *self.weight.shape[1:])
        found: Tensor = conv2d_weight(  # type: ignore[no-untyped-call]
            x, shape, self.compressed, *_geometry(self.link)
        )
        return found

    def transposed(self, by_outputs: Tensor, by_gradients: Tensor) -> Tensor:
        """Aᵀ of both sets, with their scales."""
        shape = (len(by_outputs), *self.link.shape)
        first: Tensor = conv2d_input(  # type: ignore[no-untyped-call]
            shape, self.weight, by_outputs, *_geometry(self.link)
        )
        second: Tensor = conv2d_input(  # type: ignore[no-untyped-call]
            shape,
            by_gradients,
            self.compressed.expand(len(by_outputs), -1, -1, -1),
            *_geometry(self.link),
        )
        return self.first * first + self.second * second

    def gram(self) -> Tensor:
        """AᵀA (n, n). The gradient equations treat every channel alike: one block, repeated."""
        channels, height, width = self.link.shape
        n = unknowns(self.link)
        unit = torch.eye(n, dtype=torch.float64).view(n, *self.link.shape)
        total: Tensor = conv2d_input(  # type: ignore[no-untyped-call]
            unit.shape, self.weight, self.outputs(unit), *_geometry(self.link)
        )
        total = self.first**2 * total.view(n, n)
        pixels = torch.eye(height * width, dtype=torch.float64).view(-1, 1, height, width)
        stride, padding, dilation, _ = _geometry(self.link)
        patches = unfold(pixels, self.weight.shape[2:], dilation, padding, stride)
        rows = torch.einsum("pkl,fl->pfk", patches, self.compressed[0].flatten(1)).flatten(1)
        block = self.second**2 * rows @ rows.T
        for channel in range(channels):
            part = slice(channel * height * width, (channel + 1) * height * width)
            total[part, part] += block
        return total
