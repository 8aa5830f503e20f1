"""What an attacker can claim without having seen any update."""

from __future__ import annotations

import torch
from scipy.stats import binom
from torch import Tensor

from gradleak.errors import InvalidInput
from gradleak.metrics.align import squared_distances
from gradleak.types import Batch, DataSpec


def guess_labels(public: Tensor, count: int, *, classes: int) -> Tensor:
    """The multiset of `count` labels with the largest expected overlap with the true ones.

    With class shares p_c and N_c ~ Binomial(count, p_c), the k-th copy of class c adds
    P(N_c ≥ k); the additions decrease in k, so the `count` largest ones are the optimum.

    Args:
        public: (n,) int64 labels that are public.
        count: labels to guess.
        classes: number of classes.

    Returns:
        (count,) int64, sorted.
    """
    share = torch.bincount(public, minlength=classes).double() / len(public)
    copies = torch.arange(count)[:, None]
    gain = torch.as_tensor(binom.sf(copies.numpy(), count, share.numpy()))
    best = gain.flatten().argsort(descending=True, stable=True)[:count]
    return (best % len(share)).sort().values


def baselines(
    public: Batch, truth: Batch, *, labels_known: bool, spec: DataSpec
) -> dict[str, Batch]:
    """Claims that cost no update: an attack which does not beat them has shown nothing.

    Args:
        public: examples that anybody may have.
        truth: the target; only its size is used, its labels where `labels_known`, and its
            inputs by "nearest_public".
        labels_known: whether the threat model grants the labels.
        spec: form of the data.

    Returns:
        "mean_image": the public mean for every example; "class_mean": the public mean of each
        example's class, only where labels are known; "nearest_public": the public example
        nearest to each truth, an *oracle* that no attacker has (it peeks at the truth).

    Raises:
        InvalidInput: there is no public example, or its shape differs from the truth's.
    """
    if not len(public) or public.inputs.shape[1:] != truth.inputs.shape[1:]:
        raise InvalidInput(
            f"public examples {tuple(public.inputs.shape)}: expected at least one of shape "
            f"{tuple(truth.inputs.shape[1:])}"
        )
    inputs, classes = public.inputs.detach().cpu(), public.classes.detach().cpu()
    b = len(truth)
    known = truth.classes.detach().cpu()
    labels = known if labels_known else guess_labels(classes, b, classes=spec.classes)
    overall = inputs.mean(0)
    nearest = squared_distances(truth.inputs, inputs).argmin(1)
    guesses = {"mean_image": Batch(overall.expand(b, *overall.shape).clone(), labels)}
    if labels_known:
        means = {
            c: inputs[classes == c].mean(0) if bool((classes == c).any()) else overall
            for c in torch.unique(known).tolist()
        }
        guesses["class_mean"] = Batch(torch.stack([means[c] for c in known.tolist()]), labels)
    guesses["nearest_public"] = Batch(inputs[nearest], labels if labels_known else classes[nearest])
    return guesses
