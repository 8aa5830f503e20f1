"""Robbing the Fed (Fowl, Geiping, Czaja, Goldblum & Goldstein, ICLR 2022)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from gradleak.attacks.active.claims import claimed, inside
from gradleak.attacks.parts.needs import require
from gradleak.errors import InvalidInput
from gradleak.types import About, Batch, DataSpec, Fact, ModelState, Observation, Reconstruction


class Bins(nn.Module):
    """x + V relu(q·x − c_k): identical rows q, rising thresholds c_k, equal columns of V."""

    def __init__(self, width: int, bins: int) -> None:
        super().__init__()
        self.sorter = nn.Linear(width, bins)
        self.mixer = nn.Linear(bins, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        added: Tensor = self.mixer(torch.relu(self.sorter(x.flatten(1))))
        return x + added.reshape(x.shape)


class Imprinted(nn.Module):
    """A network with bins in front of it."""

    def __init__(self, block: Bins, body: nn.Module) -> None:
        super().__init__()
        self.block, self.body = block, body

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.body(self.block(x))
        return output


@dataclass(frozen=True)
class Imprint:
    """x = (∇W_k − ∇W_{k+1}) / (∇b_k − ∇b_{k+1}) for a bin k that holds one example.

    A malicious server puts a layer before the network whose rows all measure the brightness
    q·x of an image, with quantiles c_k of public brightness as thresholds. Unit k is active where
    q·x > c_k, and since the columns behind it are equal each example sends the same error s_i
    into every unit it activates:

        ∇W_k = Σ_{i: q·x_i > c_k} s_i x_i,   ∇b_k = Σ_{i: q·x_i > c_k} s_i

    Differences of neighbours leave the examples of one bin; a claim is kept if it lies in the box
    and in its bin, the strongest first. Of b examples in K bins (1 − 1/K)^{b−1} are expected alone.

    Args:
        bins: K.
        shift: mean change of a pixel that the bins cause, in widths of the box: the network goes
            on working.
    """

    bins: int = 256
    shift: float = 0.05

    about: ClassVar[About] = About(
        id="imprint",
        title="Robbing the Fed: an imprint of bins",
        paper="Fowl et al., Robbing the Fed: Directly Obtaining Private Data in Federated "
        "Learning with Modified Models, ICLR 2022",
        link="https://arxiv.org/abs/2110.13057",
        modalities=frozenset({"image", "tabular"}),
        classifiers=True,
        needs=frozenset({Fact.BATCH_SIZE}),
        likelihood="exact equations",
        prior="none",
        server="malicious",
        deviations=(
            "thresholds are quantiles of public images (published: of a fitted distribution)",
            "the bins' output is added to the image, so that the network behind it goes on working",
            "columns of random signs, so that no network is blind to the direction they add",
            "the sparse variant, whose bins close again, is not built",
        ),
    )

    def __post_init__(self) -> None:
        if self.bins < 2:
            raise InvalidInput(f"bins={self.bins}: expected at least 2")
        if not 0 < self.shift < math.inf:
            raise InvalidInput(f"shift={self.shift}: expected a positive number")

    def plant(
        self,
        state: ModelState,
        public: Batch,
        *,
        data: DataSpec,
        batch_size: int,
        generator: torch.Generator,
    ) -> ModelState:
        """Put the bins before the network."""
        width = math.prod(data.shape)
        like = next(iter(state.params.values()))
        row = torch.full((width,), width**-0.5, dtype=torch.float64)
        brightness = public.inputs.flatten(1).cpu().double() @ row
        shares = torch.arange(1, self.bins, dtype=torch.float64) / self.bins
        lowest = data.bounds[0] * row.sum() - 1e-3 * brightness.std()  # below every image
        thresholds = torch.cat([lowest[None], torch.quantile(brightness, shares)])
        passed = (brightness[:, None] - thresholds).relu().sum(1).mean()
        signs = torch.randint(2, (width, 1), generator=generator) * 2.0 - 1.0
        columns = self.shift * (data.bounds[1] - data.bounds[0]) / passed * signs
        planted = {
            "block.sorter.weight": row.expand(self.bins, -1),
            "block.sorter.bias": -thresholds,
            "block.mixer.weight": columns.expand(-1, self.bins),
        }
        return ModelState(
            Imprinted(Bins(width, self.bins), state.model),
            {k: v.to(like, copy=True) for k, v in planted.items()}
            | {f"body.{k}": v for k, v in state.params.items()},
            {f"body.{k}": v for k, v in state.buffers.items()},
        )

    def __call__(self, seen: Observation, *, generator: torch.Generator) -> Reconstruction:
        require(self.about, seen)
        nothing = torch.empty((0, *seen.data.shape))
        name = next((n for n, m in seen.state.model.named_modules() if isinstance(m, Bins)), None)
        if name is None:
            return claimed(seen, nothing, "the network broadcast has no bins")
        prefix = f"{name}.sorter" if name else "sorter"
        thresholds, rising = (-seen.state.params[f"{prefix}.bias"].double()).sort()
        rows = seen.update.values[f"{prefix}.weight"].double()[rising]
        sums = seen.update.values[f"{prefix}.bias"].double()[rising]
        if not (rows.isfinite().all() and sums.isfinite().all()):
            return claimed(seen, nothing, "the bins' gradient holds non-finite values")
        one_bin = sums - torch.cat([sums[1:], sums.new_zeros(1)])
        images = (rows - torch.cat([rows[1:], rows.new_zeros(1, rows.shape[1])])) / one_bin[:, None]
        brightness = images @ seen.state.params[f"{prefix}.weight"][0].double()
        upper = torch.cat([thresholds[1:], thresholds.new_full((1,), math.inf)])
        slack = 1e-3 * thresholds.std()
        own = (brightness > thresholds - slack) & (brightness < upper + slack)
        images = images.reshape(-1, *seen.data.shape)
        order = one_bin.abs().argsort(descending=True)
        kept = order[(own & inside(images, seen.data.bounds))[order]]
        size = seen.knowledge.batch_size or 1
        message = f"{min(len(kept), size)} of {size} examples claimed, from bins of their own"
        return claimed(seen, images[kept], message)

    def objective(self, seen: Observation) -> Callable[[Batch], float]:
        """A closed form minimises nothing: nan everywhere."""
        return lambda batch: math.nan
