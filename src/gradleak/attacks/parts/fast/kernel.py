"""A fixed convolution: forward and transposed, and as a step of the data path.

PyTorch's double backward of a convolution computes the gradient of the weight even where the weight
needs none. Here a convolution and its transpose are each other's backward, and nothing else.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gradleak.attacks.parts.fast.patches import Pair, Windows

_PATCH_ENTRIES = 200_000
"""Numbers in the patches of one image up to which they are quicker than oneDNN's convolutions."""


class Kernel:
    """z = W ∗ x (+ b) with fixed W.

    Args:
        weight: (out, in / groups, kh, kw).
        bias: (out,) or None.
        stride, padding, dilation: per side.
        groups: of channels.
        packs: keep the weight in oneDNN's own layout; outputs are then channels-last, and inputs
            had better be.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        stride: Pair,
        padding: Pair,
        dilation: Pair,
        *,
        groups: int = 1,
        packs: bool = False,
    ) -> None:
        self.weight, self.bias = weight, bias
        self.stride, self.padding, self.dilation, self.groups = stride, padding, dilation, groups
        self.packs = packs and groups == 1
        self._packs: dict[str, _Packed] = {}
        self._windows: dict[torch.Size, Windows] = {}

    def windows(self, shape: torch.Size) -> Windows:
        """Where the kernel lies on images of `shape`."""
        size = shape[2:]
        if size not in self._windows:
            (height, width), (kh, kw) = size, self.weight.shape[2:]
            self._windows[size] = Windows(
                (height, width), (kh, kw), self.stride, self.padding, self.dilation
            )
        return self._windows[size]

    def patched(self, shape: torch.Size) -> bool:
        """Whether products with the patches of images of `shape` are cheap."""
        if self.groups != 1:
            return False
        down, across = self.windows(shape).counts
        _, inner, kh, kw = self.weight.shape
        return down * across * inner * kh * kw <= _PATCH_ENTRIES

    def forward(self, x: Tensor, *, bias: bool) -> Tensor:
        """W ∗ x, plus b where asked."""
        c = self.bias if bias else None
        if self.packs:
            if not self._has("forward", x.shape):
                self._packs["forward"] = _Packed(
                    self.weight, x.shape, self.stride, self.padding, self.dilation
                )
            return self._packs["forward"](x, c)
        return F.conv2d(x, self.weight, c, self.stride, self.padding, self.dilation, self.groups)

    def transposed(self, d: Tensor, shape: torch.Size) -> Tensor:
        """Wᵀ ∗ d: the gradient of ⟨W ∗ x, d⟩ at x of `shape`."""
        if self.packs and self.stride == (1, 1):
            reach = [
                w * (k - 1) - p
                for w, k, p in zip(self.dilation, self.weight.shape[2:], self.padding, strict=True)
            ]
            if min(reach) >= 0:
                if not self._has("transposed", d.shape):
                    mirrored = self.weight.flip(2, 3).transpose(0, 1)
                    self._packs["transposed"] = _Packed(
                        mirrored, d.shape, (1, 1), (reach[0], reach[1]), self.dilation
                    )
                return self._packs["transposed"](d, None)
        if self.stride != (1, 1) and self.patched(shape):
            rows = d.permute(0, 2, 3, 1).flatten(1, 2) @ self._matrix
            return self.windows(shape).images(rows)
        return input_gradient(
            d, shape, self.weight, self.stride, self.padding, self.dilation, groups=self.groups
        )

    @functools.cached_property
    def _matrix(self) -> Tensor:
        """(out, kh · kw · in), as patches are laid out."""
        return self.weight.permute(0, 2, 3, 1).flatten(1)

    def _has(self, direction: str, shape: torch.Size) -> bool:
        known = self._packs.get(direction)
        return known is not None and known.shape == shape

    def __call__(self, x: Tensor) -> Tensor:
        """W ∗ x + b, twice differentiable in x."""
        z: Tensor = _Forward.apply(x, self)  # type: ignore[no-untyped-call]
        return z


class _Packed:
    """A weight in oneDNN's own layout for one shape of input, so that calls need not reorder it."""

    def __init__(
        self, weight: Tensor, shape: torch.Size, stride: Pair, padding: Pair, dilation: Pair
    ) -> None:
        self.shape, self.stride, self.padding, self.dilation = shape, stride, padding, dilation
        self.weight = torch.ops.mkldnn._reorder_convolution_weight(
            weight.contiguous(), padding, stride, dilation, 1, list(shape)
        )

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        z: Tensor = torch.ops.mkldnn._convolution_pointwise(
            x.contiguous(memory_format=torch.channels_last), self.weight, bias,
            self.padding, self.stride, self.dilation, 1, "none", [], "",
        )  # fmt: skip
        return z


def can_pack(tensor: Tensor) -> bool:
    """Whether weights of this precision and device can be packed."""
    on_cpu = tensor.dtype == torch.float32 and tensor.device.type == "cpu"
    return on_cpu and packing_works()


@functools.cache
def packing_works() -> bool:
    """Whether this build of PyTorch has the private packing operators, and they convolve."""
    stream = torch.Generator().manual_seed(0)
    x, w = torch.randn(2, 3, 6, 6, generator=stream), torch.randn(4, 3, 3, 3, generator=stream)
    try:
        found = _Packed(w, x.shape, (2, 2), (1, 1), (1, 1))(x, None)
    except (AttributeError, RuntimeError, TypeError):
        return False
    return torch.allclose(found, F.conv2d(x, w, None, 2, 1), atol=1e-4)


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
    like: Tensor,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    *,
    groups: int,
) -> Tensor:
    """Gradient of ⟨weight ∗ x, d⟩ at a weight shaped and laid out as `like`."""
    found: Tensor = torch.ops.aten.convolution_backward(
        d, x, like, None, stride, padding, dilation, False, (0, 0), groups,
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
