"""Soteria: hide the features that say most about the input (Sun et al., CVPR 2021)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from gradleak.defenses.sheet import Sheet
from gradleak.defenses.wrapped import Wrapped, check_classifies, undefended
from gradleak.errors import InvalidInput, NotApplicable
from gradleak.mechanisms.client import own_buffers, template
from gradleak.types import Batch, Mechanism, ModelState, Update

_OFFSET = 0.1
_AT_ONCE = 256


@dataclass(frozen=True)
class Soteria:
    """∂L/∂W[:, f] → 0 for the prune_rate % of features f of one linear layer of lowest score.

    The layer reads features r = h(x), and score_f = Σ_i ‖∂r_f(x_i)/∂x_i‖₂ / (|r_f(x_i)| + 0.1).
    Everything else leaves the client as it is, the layer's bias included. The zeros show the mask:
    the adaptive attack mutes what it silenced, and compares all the rest, which determines the
    input just as well. Where noise covers the zeros it mutes the whole layer.

    Source: Sun et al., "Provable Defense against Privacy Leakage in Federated Learning from
    Representation Perspective", CVPR 2021; scores, offset, percentile and the sum over a batch as
    in its code, which divides by the signed r_f + 0.1 (the same after a ReLU).

    Args:
        prune_rate: percentile of the scores below which a feature is masked, in [0, 100).
        layer: name of the defended linear layer; None takes the last one.
    """

    prune_rate: float = 50.0
    layer: str | None = None

    id: ClassVar[str] = "soteria"
    title: ClassVar[str] = "Soteria"
    sheet: ClassVar[Sheet] = Sheet(
        paper=(
            "Sun et al., Provable Defense against Privacy Leakage in Federated Learning from "
            "Representation Perspective, CVPR 2021"
        ),
        link="https://arxiv.org/abs/2012.06043",
        promises="The features that say most about the input do not reach the server.",
        broken_by=(
            "muting the silenced columns, which their zeros show; all other tensors determine the"
            " input (Balunović et al., ICLR 2022)"
        ),
        cost="one backward pass per feature of the defended layer",
    )

    def __post_init__(self) -> None:
        if not 0 <= self.prune_rate < 100:
            raise InvalidInput(f"prune_rate={self.prune_rate}: expected a percentage in [0, 100)")

    def __call__(self, mechanism: Mechanism) -> Mechanism:
        check_classifies(self.id, mechanism, why="whose linear layers read times alone")
        return _Muted(mechanism, self) if self.prune_rate > 0 else mechanism

    def doubt(self, before: Update, after: Update) -> tuple[str, float] | None:
        old, new = before.values, after.values
        changed = [k for k in old if not torch.equal(old[k], new[k])]
        if len(changed) != 1:
            return "claims to change one tensor and changes {:.0f}", len(changed)
        (name,) = changed
        columns = (old[name] != new[name]).any(0)
        silent = float((~new[name].any(0)).double().mean())
        share = float(columns.double().mean())
        step = 1 / len(columns)
        if bool(new[name][:, columns].any()) or share > self.prune_rate / 100 + step:
            return (
                f"claims to mask {self.prune_rate:g}% of the features and changes {{:.1%}}",
                share,
            )
        if silent < self.prune_rate / 100 - step:
            return f"claims to mask {self.prune_rate:g}% of the features and masks {{:.1%}}", silent
        return None

    def defended(self, state: ModelState) -> str:
        """Name of the defended layer.

        Raises:
            NotApplicable: the network has no trained linear layer, or none of that name.
        """
        names = [
            name
            for name, layer in state.model.named_modules()
            if isinstance(layer, nn.Linear) and _weight(name) in state.params
        ]
        if not names:
            raise NotApplicable("soteria: expected a network with a linear layer")
        if self.layer is not None and self.layer not in names:
            raise NotApplicable(f"soteria: no linear layer {self.layer!r}: expected one of {names}")
        return self.layer or names[-1]

    def kept(self, state: ModelState, inputs: Tensor, *, mode: str = "eval") -> Tensor:
        """Which features of the defended layer leave the client, (width,) bool.

        Args:
            state: broadcast state.
            inputs: (b, *shape).
            mode: whether the client normalises by "train" or by "eval" statistics.
        """
        scores = self._scores(state, inputs.detach(), mode).sum(1)
        return scores >= torch.quantile(scores, self.prune_rate / 100)

    def _scores(self, state: ModelState, inputs: Tensor, mode: str) -> Tensor:
        """(width, b)."""
        model = template(state.model, "train" if mode == "train" else "eval")
        fixed = own_buffers(model, state)
        found: list[Tensor] = []

        def features(x: Tensor) -> Tensor:
            with _entering(model, self.defended(state), found):
                torch.func.functional_call(model, (dict(state.params), fixed), (x,))
            return found[-1]

        reached: Tensor
        reached, pull = torch.func.vjp(features, inputs)  # type: ignore[misc]
        if reached.ndim != 2:
            raise NotApplicable(f"soteria: features {tuple(reached.shape)}: expected (b, width)")

        def lengths(cotangent: Tensor) -> Tensor:
            (slope,) = pull(cotangent.expand_as(reached))
            length: Tensor = slope.flatten(1).square().sum(1).sqrt()
            return length

        one_hot = torch.eye(reached.shape[1], dtype=reached.dtype, device=reached.device)
        slopes: Tensor = torch.func.vmap(lengths, chunk_size=_AT_ONCE)(one_hot)
        return slopes / (reached.abs().T + _OFFSET)


def _weight(layer: str) -> str:
    return f"{layer}.weight" if layer else "weight"


@contextmanager
def _entering(model: nn.Module, layer: str, found: list[Tensor]) -> Iterator[None]:
    """Append what enters `layer` to `found`."""
    handle = model.get_submodule(layer).register_forward_pre_hook(
        lambda _, arguments: found.append(arguments[0])
    )
    try:
        yield
    finally:
        handle.remove()


@dataclass(frozen=True)
class _Muted(Wrapped):
    rule: Soteria

    def mean(self, state: ModelState, batch: Batch) -> Update:
        return self._masked(self.inner.mean(state, batch), state, batch)

    def sample(self, state: ModelState, batch: Batch, *, generator: torch.Generator) -> Update:
        return self._masked(self.inner.sample(state, batch, generator=generator), state, batch)

    def predict(self, received: Update, state: ModelState, batch: Batch) -> Update:
        """The defended tensor as received in every silent column; muted where noise covers them."""
        clean = self.inner.predict(received, state, batch)
        name = _weight(self.rule.defended(state))
        sent = (received.values[name] != 0).any(0)
        seen = torch.where(sent & ~sent.all(), clean.values[name], received.values[name])
        return Update({**clean.values, name: seen}, clean.kind)

    def _masked(self, update: Update, state: ModelState, batch: Batch) -> Update:
        name = _weight(self.rule.defended(state))
        mode = getattr(undefended(self.inner), "batch_norm", "eval")
        kept = self.rule.kept(state, batch.inputs, mode=mode)
        return Update({**update.values, name: update.values[name] * kept}, update.kind)
