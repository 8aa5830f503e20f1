"""A first layer's inputs as independent components (Kariyappa et al., ICML 2023)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from sklearn.decomposition import FastICA
from torch import Tensor
from torch.nn.functional import softplus

from gradleak.attacks.closed_form.explained import (
    labelled,
    no_solution,
    rounding,
    unexplained,
)
from gradleak.attacks.closed_form.mixture import Mixture, mixture
from gradleak.attacks.parts.needs import require
from gradleak.attacks.parts.penalties import total_variation
from gradleak.seeding import child
from gradleak.types import About, Batch, Fact, Observation, Reconstruction

_GAUSSIAN = 0.37456721
"""E log cosh of a standard normal."""
_FIXED_POINT = 500


@dataclass(frozen=True)
class CocktailParty:
    """max over U of mean (E log cosh s − E log cosh ν)² − λ_d D(U) − λ_t TV(s), s = U R̃.

    ∂L/∂W of a first linear layer mixes the batch's inputs: L R with b rows R, whitened to R̃. Its
    inputs are looked for as the rows s of U R̃ that are least Gaussian (ν is normal) and smooth, U
    (b × b) of unit rows, with D = mean over pairs of exp(T |cos(u_i, u_j)|) − 1 against finding one
    of them twice. An honest server starts from FastICA, climbs by Adam, and takes lengths and
    signs from ∂L/∂c. Neither labels nor an activation are assumed.

    Never exact but by luck: pictures are not independent. Where ReLU leaves units dark, `spear` is.

    Args:
        steps: of Adam.
        learning_rate: its step.
        negentropy: weight of non-Gaussianity.
        decorrelation: λ_d.
        sharpness: T.
        variation: λ_t.
    """

    steps: int = 500
    learning_rate: float = 0.01
    negentropy: float = 1.0
    decorrelation: float = 1.0
    sharpness: float = 5.0
    variation: float = 3.1

    about: ClassVar[About] = About(
        id="cocktail-party",
        title="Independent components of a first layer (Cocktail Party)",
        paper="Kariyappa et al., Cocktail Party Attack: Breaking Aggregation-Based Privacy in "
        "Federated Learning Using Independent Component Analysis, ICML 2023",
        link="https://arxiv.org/abs/2209.05578",
        modalities=frozenset({"image"}),
        classifiers=True,
        needs=frozenset({Fact.BATCH_SIZE}),
        likelihood="exact equations up to an unknown unmixing",
        prior="independence, total variation",
        deviations=(
            "starts from FastICA (scikit-learn) and takes 500 steps of 0.01; the published code "
            "starts from the identity and takes 25,000 of 0.001",
            "negentropy with the Gaussian's value subtracted, which suits pictures of either "
            "kurtosis; the published code squares E log cosh alone, and then sets it to zero",
            "λ_d and T are the published code's defaults, λ_t its weight for Tiny ImageNet",
            "lengths and signs from the bias's gradient; the published evaluation scales to the "
            "claim's own extremes and takes the sign nearer to the truth",
            "inputs of the first layer alone, no inversion of embeddings",
        ),
    )

    def __call__(self, seen: Observation, *, generator: torch.Generator) -> Reconstruction:
        require(self.about, seen)
        refuse = partial(no_solution, seen)
        mixed = mixture(seen)
        if isinstance(mixed, str):
            return refuse(mixed)
        if mixed.size == 1:
            return self._claimed(seen, mixed, torch.ones((1, 1), dtype=torch.float64))
        centre = mixed.right.mean(1, keepdim=True)
        spreads, axes = torch.linalg.eigh((mixed.right - centre).cov())
        if spreads[0] <= rounding(seen) * spreads[-1]:
            return refuse("the inputs are linearly dependent but for their means")
        whitening = (axes / spreads.sqrt()).T
        white = whitening @ (mixed.right - centre)
        start = _fixed_point(white, child(generator, "unmixing"))
        unmixing = self._climbed(start, white, whitening @ centre, seen.data.shape)
        directions, fault = torch.linalg.inv_ex(unmixing @ whitening)
        if fault:
            return refuse("one input was found twice")
        return self._claimed(seen, mixed, directions)

    def _claimed(self, seen: Observation, mixed: Mixture, directions: Tensor) -> Reconstruction:
        """The pictures of an unmixing, with its lengths, and what they leave unexplained."""
        pictures = mixed.pictures(directions)
        if pictures is None:
            return no_solution(seen, "an input has no length that explains the bias's gradient")
        claim = labelled(seen, pictures)
        if isinstance(claim, str):
            return no_solution(seen, claim)
        gap = unexplained(seen, claim)
        if gap <= rounding(seen) ** 0.5:
            return Reconstruction(claim, gap, "solved")
        told = f"{gap:.2g} of the update's length is unexplained"
        return Reconstruction(claim, gap, "exhausted", message=told)

    def objective(self, seen: Observation) -> Callable[[Batch], float]:
        """The share of the update that a claim leaves unexplained."""
        return partial(unexplained, seen)

    def _climbed(
        self, start: Tensor, white: Tensor, centre: Tensor, shape: tuple[int, ...]
    ) -> Tensor:
        """U (b, b), unit rows, from `start` by Adam."""
        free = start.clone().requires_grad_()
        adam = torch.optim.Adam([free], lr=self.learning_rate)
        for _ in range(self.steps):
            adam.zero_grad()
            unit = free / free.norm(dim=1, keepdim=True)
            sources = unit @ white
            loss = -self.negentropy * (_log_cosh(sources).mean(1) - _GAUSSIAN).square().mean()
            alike = torch.exp(self.sharpness * (unit @ unit.T).abs()) - 1
            loss = loss + self.decorrelation * alike.mean()
            whole = (sources + unit @ centre).view(-1, *shape)
            loss = loss + self.variation * total_variation(whole[None])[0]
            loss.backward()  # type: ignore[no-untyped-call]
            adam.step()
        found: Tensor = free.detach() / free.detach().norm(dim=1, keepdim=True)
        return found


def _fixed_point(white: Tensor, stream: torch.Generator) -> Tensor:
    """U (b, b) of FastICA on whitened rows; its last iterate where it does not settle."""
    seed = int(torch.randint(2**31, (), generator=stream))
    solver = FastICA(whiten=False, max_iter=_FIXED_POINT, tol=1e-6, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        solver.fit(white.T.numpy())
    return torch.from_numpy(solver.components_)


def _log_cosh(s: Tensor) -> Tensor:
    return s.abs() + softplus(-2 * s.abs()) - math.log(2)
