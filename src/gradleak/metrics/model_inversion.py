"""How well images stand for a class that a classifier was trained on (Diff-MI, section 5).

Logits and features come from an evaluation network that the attacker never sees: another
architecture, another seed, trained by the auditor. These functions know tensors only.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gradleak.errors import InvalidInput

_AT_ONCE = 256


def named(logits: Tensor, labels: Tensor, *, k: int = 1) -> Tensor:
    """Whether the evaluation network has each image's class among its k first: (n,) bool.

    Its mean is the attack accuracy at k. An image that all classes but k tie with is a hit only
    if its class's logit is larger than all but k − 1 others.

    Args:
        logits: (n, classes).
        labels: (n,) the class that the attacker meant.
        k: from 1 to the classes.
    """
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or not 1 <= k <= logits.shape[1]:
        raise InvalidInput(
            f"logits {tuple(logits.shape)}, labels {tuple(labels.shape)}, k={k}: expected "
            "(n, classes), (n,) and k from 1 to the classes"
        )
    own = logits.gather(1, labels[:, None])
    return (logits >= own).sum(1) <= k


def nearest_distances(claims: Tensor, meant: Tensor, private: Tensor, labels: Tensor) -> Tensor:
    """Squared distance of each claim's features to the nearest private image's of its class: (n,).

    Args:
        claims: features (n, d) of claims.
        meant: (n,) their classes.
        private: features (m, d) of private images.
        labels: (m,) their classes; every class that is meant among them.
    """
    if claims.ndim != 2 or private.ndim != 2 or claims.shape[1] != private.shape[1]:
        raise InvalidInput(
            f"features {tuple(claims.shape)} and {tuple(private.shape)}: expected (n, d), (m, d)"
        )
    found = torch.empty(len(claims), dtype=torch.float64)
    for c in sorted(set(meant.tolist())):
        own = private[labels == c].double()
        if not len(own):
            raise InvalidInput(f"no private image of class {c}: expected one to be near to")
        asked = torch.nonzero(meant == c)[:, 0]
        for rows in torch.split(asked, _AT_ONCE):
            found[rows] = torch.cdist(claims[rows].double(), own).square().amin(1)
    return found
