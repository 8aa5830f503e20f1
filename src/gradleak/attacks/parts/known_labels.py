"""Labels an attack starts from: those granted, or the best that the update shows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gradleak.attacks.closed_form.disaggregate import disaggregate
from gradleak.attacks.labels.soft_labels import SoftLabels
from gradleak.attacks.labels.zlg import ZLG, BiasZLG, local_steps
from gradleak.attacks.parts.labels import idlg, sign_counts
from gradleak.defenses import undefended
from gradleak.defenses.encoded import mixes_labels
from gradleak.errors import NotApplicable
from gradleak.mechanisms import Diffusing
from gradleak.types import Observation


def labels_to_match(seen: Sequence[Observation]) -> Tensor | None:
    """The labels of every target, (targets, b) int64, as `known_or_recovered`.

    Where clients are believed to mix labels, no class describes an example: soft labels
    (targets, 1, classes) of one in closed form, None where they have to be searched for.
    """
    if not any(mixes_labels(o.mechanism) for o in seen):
        return torch.stack([known_or_recovered(o) for o in seen])
    try:
        return torch.stack([_mixed(o) for o in seen])
    except NotApplicable:
        return None


def _mixed(seen: Observation) -> Tensor:
    rows = SoftLabels()(seen, generator=torch.Generator().manual_seed(0)).clamp(min=0)
    return (rows / rows.sum(1, keepdim=True)).to(next(iter(seen.update.values.values())))


def known_or_recovered(seen: Observation) -> Tensor:
    """The labels granted, else the best rule for what is seen: (b,) int64.

    Zeros for a diffusion model, whose loss has none. `idlg` for one example; for more those of a
    head that separates, which are exact; else counts, over the steps of local training, or
    `sign_counts`.
    """
    if seen.knowledge.labels is not None:
        return seen.knowledge.labels
    if isinstance(undefended(seen.mechanism), Diffusing):
        return torch.zeros(seen.knowledge.batch_size or 1, dtype=torch.int64)
    if seen.knowledge.batch_size == 1:
        return idlg(seen)
    separated = disaggregate(seen)
    if not isinstance(separated, str):
        return separated.labels
    return sign_counts(seen) if local_steps(seen) == 1 else _counted_over_steps(seen)


def _counted_over_steps(seen: Observation) -> Tensor:
    for rule in (BiasZLG(), ZLG()):
        try:
            counts = rule(seen, generator=torch.Generator().manual_seed(0))
        except NotApplicable:
            continue
        return torch.arange(len(counts)).repeat_interleave(counts)
    return sign_counts(seen)
