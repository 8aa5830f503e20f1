"""Distances between the update a claim predicts and the one received, and their derivatives.

Each maps two sets of tensors with equal keys to a 0-dim tensor, 0 at equality, and never
flattens or copies the received update. `slope` gives value and derivative at once: by a closed form
for the distances below, by automatic differentiation for any other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from gradleak.errors import InvalidInput

Tensors = Mapping[str, Tensor]
Distance = Callable[[Tensors, Tensors], Tensor]
Slope = Callable[[list[Tensor]], tuple[Tensor, Sequence[Tensor]]]
"""Predicted tensors, in the order of the received ones -> D and ∂D/∂p of every tensor."""
_Weighting = Callable[[Sequence[Tensor]], Tensor]

_SHORTEST = 1e-6
_FAINT = 1e-6


def squared_l2(predicted: Tensors, received: Tensors) -> Tensor:
    """Σ_l ‖p_l − r_l‖² (Zhu et al., NeurIPS 2019, Eq. 4)."""
    return _total([((p - received[k]) ** 2).sum() for k, p in predicted.items()])


def l1(predicted: Tensors, received: Tensors) -> Tensor:
    """Σ_l ‖p_l − r_l‖₁, the Laplace likelihood up to scale."""
    return _total([(p - received[k]).abs().sum() for k, p in predicted.items()])


def layer_norms(predicted: Tensors, received: Tensors) -> Tensor:
    """Σ_l ‖p_l − r_l‖₂ / Σ_l ‖r_l‖₂ (Yin et al., CVPR 2021, up to the divisor)."""
    whole = _lengths([received[k] for k in predicted]).sum()
    gaps = [p - received[k] for k, p in predicted.items()]
    return _lengths(gaps).sum() / whole


def relative_squares(predicted: Tensors, received: Tensors, *, balance: float = 0.0) -> Tensor:
    """Σ_l w_l ‖p_l − r_l‖², w_l ∝ ‖r_l‖^(−2 · balance), 1 where all p_l are zero.

    0 weighs tensors alike, 1 each by its own length, which counts as a thousandth of all at least.
    """
    weights = relative_weights({k: received[k] for k in predicted}, balance=balance)
    gaps = {k: ((p - received[k]) ** 2).sum() for k, p in predicted.items()}
    return _total([weights[k] * gap for k, gap in gaps.items()])


def relative_weights(received: Tensors, *, balance: float = 0.0) -> dict[str, Tensor]:
    """w_l of `relative_squares`, 0-dim each."""
    sizes = torch.stack([(r**2).sum() for r in received.values()])
    least = torch.finfo(sizes.dtype).tiny
    weights = sizes.clamp(min=_FAINT * sizes.sum().clamp(min=least)) ** -balance
    weights = weights / (weights * sizes).sum().clamp(min=least)
    return dict(zip(received, weights.unbind(), strict=True))


def cosine(predicted: Tensors, received: Tensors) -> Tensor:
    """1 − ⟨p, r⟩ / (‖p‖ ‖r‖) over all tensors together (Geiping et al., NeurIPS 2020, Eq. 4)."""
    inner = _total([(p * received[k]).sum() for k, p in predicted.items()])
    own = _total([(p**2).sum() for p in predicted.values()])
    theirs = _total([(received[k] ** 2).sum() for k in predicted])
    return 1 - inner / (own * theirs).clamp(min=torch.finfo(inner.dtype).tiny).sqrt()


def direction_gap(predicted: Tensors, received: Tensors) -> Tensor:
    """½ ‖p/‖p‖ − r/‖r‖‖² = 1 − cos(p, r), without the cancellation that stops at rounding."""
    return _gap(predicted, received, _even)


def balanced_gap(predicted: Tensors, received: Tensors) -> Tensor:
    """½ Σ_l w_l ‖p_l/‖p‖ − r_l/‖r‖‖², w_l = ‖r‖² / (‖r_l‖ Σ_k ‖r_k‖).

    `direction_gap` in which a layer of short gradients counts for more. An update rounded in every
    entry by a share ε leaves ½ ε² in both.
    """
    return _gap(predicted, received, _balanced)


def _gap(predicted: Tensors, received: Tensors, weighting: _Weighting) -> Tensor:
    kept = [received[k] for k in predicted]
    own, theirs = (_floored_root(_squares(list(side))) for side in (predicted.values(), kept))
    pairs = zip(weighting(kept), predicted.values(), kept, strict=True)
    return _total([0.5 * w * ((p / own - r / theirs) ** 2).sum() for w, p, r in pairs])


def _even(received: Sequence[Tensor]) -> Tensor:
    return torch.ones(len(received), dtype=received[0].dtype, device=received[0].device)


def _balanced(received: Sequence[Tensor]) -> Tensor:
    """w_l; a tensor of zeros counts as one of a millionth of the whole."""
    lengths = torch.stack([(r**2).sum() for r in received])
    shares = (lengths.sqrt() / _floored_root(lengths.sum())).clamp(min=_SHORTEST)
    return 1 / (shares * shares.sum())


def layer_weighted(distance: Distance, weights: Sequence[float]) -> Distance:
    """Sum `distance` over tensors one by one, the l-th times `weights[l]`."""

    def weighted(predicted: Tensors, received: Tensors) -> Tensor:
        if len(weights) != len(predicted):
            raise InvalidInput(f"{len(weights)} layer weights: expected {len(predicted)}")
        return _total(
            [
                w * distance({k: p}, {k: received[k]})
                for w, (k, p) in zip(weights, predicted.items(), strict=True)
            ]
        )

    return weighted


def slope(distance: Distance, received: Tensors) -> Slope:
    """Value and derivative of `distance` to one received update, prepared for many calls."""
    closed = _SLOPES.get(distance)
    return _by_autograd(distance, received) if closed is None else closed(list(received.values()))


def _squared_l2_slope(received: list[Tensor]) -> Slope:
    def at(predicted: list[Tensor]) -> tuple[Tensor, Sequence[Tensor]]:
        gaps = list(torch._foreach_sub(predicted, received))
        value = _squares(gaps)
        torch._foreach_mul_(gaps, 2.0)
        return value, gaps

    return at


def _l1_slope(received: list[Tensor]) -> Slope:
    def at(predicted: list[Tensor]) -> tuple[Tensor, Sequence[Tensor]]:
        gaps = list(torch._foreach_sub(predicted, received))
        return _total([g.abs().sum() for g in gaps]), torch._foreach_sign(gaps)

    return at


def _layer_norms_slope(received: list[Tensor]) -> Slope:
    whole = float(_lengths(received).sum())

    def at(predicted: list[Tensor]) -> tuple[Tensor, Sequence[Tensor]]:
        gaps = list(torch._foreach_sub(predicted, received))
        lengths = _lengths(gaps)
        return lengths.sum() / whole, [g / n for g, n in zip(gaps, lengths * whole, strict=True)]

    return at


def _cosine_slope(received: list[Tensor]) -> Slope:
    theirs = _squares(received)

    def at(predicted: list[Tensor]) -> tuple[Tensor, Sequence[Tensor]]:
        inner, own = _inner(predicted, received), _squares(predicted)
        length, a, b = cosine_slope(inner, own, theirs)
        slopes = list(torch._foreach_mul(predicted, a))
        torch._foreach_addcmul_(slopes, received, [b] * len(received))
        return 1 - inner / length, slopes

    return at


def cosine_slope(inner: Tensor, own: Tensor, theirs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """‖p‖ ‖r‖, floored, and (a, b) of ∂(1 − cos)/∂p = a p + b r.

    Args:
        inner: ⟨p, r⟩.
        own, theirs: ‖p‖² and ‖r‖².
    """
    product = own * theirs
    floored = product.clamp(min=torch.finfo(product.dtype).tiny)
    length = floored.sqrt()
    a = torch.where(product == floored, inner / (length * own), torch.zeros_like(inner))
    return length, a, -1 / length


def _gap_slope(weighting: _Weighting, received: list[Tensor]) -> Slope:
    theirs, weights = _floored_root(_squares(received)), weighting(received).tolist()

    def at(predicted: list[Tensor]) -> tuple[Tensor, Sequence[Tensor]]:
        square = _squares(predicted)
        own = _floored_root(square)
        gaps = list(torch._foreach_div(predicted, own))
        torch._foreach_addcmul_(gaps, received, [-1 / theirs] * len(received))
        slopes = list(torch._foreach_mul(gaps, weights))
        value = 0.5 * _inner(gaps, slopes)
        # With u the weighted gap and p̂ = p/‖p‖: ∂D/∂p = (u − ⟨u, p̂⟩ p̂) / ‖p‖.
        along = torch.where(square > own**2 / 2, _inner(slopes, predicted), torch.zeros_like(own))
        torch._foreach_addcmul_(slopes, predicted, [-along / own**2] * len(predicted))
        torch._foreach_div_(slopes, own)
        return value, slopes

    return at


def _by_autograd(distance: Distance, received: Tensors) -> Slope:
    def at(predicted: list[Tensor]) -> tuple[Tensor, Sequence[Tensor]]:
        leaves = [p.detach().requires_grad_() for p in predicted]
        with torch.enable_grad():
            value = distance(dict(zip(received, leaves, strict=True)), received)
            slopes = torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True)
        return value.detach(), slopes

    return at


_SLOPES: Mapping[Distance, Callable[[list[Tensor]], Slope]] = {
    squared_l2: _squared_l2_slope,
    l1: _l1_slope,
    layer_norms: _layer_norms_slope,
    cosine: _cosine_slope,
    direction_gap: partial(_gap_slope, _even),
    balanced_gap: partial(_gap_slope, _balanced),
}


def _total(terms: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(terms)).sum()


def _lengths(values: Sequence[Tensor]) -> Tensor:
    """(len(values),) L2 norms, floored."""
    return _floored_root(torch.stack([(v**2).sum() for v in values]))


def _squares(values: Sequence[Tensor]) -> Tensor:
    return _inner(values, values)


def _inner(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """Σ_l ⟨a_l, b_l⟩; `torch.dot` and `vector_norm` lose digits of long float32 vectors."""
    return _total([(x * y).sum() for x, y in zip(a, b, strict=True)])


def _floored_root(square: Tensor) -> Tensor:
    return square.clamp(min=torch.finfo(square.dtype).tiny).sqrt()
