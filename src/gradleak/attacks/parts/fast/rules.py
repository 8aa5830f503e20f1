"""Closed forms per layer: what its weight gradient contributes, and what that pulls back.

With x the input and D = ∂ℓ/∂z of a layer z = op(x, w), the weight gradient g_t is bilinear in the
rows of x and D that belong to trial t. Every rule gives

    ⟨g_t, G_t⟩ and ‖g_t‖²,
    the gradient of ⟨g_t, v_t⟩ in D, op(x, v_t), and in x, opᵀ(D, v_t), for v_t = a_t g_t + b_t G_t.

In the *formed* variant g_t exists for a moment; in the *Gram* variant only the products of rows of
x with each other and of rows of D with each other do, which is cheaper where positions are few.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from gradleak.attacks.parts.fast.kernel import Kernel, input_gradient, weight_gradient

_BLOCK = 4096
_GRAM_POSITIONS = 64
_GROUPED_CHANNELS = 64
_CHUNK_CHANNELS = 512


class Received:
    """The updates received by the trials at hand, tensor by tensor.

    Args:
        updates: one per target.
        targets: target of every trial.
    """

    def __init__(self, updates: Sequence[dict[str, Tensor]], targets: Sequence[int]) -> None:
        self.updates = [updates[t] for t in targets]
        self._same = len(set(targets)) == 1
        self._stacked: dict[tuple[str, bool], Tensor] = {}
        self.squares = self.squares_without(set())

    def __len__(self) -> int:
        return len(self.updates)

    def squares_without(self, names: set[str]) -> Tensor:
        """‖G_t‖² of every trial over all tensors but these."""
        known: dict[int, Tensor] = {}
        for u in self.updates:
            if id(u) not in known:
                parts = [(v**2).sum() for k, v in u.items() if k not in names]
                zero = next(iter(u.values())).new_zeros(())
                known[id(u)] = torch.stack(parts).sum() if parts else zero
        return torch.stack([known[id(u)] for u in self.updates])

    def stacked(self, name: str, *, channels_last: bool = False) -> Tensor:
        """(trials, *shape); a view where all trials share one target.

        Args:
            name: of the tensor.
            channels_last: lay the kernels of a convolution out channels-last.
        """
        key = name, channels_last
        if key not in self._stacked:
            distinct = self.updates[:1] if self._same else self.updates
            values = [u[name] for u in distinct]
            if channels_last:
                values = [v.contiguous(memory_format=torch.channels_last) for v in values]
            one = values[0][None] if self._same else torch.stack(values)
            self._stacked[key] = one.expand(len(self.updates), *one.shape[1:])
        return self._stacked[key]


class Rule(ABC):
    """One use of a layer with parameters, in one forward pass.

    Attributes:
        x: its input, (trials · b, ...), part of the graph.
        z: its output.
        names: its trained tensors, weight first.
    """

    names: Sequence[str]
    x: Tensor
    z: Tensor

    @abstractmethod
    def moments(self, d: Tensor) -> tuple[Tensor, Tensor]:
        """⟨g, G⟩ and ‖g‖² of every trial, given D; must run before the other two."""

    @abstractmethod
    def gap(self) -> Tensor:
        """‖g − G‖² of every trial without cancellation; must run before `pull`."""

    @abstractmethod
    def pull(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of Σ_t ⟨g_t, v_t⟩ at fixed v_t = a_t g_t + b_t G_t, in D and in x."""


