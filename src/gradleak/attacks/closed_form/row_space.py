"""Where the inputs of a linear head lie: the row space of its gradient.

∂L/∂W = (1/b) Σ_i e_i h_iᵀ. For b linearly independent errors e_i the rows span the inputs h_i,
whatever the activation, the loss and the labels. Rounding moves that space far less than single
inputs: where two errors are nearly equal it hides which mixture of rows each input is, and
`factor`, which says so, is then wrong for both.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gradleak.attacks.parts.client import plain_client
from gradleak.types import Observation

_CLEAR = 1e-2
_RANK = 1e-7


def row_space(seen: Observation, weight: str) -> Tensor | None:
    """(b, inputs) orthonormal rows in float64; None if the gradient does not have rank b.

    Args:
        seen: a gradient of one batch; noise fills the rank, so that none is returned.
        weight: name of the head's weight, (outputs, inputs).
    """
    size = seen.knowledge.batch_size
    if size is None or weight not in seen.update.values or plain_client(seen.mechanism) is None:
        return None
    gradient = seen.update.values[weight].detach().double().cpu()
    if size >= min(gradient.shape) or not gradient.isfinite().all():
        return None
    _, strengths, rows = torch.linalg.svd(gradient, full_matrices=False)
    if strengths[size - 1] <= _RANK * strengths[0]:
        return None
    return rows[:size] if strengths[size] <= _CLEAR * strengths[size - 1] else None
