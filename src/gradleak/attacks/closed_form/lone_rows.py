"""What one example alone wrote into a sum: the units of a first layer that it alone activates."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from gradleak.attacks.active.claims import claimed, inside
from gradleak.attacks.closed_form.explained import no_solution, rounding
from gradleak.attacks.closed_form.first_layer import first_linear
from gradleak.attacks.parts.labels import idlg, sign_counts
from gradleak.attacks.parts.needs import require
from gradleak.types import About, Batch, Fact, Observation, Reconstruction

_SLACK = 100
"""Distance, in unit roundings, at which two rows count as one direction."""


@dataclass(frozen=True)
class LoneRows:
    """x = (∂L/∂W_j) / (∂L/∂c_j) for every unit j that one example of all alone activates.

    With z = W h + c and a ReLU, ∂L/∂W_j = Σ_i δ_ij h_i and ∂L/∂c_j = Σ_i δ_ij over the examples
    that activate unit j, whosever they are: a secure sum of clients adds examples to it, and so do
    local steps. Two units that one example alone activates hold the same ratio, and two that
    several activate do not, for their weights δ differ. So ratios that repeat are examples:

        rows (∂L/∂W_j, ∂L/∂c_j) grouped by direction;  h = Σ_j δ_j ∂L/∂W_j / Σ_j δ_j²  in a group
        x = (h − h(0)) / (h(1) − h(0))

    An honest server needs nothing but the sum. Of N examples that activate a unit with probability
    p independently, m units leave about m p (1 − p)^(N − 1) of one's own to each.
    """

    about: ClassVar[About] = About(
        id="lone-rows",
        title="Units that one example alone activates",
        paper="gradleak, this package; the ratio as in Phong et al., Privacy-Preserving Deep "
        "Learning: Revisited and Enhanced, ATIS 2017; in sums of clients Marchand et "
        "al., SRATTA: Sample Re-ATTribution Attack of Secure Aggregation, ICML 2023",
        link="https://arxiv.org/abs/2306.07644",
        modalities=frozenset({"image", "tabular"}),
        classifiers=True,
        needs=frozenset({Fact.BATCH_SIZE}),
        likelihood="exact equations",
        prior="none",
        deviations=(
            "ratios that repeat are taken for examples; no prior of the data is used",
            "an example with a single unit of its own is not told from a mixture, and left out",
            "which examples share a client, SRATTA's other half, is not asked",
        ),
    )

    def __call__(self, seen: Observation, *, generator: torch.Generator) -> Reconstruction:
        require(self.about, seen)
        first = first_linear(seen.state, seen.data)
        if isinstance(first, str):
            return no_solution(seen, first)
        weight = seen.update.values[first.weight].detach().double().cpu()
        bias = seen.update.values[first.bias].detach().double().cpu()
        if not (weight.isfinite().all() and bias.isfinite().all()):
            return no_solution(seen, "the first layer's gradient holds non-finite values")
        hidden = repeated(weight, bias, tolerance=_SLACK * rounding(seen))
        images = torch.stack([first.undo(h) for h in hidden]) if len(hidden) else weight[:0]
        kept = images.reshape(-1, *seen.data.shape)
        kept = kept[inside(kept, seen.data.bounds)]
        size = seen.knowledge.batch_size or 1
        message = f"{min(len(kept), size)} of {size} examples have units of their own"
        return claimed(seen, kept, message, rule=_labels)

    def objective(self, seen: Observation) -> Callable[[Batch], float]:
        """A closed form minimises nothing: nan everywhere."""
        return lambda batch: math.nan


def _labels(seen: Observation) -> Tensor:
    """Those granted, or the quickest count."""
    if seen.knowledge.labels is not None:
        return seen.knowledge.labels
    return idlg(seen) if seen.knowledge.batch_size == 1 else sign_counts(seen)


def repeated(weight: Tensor, bias: Tensor, *, tolerance: float) -> Tensor:
    """Ratios that several rows share, (found, d), those of most rows first.

    Args:
        weight: (m, d).
        bias: (m,).
        tolerance: distance of unit rows at which they count as one.
    """
    used = bias != 0
    if not used.any():
        return weight[:0]
    weight, bias = weight[used], bias[used]
    rows = torch.cat([weight, bias[:, None]], 1)
    rows = rows / rows.norm(dim=1, keepdim=True)
    close = 1 - (rows @ rows.T).abs() < max(tolerance**2 / 2, 1e-15)
    groups = torch.as_tensor(connected_components(close.numpy(), directed=False)[1])
    sizes = groups.bincount()
    order = [g for g in sizes.argsort(descending=True).tolist() if sizes[g] > 1]
    found = [
        (bias[groups == g] @ weight[groups == g]) / bias[groups == g].square().sum() for g in order
    ]
    return torch.stack(found) if found else weight[:0]


def written_alone(supports: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Which client alone wrote each coordinate of a sum; −1 where none or several did.

    There n ū is that client's own value, whatever hides the others: the rows of embeddings whose
    token one client has, the coordinates that one client's sparsifier kept.

    Args:
        supports: (n, *shape) by tensor, whether client i may have written there.
    """
    return {
        name: torch.where(who.sum(0) == 1, who.int().argmax(0), -1)
        for name, who in supports.items()
    }
