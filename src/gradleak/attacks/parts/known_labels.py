"""Labels an attack starts from: those granted, or the best that the update shows."""

from __future__ import annotations

from torch import Tensor

from gradleak.attacks.closed_form.disaggregate import disaggregate
from gradleak.attacks.parts.labels import idlg, sign_counts
from gradleak.types import Observation


def known_or_recovered(seen: Observation) -> Tensor:
    """The labels granted, else the best rule for what is seen: (b,) int64.

    `idlg` for one example; for more those of a head that separates, which are exact, else
    `sign_counts`.
    """
    if seen.knowledge.labels is not None:
        return seen.knowledge.labels
    if seen.knowledge.batch_size == 1:
        return idlg(seen)
    separated = disaggregate(seen)
    return sign_counts(seen) if isinstance(separated, str) else separated.labels