class LinearRule(Rule):
    """z = x Wᵀ + c on the last axis; all rows of a trial, images and positions alike, add up."""

    def __init__(
        self, x: Tensor, w: Tensor, c: Tensor | None, names: Sequence[str], received: Received
    ) -> None:
        self.x, self.names, self.received = x, names, received
        self.z = F.linear(x, w, c)

    def moments(self, d: Tensor) -> tuple[Tensor, Tensor]:
        trials = len(self.received)
        self.rows = self.x.detach().reshape(trials, -1, self.x.shape[-1])
        self.d = d.reshape(trials, -1, d.shape[-1])
        self.G = self.received.stacked(self.names[0])
        rows, inner, outer = self.d.shape[1], self.rows.shape[2], self.d.shape[2]
        self.formed = 2 * rows * (inner + outer) > inner * outer
        if self.formed:
            self.g = torch.bmm(self.d.transpose(1, 2), self.rows)
            dot, square = inner_products(self.g, self.G), inner_products(self.g, self.g)
        else:
            self.U = torch.bmm(self.rows, self.G.transpose(1, 2))
            self.Y = _times(_gram(self.rows), self.d)
            dot, square = inner_products(self.U, self.d), inner_products(self.Y, self.d)
        if len(self.names) > 1:
            self.sum = self.d.sum(1)
            dot = dot + (self.sum * self.received.stacked(self.names[1])).sum(1)
            square = square + (self.sum**2).sum(1)
        return dot, square

    def gap(self) -> Tensor:
        g = self.g if self.formed else torch.bmm(self.d.transpose(1, 2), self.rows)
        total = ((g - self.G) ** 2).flatten(1).sum(1)
        if len(self.names) > 1:
            total = total + ((self.sum - self.received.stacked(self.names[1])) ** 2).sum(1)
        return total

    def pull(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        a, b = a[:, None, None], b[:, None, None]
        if self.formed:
            v = torch.addcmul(self.g.mul_(a), self.G, b)
            in_d = torch.bmm(self.rows, v.transpose(1, 2))
            in_x = torch.bmm(self.d, v)
        else:
            in_d = torch.addcmul(self.Y.mul_(a), self.U, b)
            in_x = torch.bmm(b * self.d, self.G)
            in_x.addcmul_(_times(_gram(self.d), self.rows), a)
        if len(self.names) > 1:
            c = self.received.stacked(self.names[1])
            in_d += a * self.sum[:, None] + b * c[:, None]
        return in_d.view_as(self.z), in_x.view_as(self.x)


class ScaleRule(Rule):
    """z = x̂ ⊙ γ + β with x̂ = (x − mean) · inverse, γ and β constant along all axes but `kept`.

    Evaluation-mode batch normalisation, and the last step of layer and group normalisation.
    """

    def __init__(
        self,
        x: Tensor,
        scale: Tensor,
        shift: Tensor | None,
        names: Sequence[str],
        received: Received,
        *,
        kept: Sequence[int],
        mean: Tensor | None = None,
        inverse: Tensor | None = None,
    ) -> None:
        self.x, self.names, self.received = x, names, received
        self.kept = tuple(kept)
        self.shape = [n if i in self.kept else 1 for i, n in enumerate(x.shape)]
        self.mean, self.inverse = mean, inverse
        if mean is not None and inverse is not None:
            scale = scale * inverse
            shift = -mean * scale if shift is None else shift - mean * scale
        factor = scale.reshape(self.shape)
        self.z = x * factor if shift is None else torch.addcmul(shift.view(self.shape), x, factor)

    def _sum(self, values: Tensor) -> Tensor:
        """Sum over the trial's images and the axes not kept: (trials, *kept)."""
        trials = len(self.received)
        values = values.reshape(trials, -1, *values.shape[1:])
        axes = [1] + [i + 1 for i in range(1, values.ndim - 1) if i not in self.kept]
        return values.sum(axes)

    def _spread(self, values: Tensor) -> Tensor:
        """(trials, *kept) to something that broadcasts against x."""
        images = self.x.shape[0] // len(self.received)
        rows = values.repeat_interleave(images, 0) if images > 1 else values
        return rows.reshape(-1, *self.shape[1:])

    def moments(self, d: Tensor) -> tuple[Tensor, Tensor]:
        self.d = d
        total = self._sum(d)
        scale = self._sum(d * self.x.detach())
        if self.mean is not None and self.inverse is not None:
            scale = (scale - self.mean * total) * self.inverse
        self.gs = [scale, total][: len(self.names)]
        self.Gs = [self.received.stacked(n) for n in self.names]
        self.gs = [g.reshape(G.shape) for g, G in zip(self.gs, self.Gs, strict=True)]
        dot = sum_of([(g * G).flatten(1).sum(1) for g, G in zip(self.gs, self.Gs, strict=True)])
        return dot, sum_of([(g * g).flatten(1).sum(1) for g in self.gs])

    def gap(self) -> Tensor:
        pairs = zip(self.gs, self.Gs, strict=True)
        return sum_of([((g - G) ** 2).flatten(1).sum(1) for g, G in pairs])

    def pull(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        vs = [g * along(a, g) + G * along(b, G) for g, G in zip(self.gs, self.Gs, strict=True)]
        factor = vs[0] if self.inverse is None else vs[0] * self.inverse
        offset = vs[1] if len(vs) > 1 else None
        if self.mean is not None:
            moved = factor * self.mean
            offset = -moved if offset is None else offset - moved
        wide, x = self._spread(factor), self.x.detach()
        in_d = x * wide if offset is None else torch.addcmul(self._spread(offset), x, wide)
        return in_d, self.d * wide


class ConvRule(Rule):
    """z = W ∗ x + c, one group."""

    def __init__(self, x: Tensor, kernel: Kernel, names: Sequence[str], received: Received) -> None:
        self.x, self.kernel, self.names, self.received = x, kernel, names, received
        self.z = kernel(x)

    def _per_trial(self, values: Tensor) -> Tensor:
        return values.reshape(len(self.received), -1, *values.shape[1:])

    def _bias_moments(self, d: Tensor) -> tuple[Tensor, Tensor] | None:
        if len(self.names) < 2:
            return None
        self.sum = self._per_trial(d).sum((1, 3, 4))
        return (self.sum * self.received.stacked(self.names[1])).sum(1), (self.sum**2).sum(1)

    def _bias_gap(self) -> Tensor | float:
        if len(self.names) < 2:
            return 0.0
        return ((self.sum - self.received.stacked(self.names[1])) ** 2).sum(1)

    def _add_bias_pull_(self, in_d: Tensor, a: Tensor, b: Tensor) -> None:
        if len(self.names) > 1:
            v = self.sum * a[:, None] + self.received.stacked(self.names[1]) * b[:, None]
            self._per_trial(in_d).add_(v[:, None, :, None, None])


class FormedConvRule(ConvRule):
    """Weight gradients are formed, as grouped convolutions or trial by trial."""

    def moments(self, d: Tensor) -> tuple[Tensor, Tensor]:
        self.d = d
        last = self.x.ndim == 4 and not self.x.is_contiguous() and _is_channels_last(self.x)
        self.layout = torch.channels_last if last else torch.contiguous_format
        self.G = self.received.stacked(self.names[0], channels_last=last)
        widest = max(self.kernel.weight.shape[:2])
        alone = last or widest > _GROUPED_CHANNELS
        self.chunk = 1 if alone else max(1, _CHUNK_CHANNELS // widest)
        self.g = [self._weight_gradients(rows) for rows in self._chunks()]
        dots = [inner_products(g, self.G[r]) for g, r in zip(self.g, self._chunks(), strict=True)]
        dot, square = torch.cat(dots), torch.cat([inner_products(g, g) for g in self.g])
        bias = self._bias_moments(d)
        return (dot, square) if bias is None else (dot + bias[0], square + bias[1])

    def gap(self) -> Tensor:
        pairs = zip(self.g, self._chunks(), strict=True)
        total = [((g - self.G[rows]) ** 2).flatten(1).sum(1) for g, rows in pairs]
        return torch.cat(total) + self._bias_gap()

    def pull(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        x = self.x.detach()
        in_d, in_x = [], []
        for g, rows in zip(self.g, self._chunks(), strict=True):
            v = torch.addcmul(g.mul_(along(a[rows], g)), self.G[rows], along(b[rows], g))
            in_d.append(self._convolve(self._images(x, rows), v))
            in_x.append(self._transpose(self._images(self.d, rows), v, x.shape))
        joined = _joined(in_d)
        self._add_bias_pull_(joined, a, b)
        return joined, _joined(in_x)

    def _chunks(self) -> list[slice]:
        return [slice(i, i + self.chunk) for i in range(0, len(self.received), self.chunk)]

    def _images(self, values: Tensor, rows: slice) -> Tensor:
        """The images of a chunk of trials, trials side by side as channels: (b, n·C, h, w)."""
        mine = self._per_trial(values)[rows]
        if mine.shape[0] == 1:
            return mine[0]
        return mine.transpose(0, 1).reshape(mine.shape[1], -1, *mine.shape[3:])

    def _apart(self, values: Tensor, count: int) -> Tensor:
        """(b, n·C, h, w) back to (n·b, C, h, w)."""
        if count == 1:
            return values
        split = values.reshape(values.shape[0], count, -1, *values.shape[2:])
        return split.transpose(0, 1).reshape(-1, *split.shape[2:])

    def _weight_gradients(self, rows: slice) -> Tensor:
        d, x = self._images(self.d, rows), self._images(self.x.detach(), rows)
        out, *rest = self.kernel.weight.shape
        count = len(range(*rows.indices(len(self.received))))
        k = self.kernel
        like = d.new_empty((count * out, *rest)).contiguous(memory_format=self.layout)
        g = weight_gradient(d, x, like, k.stride, k.padding, k.dilation, groups=count)
        return g.contiguous(memory_format=self.layout).view(count, out, *rest)

    def _convolve(self, x: Tensor, v: Tensor) -> Tensor:
        k = self.kernel
        z = F.conv2d(x, v.flatten(0, 1), None, k.stride, k.padding, k.dilation, len(v))
        return self._apart(z, len(v))

    def _transpose(self, d: Tensor, v: Tensor, shape: torch.Size) -> Tensor:
        k, wide = self.kernel, torch.Size((d.shape[0], len(v) * shape[1], *shape[2:]))
        x = input_gradient(d, wide, v.flatten(0, 1), k.stride, k.padding, k.dilation, groups=len(v))
        return self._apart(x, len(v))


class GramConvRule(ConvRule):
    """Weight gradients are never formed: only the patches' products with each other.

    With A the patches of a trial, one column per position: g = D Aᵀ, so that conv(x, g) = D AᵀA,
    conv(x, G) = G A, and the transposes sum the columns of A DᵀD and GᵀD into the image.
    """

    def moments(self, d: Tensor) -> tuple[Tensor, Tensor]:
        self.d, x, k = d, self.x.detach(), self.kernel
        self.G = self.received.stacked(self.names[0]).flatten(2)
        patches = F.unfold(x, k.weight.shape[2:], k.dilation, k.padding, k.stride)
        self.patches = self._columns(patches)
        self.columns = self._columns(d.flatten(2))
        self.U = torch.bmm(self.G, self.patches)
        self.Y = torch.bmm(self.columns, torch.bmm(self.patches.transpose(1, 2), self.patches))
        dot, square = inner_products(self.U, self.columns), inner_products(self.Y, self.columns)
        bias = self._bias_moments(d)
        return (dot, square) if bias is None else (dot + bias[0], square + bias[1])

    def gap(self) -> Tensor:
        pairs = zip(self.columns, self.patches, self.G, strict=True)
        terms = [((columns @ patches.T - G) ** 2).sum() for columns, patches, G in pairs]
        return torch.stack(terms) + self._bias_gap()

    def pull(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        k, columns = self.kernel, self.columns
        wide_a, wide_b = a[:, None, None], b[:, None, None]
        in_d = self._maps(torch.addcmul(self.Y.mul_(wide_a), self.U, wide_b), self.d)
        self._add_bias_pull_(in_d, a, b)
        pulled = torch.bmm(self.patches, _gram(columns.transpose(1, 2)) * wide_a)
        pulled += torch.bmm((columns * wide_b).transpose(1, 2), self.G).transpose(1, 2)
        window = k.weight.shape[2:]
        in_x = F.fold(
            self._images(pulled), self.x.shape[2:], window, k.dilation, k.padding, k.stride
        )
        return in_d, in_x

    def _columns(self, values: Tensor) -> Tensor:
        """(trials·b, K, P) to (trials, K, b·P)."""
        if values.shape[0] == len(self.received):
            return values
        return self._per_trial(values).transpose(1, 2).flatten(2)

    def _images(self, values: Tensor) -> Tensor:
        """(trials, K, b·P) to (trials·b, K, P)."""
        images = self.x.shape[0] // len(values)
        if images == 1:
            return values
        split = values.reshape(*values.shape[:2], images, -1)
        return split.transpose(1, 2).flatten(0, 1)

    def _maps(self, values: Tensor, like: Tensor) -> Tensor:
        return self._images(values).reshape(like.shape)


def conv_rule(x: Tensor, kernel: Kernel, names: Sequence[str], received: Received) -> ConvRule:
    """Gram form where a trial has few positions and many patch entries, else formed."""
    images = x.shape[0] // len(received)
    sides = zip(x.shape[2:], kernel.stride, strict=True)
    positions = images
    for side, stride in sides:
        positions *= -(-side // stride)
    out, inner, *window = kernel.weight.shape
    entries = inner * window[0] * window[1]
    small = positions <= _GRAM_POSITIONS and out >= 256 and entries >= 8 * positions
    return (GramConvRule if small else FormedConvRule)(x, kernel, names, received)


def inner_products(a: Tensor, b: Tensor) -> Tensor:
    """⟨a_t, b_t⟩ of every trial; summed in blocks, as one long float32 dot loses digits."""
    if a.ndim == 5 and not a.is_contiguous():
        a, b = a.movedim(2, 4), b.movedim(2, 4)
    a, b = a.flatten(1), b.flatten(1)
    trials, length = a.shape
    blocks, rest = divmod(length, _BLOCK)
    if a.dtype == torch.float64 or blocks == 0 or rest:
        return (a * b).sum(1)
    a, b = a.reshape(-1, 1, _BLOCK), b.reshape(-1, _BLOCK, 1)
    return torch.bmm(a, b).view(trials, blocks).sum(1)


def _is_channels_last(images: Tensor) -> bool:
    return images.is_contiguous(memory_format=torch.channels_last)


def along(values: Tensor, like: Tensor) -> Tensor:
    """(trials,) shaped to broadcast over `like`."""
    return values.view(-1, *[1] * (like.ndim - 1))


def sum_of(terms: Sequence[Tensor]) -> Tensor:
    """Sum of (trials,) tensors."""
    return torch.stack(list(terms)).sum(0)


def _gram(rows: Tensor) -> Tensor:
    """(trials, n, k) -> (trials, n, n); a plain sum of squares for one row."""
    if rows.shape[1] == 1:
        return (rows * rows).sum(2, keepdim=True)
    return torch.bmm(rows, rows.transpose(1, 2))


def _times(gram: Tensor, rows: Tensor) -> Tensor:
    return gram * rows if gram.shape[1] == 1 else torch.bmm(gram, rows)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))
