"""Distances between the update a claim predicts and the one received.

Each maps two sets of tensors with equal keys to a 0-dim tensor, 0 at equality, and never
flattens or copies the received update.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from gradleak.errors import InvalidInput

Tensors = Mapping[str, Tensor]
Distance = Callable[[Tensors, Tensors], Tensor]


def squared_l2(predicted: Tensors, received: Tensors) -> Tensor:
    """Σ_l ‖p_l − r_l‖² (Zhu et al., NeurIPS 2019, Eq. 4)."""
    return _total([((p - received[k]) ** 2).sum() for k, p in predicted.items()])


def l1(predicted: Tensors, received: Tensors) -> Tensor:
    """Σ_l ‖p_l − r_l‖₁, the Laplace likelihood up to scale."""
    return _total([(p - received[k]).abs().sum() for k, p in predicted.items()])


def cosine(predicted: Tensors, received: Tensors) -> Tensor:
    """1 − ⟨p, r⟩ / (‖p‖ ‖r‖) over all tensors together (Geiping et al., NeurIPS 2020, Eq. 4)."""
    inner = _total([(p * received[k]).sum() for k, p in predicted.items()])
    own = _total([(p**2).sum() for p in predicted.values()])
    theirs = _total([(received[k] ** 2).sum() for k in predicted])
    return 1 - inner / (own * theirs).clamp(min=torch.finfo(inner.dtype).tiny).sqrt()


def direction_gap(predicted: Tensors, received: Tensors) -> Tensor:
    """½ ‖p/‖p‖ − r/‖r‖‖² = 1 − cos(p, r), without the cancellation that stops at rounding."""
    own = _total([(p**2).sum() for p in predicted.values()])
    theirs = _total([(received[k] ** 2).sum() for k in predicted])
    tiny = torch.finfo(own.dtype).tiny
    own, theirs = own.clamp(min=tiny).sqrt(), theirs.clamp(min=tiny).sqrt()
    return _total(
        [0.5 * ((p / own - received[k] / theirs) ** 2).sum() for k, p in predicted.items()]
    )


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


def _total(terms: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(terms)).sum()
