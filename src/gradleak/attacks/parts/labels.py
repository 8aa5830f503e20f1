"""Label recovery from the gradient of the classification head.

With mean cross-entropy, ∂L/∂b_c = (1/B) Σ_i (p_ic − [y_i = c]): a class that is present pulls its
entry below zero. Without a head bias the row sums of ∂L/∂W serve, given non-negative features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gradleak.defenses import undefended
from gradleak.errors import NotApplicable
from gradleak.mechanisms import Diffusing
from gradleak.types import Observation


def head_signal(seen: Observation) -> Tensor:
    """Per-class signal (classes,): head bias gradient, or row sums of the head's weight gradient.

    Raises:
        NotApplicable: the client trains no classifier, or the last parameters are not those of a
            classification head.
    """
    if isinstance(undefended(seen.mechanism), Diffusing):
        raise NotApplicable("label recovery: the loss of a diffusion model has no labels")
    size = seen.knowledge.batch_size or 1
    gradient = seen.mechanism.as_gradient(seen.update, batch_size=size).values
    names = list(seen.state.params)
    for name in reversed(names[-2:]):
        value = gradient[name].cpu()
        if value.shape[0] == seen.data.classes and value.ndim <= 2:
            bias_is_silent = value.ndim == 1 and not value.any()
            if not bias_is_silent:
                return value.double() if value.ndim == 1 else value.double().sum(1)
    raise NotApplicable(
        f"label recovery: the last parameter {names[-1]!r} is not a head of "
        f"{seen.data.classes} classes"
    )


def idlg(seen: Observation) -> Tensor:
    """The one class whose head signal is negative (Zhao et al., 2020, Eq. 4).

    Returns:
        (1,) int64.

    Raises:
        NotApplicable: the batch holds more than one example, where the rule does not apply.
    """
    if (seen.knowledge.batch_size or 1) != 1:
        raise NotApplicable("idlg labels: the rule holds for one example, the batch has more")
    return head_signal(seen).argmin()[None]


def sign_counts(seen: Observation) -> Tensor:
    """Labels of a batch: one for every negative class, then 1/B at a time from the lowest signal.

    The signs are certain for hard labels; the counts are exact as far as mean predictions are
    uniform (an untrained network), as in LLG (Wainakh et al., 2022) with the impact 1/B.

    Returns:
        (b,) int64, ascending.

    Raises:
        NotApplicable: the batch size is unknown, or there is no classification head.
    """
    size = seen.knowledge.batch_size
    if size is None:
        raise NotApplicable("label counts need the batch size, which is not granted")
    signal = head_signal(seen)
    if signal.abs().sum() == 0:
        raise NotApplicable("label counts: the head's gradient is zero")
    head_has_bias = seen.state.params[list(seen.state.params)[-1]].ndim == 1
    impact = torch.tensor(-1.0, dtype=torch.float64) if head_has_bias else signal[signal < 0].sum()
    counts = greedy(signal, impact / size, size)
    return torch.arange(len(counts)).repeat_interleave(counts)


def greedy(signal: Tensor, impact: Tensor, size: int) -> Tensor:
    """One label for every negative class, lowest first, then `impact` at a time from the lowest.

    Args:
        signal: (classes,) negative where a class is present.
        impact: 0-dim, negative: what one example of a class adds to its entry.
        size: b.

    Returns:
        Counts (classes,) int64 with sum b.
    """
    signal, counts = signal.clone(), torch.zeros(len(signal), dtype=torch.int64)
    present = signal.argsort(stable=True)[: min(size, int((signal < 0).sum()))]
    counts[present] += 1
    signal[present] -= impact
    while int(counts.sum()) < size:
        lowest = int(signal.argmin())
        counts[lowest] += 1
        signal[lowest] -= impact
    return counts
