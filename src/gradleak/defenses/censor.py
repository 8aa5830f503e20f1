"""CENSOR: send a random direction orthogonal to the gradient (Zhang et al., NDSS 2025)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from gradleak.defenses.sheet import Sheet
from gradleak.defenses.wrapped import Counted, Wrapped, undefended
from gradleak.errors import IntractableLikelihood, InvalidInput
from gradleak.mechanisms import FedSGD
from gradleak.mechanisms.client import Local, check_positive, own_buffers, template
from gradleak.seeding import normal
from gradleak.types import Batch, Mechanism, ModelState, Observation, Update


@dataclass(frozen=True)
class Censor:
    """ũ_l = ‖u_l‖ · o_l / ‖o_l‖ with o_l = r − (⟨r, u_l⟩ / ‖u_l‖²) u_l, r random, by tensor l.

    Of `trials` such updates the client sends the one with the lowest loss on its batch after a
    trial step. To first order all these losses are equal, so the choice is by curvature.

    The published code subtracts (⟨r, u_l⟩ / ‖u_l‖) u_l of a unit r, which is orthogonal for
    ‖u_l‖ = 1 alone and follows ±u_l where ‖u_l‖ is large.

    Source: Zhang et al., "CENSOR: Defense Against Gradient Inversion via Orthogonal Subspace
    Bayesian Sampling", NDSS 2025, and its code.

    Args:
        trials: candidates to choose from.
        learning_rate: of the trial step; a delta is a step itself.
        projection: "exact", or as "published".
        rounds: first rounds that are protected; None protects all.
    """

    trials: int = 20
    learning_rate: float = 1e-4
    projection: Literal["exact", "published"] = "exact"
    rounds: int | None = None

    id: ClassVar[str] = "censor"
    title: ClassVar[str] = "CENSOR"
    sheet: ClassVar[Sheet] = Sheet(
        paper="Zhang et al., CENSOR: Defense Against Gradient Inversion via Orthogonal Subspace "
        "Bayesian Sampling, NDSS 2025",
        link="https://arxiv.org/abs/2501.15718",
        promises="nothing along the gradient leaves the client, and the loss still falls",
        broken_by="none known for pixels; the norms of all tensors and one equation for each leave "
        "exactly, which tells candidates apart; and rounds after the protected ones",
        cost="a forward pass per trial; the update sent is no descent direction",
    )

    def __post_init__(self) -> None:
        check_positive(trials=self.trials, learning_rate=self.learning_rate)
        if self.rounds is not None:
            check_positive(rounds=self.rounds)
        if self.projection not in ("exact", "published"):
            raise InvalidInput(f"projection={self.projection}: expected exact or published")

    def __call__(self, mechanism: Mechanism) -> Mechanism:
        return _Turned(mechanism, self)

    def doubt(self, before: Update, after: Update) -> tuple[str, float] | None:
        for k, u in before.values.items():
            size, sent = float(u.norm()), float(after.values[k].norm())
            if u.numel() > 1 and abs(size - sent) > 1e-3 * size:
                return f"claims to keep norm {size:.3g} of {k} and sends {{:.3g}}", sent
            along = float((u * after.values[k]).sum()) / max(size * sent, 1e-30)
            if self.projection == "exact" and u.numel() > 1 and abs(along) > 1e-3:
                return f"claims to be orthogonal and has cosine {{:.3f}} in {k}", along
        return None

    def turned(self, values: Mapping[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        """One candidate."""
        return {k: self._turned(v, generator) for k, v in values.items()}

    def _turned(self, value: Tensor, generator: torch.Generator) -> Tensor:
        tiny = torch.finfo(value.dtype).tiny
        drawn = normal(value.shape, generator=generator, dtype=value.dtype).to(value.device)
        drawn = drawn / drawn.norm()
        size = value.norm().clamp(min=tiny**0.5)
        power = 2 if self.projection == "exact" else 1
        left = drawn - (drawn * value).sum() / size**power * value
        if power == 2:  # once more, for rounding
            left = left - (left * value).sum() / size**2 * value
        found: Tensor = value.norm() * left / left.norm().clamp(min=tiny**0.5)
        return found

    def gathered(self, seen: Observation) -> Observation:
        """The latest round, unprotected once the protected ones are over."""
        over = self.rounds is not None and len(seen.exchanges) > self.rounds
        layer = seen.mechanism
        belief = layer.inner if over and isinstance(layer, Wrapped) else layer
        return replace(seen, exchanges=seen.exchanges[-1:], mechanism=belief)


@dataclass(frozen=True)
class _Turned(Counted):
    rule: Censor

    def mean(self, state: ModelState, batch: Batch) -> Update:
        raise IntractableLikelihood("censor: the mean of the best of several has no closed form")

    def sent(
        self,
        clean: Update,
        state: ModelState,
        batch: Batch,
        *,
        earlier: int,
        generator: torch.Generator,
    ) -> Update:
        rule = self.rule
        if rule.rounds is not None and earlier >= rule.rounds:
            return clean
        drawn = [rule.turned(clean.values, generator) for _ in range(rule.trials)]
        loss = self._loss(state, batch, generator)
        best = min(drawn, key=loss)
        return Update(best, clean.kind)

    def predict(self, received: Update, state: ModelState, batch: Batch) -> Update:
        """Lengths, and what of the claim lies along what should be orthogonal to it.

        û ‖c‖ + ⟨û, c⟩ e, û along the tensor received and e along the rest of the claim's: its
        squared distance from the tensor received is (‖c‖ − ‖u‖)² + ⟨û, c⟩².
        """
        clean = self.inner.predict(received, state, batch)
        found = {}
        for k, c in clean.values.items():
            tiny = torch.finfo(c.dtype).tiny
            u = received.values[k] / received.values[k].square().sum().clamp(min=tiny).sqrt()
            along = (u * c).sum()
            rest = c - along * u
            aside = along * rest / rest.square().sum().clamp(min=tiny).sqrt()
            length = c.square().sum().clamp(min=tiny).sqrt()
            found[k] = length * u + (aside if self.rule.projection == "exact" else 0 * aside)
        return Update(found, clean.kind)

    def _loss(
        self, state: ModelState, batch: Batch, generator: torch.Generator
    ) -> Callable[[Mapping[str, Tensor]], float]:
        """Loss of the client's batch after a trial step, by the update."""
        step = -self.rule.learning_rate if self.kind == "gradient" else 1.0
        core = undefended(self.inner)
        client = core if isinstance(core, Local) else FedSGD()
        objective = client.drawn(batch, generator=generator)
        model = template(state.model, "eval")
        fixed = own_buffers(model, state)

        def after(update: Mapping[str, Tensor]) -> float:
            moved = {k: p + step * update[k] for k, p in state.params.items()}
            with torch.no_grad():
                return float(
                    objective(lambda *to: torch.func.functional_call(model, (moved, fixed), to))
                )

        return after
