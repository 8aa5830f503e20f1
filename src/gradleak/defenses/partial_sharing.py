"""Partial sharing: some layers never leave the client."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from gradleak.defenses.sheet import Sheet
from gradleak.defenses.wrapped import Masked, Noise, Wrapped, norm
from gradleak.errors import InvalidInput, nearest
from gradleak.types import Batch, Likelihood, Mechanism, ModelState, Update


@dataclass(frozen=True)
class PartialSharing:
    """ũ = u, with zeros for the layers withheld.

    Everybody knows which these are, so the adaptive attack leaves them out of its comparison.

    Args:
        withheld: "first:N" or "last:N" layers in the network's order (weight and bias of a layer
            together), or names of layers or tensors joined by "/": as the network has them, else
            of every one so called inside it. "time_embedding" keeps a denoiser's sinusoids at
            home; "time_embedding/time" also keeps the layers that put the time into blocks, whose
            gradients tell t as well.
        frozen: the client does not train them either, which several local steps show.
    """

    withheld: str = "first:1"
    frozen: bool = False

    id: ClassVar[str] = "partial-sharing"
    title: ClassVar[str] = "Partial sharing"
    sheet: ClassVar[Sheet] = Sheet(
        paper="Shokri, Shmatikov, Privacy-Preserving Deep Learning, CCS 2015",
        link="https://doi.org/10.1145/2810103.2813687",
        promises="Some layers never leave the client.",
        broken_by=(
            "leaving them out of the comparison: the other layers usually determine the input"
        ),
        cost=(
            "accuracy, as the layers withheld are trained by nobody or by each client alone; "
            "saves bytes"
        ),
    )

    def __post_init__(self) -> None:
        end, colon, count = self.withheld.partition(":")
        if colon and not (end in ("first", "last") and count.isdecimal() and int(count) > 0):
            raise InvalidInput(
                f"withheld={self.withheld}: expected first:N, last:N, or names joined by '/'"
            )

    def __call__(self, mechanism: Mechanism) -> Mechanism:
        return (_Frozen if self.frozen else Masked)(mechanism, self)

    def doubt(self, before: Update, after: Update) -> tuple[str, float] | None:
        hidden = self.hidden(after.values)
        sent = norm(Update({k: v for k, v in after.values.items() if k in hidden}, after.kind))
        if sent == 0:
            return None
        return f"claims to withhold {self.withheld} and sends norm {{:.3g}} of it", sent

    def map(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Put zeros in the place of what is withheld."""
        hidden = self.hidden(values)
        return {k: torch.zeros_like(v) if k in hidden else v for k, v in values.items()}

    def hidden(self, names: Iterable[str]) -> set[str]:
        """Names of the tensors withheld."""
        layers: dict[str, set[str]] = {}
        for name in names:
            layers.setdefault(name.rpartition(".")[0], set()).add(name)
        end, colon, count = self.withheld.partition(":")
        if not colon:
            return set().union(*(self._named(wanted, names) for wanted in end.split("/")))
        if int(count) > len(layers):
            raise InvalidInput(f"withheld={self.withheld}: the network has {len(layers)} layers")
        ordered = list(layers.values())
        chosen = ordered[: int(count)] if end == "first" else ordered[-int(count) :]
        return set().union(*chosen)

    def _named(self, wanted: str, names: Iterable[str]) -> set[str]:
        found = {n for n in names if f"{n}.".startswith(f"{wanted}.")}
        if not found:
            found = {n for n in names if f".{wanted}." in f".{n}."}
        if not found:
            raise InvalidInput(
                f"withheld={self.withheld}: no layer {wanted!r}, {nearest(wanted, names)}"
            )
        return found


@dataclass(frozen=True)
class _Frozen(Wrapped):
    """Training of the other layers alone, and zeros for these."""

    rule: PartialSharing

    def mean(self, state: ModelState, batch: Batch) -> Update:
        return self._whole(self.inner.mean(self._left(state), batch), state)

    def sample(self, state: ModelState, batch: Batch, *, generator: torch.Generator) -> Update:
        return self._whole(self.inner.sample(self._left(state), batch, generator=generator), state)

    def predict(self, received: Update, state: ModelState, batch: Batch) -> Update:
        left = self._left(state)
        seen = Update({k: received.values[k] for k in left.params}, received.kind)
        return self._whole(self.inner.predict(seen, left, batch), state)

    def likelihood(self, *, batch_size: int) -> Likelihood:
        return self._centred(Masked(self.inner, self.rule).likelihood(batch_size=batch_size))

    def noised(self, noise: Noise) -> Likelihood:
        return self._centred(Masked(self.inner, self.rule).noised(noise))

    def _centred(self, known: Likelihood) -> Likelihood:
        return replace(known, centre=_Frozen(known.centre, self.rule))

    def _left(self, state: ModelState) -> ModelState:
        """The state with what is frozen among its fixed tensors."""
        hidden = self.rule.hidden(state.params)
        params = {k: v for k, v in state.params.items() if k not in hidden}
        fixed = {k: v for k, v in state.params.items() if k in hidden}
        return replace(state, params=params, buffers={**state.buffers, **fixed})

    def _whole(self, update: Update, state: ModelState) -> Update:
        values = update.values
        return Update(
            {k: values[k] if k in values else torch.zeros_like(p) for k, p in state.params.items()},
            update.kind,
        )
