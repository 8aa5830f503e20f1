"""A fixed convolution: forward and transposed, and as a step of the data path.

PyTorch's double backward of a convolution computes the gradient of the weight even where the weight
needs none. Here a convolution and its transpose are each other's backward, and nothing else.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

Pair = tuple[int, int]


class Kernel:
    """z = W ∗ x (+ b) with fixed W.

    Args:
        weight: (out, in, kh, kw).
        bias: (out,) or None.
        stride, padding, dilation: per side.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None, stride: Pair, padding: Pair, dilation: Pair
    ) -> None:
        self.weight, self.bias = weight, bias
        self.stride, self.padding, self.dilation = stride, padding, dilation

    def forward(self, x: Tensor, *, bias: bool) -> Tensor:
        """W ∗ x, plus b where asked."""
        return F.conv2d(
            x, self.weight, self.bias if bias else None, self.stride, self.padding, self.dilation
        )

    def transposed(self, d: Tensor, shape: torch.Size) -> Tensor:
        """Wᵀ ∗ d: the gradient of ⟨W ∗ x, d⟩ at x of `shape`."""
        return input_gradient(
            d, shape, self.weight, self.stride, self.padding, self.dilation, groups=1
        )

    def __call__(self, x: Tensor) -> Tensor:
        """W ∗ x + b, twice differentiable in x."""
        z: Tensor = _Forward.apply(x, self)  # type: ignore[no-untyped-call]
        return z


def input_gradient(
    d: Tensor,
    shape: torch.Size,
    weight: Tensor,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    *,
    groups: int,
) -> Tensor:
    """Gradient of ⟨weight ∗ x, d⟩ at x of `shape`."""
    found: Tensor = torch.ops.aten.convolution_backward(
        d, d.new_empty(shape), weight, None, stride, padding, dilation, False, (0, 0), groups,
        (True, False, False),
    )[0]  # fmt: skip
    return found


def weight_gradient(
    d: Tensor,
    x: Tensor,
    shape: torch.Size,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    *,
    groups: int,
) -> Tensor:
    """Gradient of ⟨weight ∗ x, d⟩ at a weight of `shape`."""
    found: Tensor = torch.ops.aten.convolution_backward(
        d, x, d.new_empty(shape), None, stride, padding, dilation, False, (0, 0), groups,
        (False, True, False),
    )[1]  # fmt: skip
    return found


class _Forward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, kernel: Kernel) -> Tensor:
        ctx.kernel, ctx.shape = kernel, x.shape
        return kernel.forward(x, bias=True)

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor, None]:
        return _Transposed.apply(d, ctx.kernel, ctx.shape), None  # type: ignore[no-untyped-call]


class _Transposed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, d: Tensor, kernel: Kernel, shape: torch.Size) -> Tensor:
        ctx.kernel = kernel
        return kernel.transposed(d, shape)

    @staticmethod
    def backward(ctx: Any, c: Tensor) -> tuple[Tensor, None, None]:
        return ctx.kernel.forward(c, bias=False), None, None
