"""The door: distances of many trials, once differentiable in inputs and soft labels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from gradleak.attacks.parts.carried import Evaluate, Wanted, carried
from gradleak.attacks.parts.client import (
    differentiable_twice,
    loaded,
    plain_client,
    trained_tensors,
)
from gradleak.attacks.parts.distances import cosine, cosine_slope, squared_l2
from gradleak.attacks.parts.fast.kernel import can_pack
from gradleak.attacks.parts.fast.probe import agrees, settled, structure
from gradleak.attacks.parts.fast.rules import Received, Rule, sum_of
from gradleak.attacks.parts.fast.tape import Constants, Tape, Unsupported
from gradleak.mechanisms.client import Loss, template
from gradleak.mechanisms.fedsgd import FedSGD
from gradleak.types import ModelState

if TYPE_CHECKING:
    from gradleak.attacks.parts.matching import Matching

KEPT_COORDINATES = 400_000_000
"""Numbers of received updates that are kept side by side for steps to come."""
_WORTH_PACKING = 1_000_000
_FEW_TRIALS = 8


class FastFit:
    """D(∇ℓ(x_t, y_t), u_t) of many trials for FedSGD clients.

    Use `FastFit.of`, which answers None wherever the closed forms do not cover the network.

    Args:
        mechanism: the client's.
        state: broadcast state in the precision of the search.
        relative: cosine distance, or else squared L2.
        received: one update per target.
    """

    def __init__(
        self,
        mechanism: FedSGD,
        state: ModelState,
        *,
        relative: bool,
        received: Sequence[dict[str, Tensor]],
    ) -> None:
        self.loss, self.relative, self.received = mechanism.loss, relative, received
        self.model = loaded(template(state.model, mechanism.batch_norm), state, trained=False)
        self.names = {id(p): name for name, p in trained_tensors(self.model, state).items()}
        convolved = sum(p.numel() for p in self.model.parameters() if p.ndim == 4)
        reference = next(iter(state.params.values()))
        self.may_pack = convolved >= _WORTH_PACKING and can_pack(reference)
        self.constants = Constants()
        self.copies = False
        self._groups: dict[tuple[int, ...], Received] = {}

    @classmethod
    def of(cls, matching: Matching) -> FastFit | None:
        """The fast form of a matching; None unless it is known to give the same numbers."""
        client = plain_client(matching.mechanism)
        if client is None or matching.distance not in (cosine, squared_l2):
            return None
        relative = matching.distance is cosine

        def together(state: ModelState, received: dict[str, Tensor]) -> Evaluate:
            fit = cls(client, state, relative=relative, received=[received])
            return lambda x, y, wanted: fit.evaluate(x, y, (0, 0), wanted)

        def covered() -> bool:
            try:
                return agrees(matching.plain, together, matching.spec, matching.batch_size)
            except (RuntimeError, TypeError, ValueError):
                return False

        network = structure(matching.state, client)
        key = None
        if network is not None:
            key = (network, relative, matching.spec, matching.batch_size)
        if not settled(key, covered):
            return None
        return cls(client, matching.state, relative=relative, received=matching.received)

    def __call__(self, inputs: Tensor, labels: Tensor, targets: Sequence[int]) -> Tensor:
        """Distances (trials,) at inputs (trials, b, *shape), labels (trials, b[, classes])."""

        def together(x: Tensor, y: Tensor, wanted: Wanted) -> tuple[Tensor, list[Tensor | None]]:
            return self.evaluate(x, y, tuple(targets), wanted)

        return carried(together, inputs, labels)

    def evaluate(
        self, inputs: Tensor, labels: Tensor, targets: tuple[int, ...], wanted: Wanted
    ) -> tuple[Tensor, list[Tensor | None]]:
        """Distances, and their gradients in inputs and labels where `wanted`."""
        received = self._group(targets)
        with torch.enable_grad():
            x = inputs.detach().flatten(0, 1).requires_grad_()
            y = labels.detach()
            if wanted[1]:
                y.requires_grad_()
            rules, loss = self._forward(x, y, received)
            outputs = [rule.z for rule in rules]
            ds = torch.autograd.grad(loss, outputs, create_graph=True, allow_unused=True)
        with torch.no_grad():
            used = [(rule, d) for rule, d in zip(rules, ds, strict=True) if d is not None]
            del rules, outputs, ds, loss
            comparison = Comparison(used, received)
            values, a, b = self._distance(comparison, received)
            if not any(wanted):
                return values, [None, None]
            roots, cotangents = comparison.pull(a, b)
        leaves = [leaf for leaf, want in zip((x, y), wanted, strict=True) if want]
        found = list(torch.autograd.grad(roots, leaves, cotangents, allow_unused=True))
        gradients: list[Tensor | None] = []
        for leaf, want, like in zip((x, y), wanted, (inputs, labels), strict=True):
            g = found.pop(0) if want else None
            g = torch.zeros_like(leaf) if want and g is None else g
            gradients.append(None if g is None else g.view_as(like))
        return values, gradients

    def _group(self, targets: tuple[int, ...]) -> Received:
        """The updates of these trials, kept for the next step as far as memory is cheap."""
        if targets not in self._groups:
            held = sum(len(group) for group in self._groups) + len(targets)
            size = sum(v.numel() for v in self.received[0].values())
            if held * size > KEPT_COORDINATES:
                self._groups.clear()
            self._groups[targets] = Received(self.received, targets)
        return self._groups[targets]

    def _forward(self, x: Tensor, y: Tensor, received: Received) -> tuple[list[Rule], Tensor]:
        """Rules of one pass, and the sum of the trials' losses."""
        # With many images, laying weights out anew for every call costs little.
        packs = self.may_pack and len(x) == len(received) <= _FEW_TRIALS
        tape = Tape(self.names, self.constants, received, copies=self.copies, packs=packs)
        if x.ndim == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        with tape, differentiable_twice():
            logits = self.model(x)
        if tape.overwritten:
            if self.copies:
                raise Unsupported("an input is overwritten in place")
            self.copies = True
            return self._forward(x, y, received)
        return tape.rules, _summed(self.loss, logits, y)

    def _distance(self, found: Comparison, received: Received) -> tuple[Tensor, Tensor, Tensor]:
        """Distances, and (a, b) of their derivative a g + b G."""
        dot, square, theirs = found.dot, found.square, received.squares
        if self.relative:
            length, a, b = cosine_slope(dot, square, theirs)
            return 1 - dot / length, a, b
        values = square - 2 * dot + theirs
        near = values < theirs * torch.finfo(values.dtype).eps ** (1 / 3)
        if near.any():
            values = torch.where(near, found.gap(), values)
        return values, torch.full_like(dot, 2.0), torch.full_like(dot, -2.0)


class Comparison:
    """⟨g_t, G_t⟩ (`dot`) and ‖g_t‖² (`square`) of every trial, over all layers.

    Args:
        used: every rule with its D; emptied by `pull`.
        received: G.
    """

    def __init__(self, used: list[tuple[Rule, Tensor]], received: Received) -> None:
        self.used, self.received = used, received
        moments = [m for rule, d in used if (m := rule.moments(d.detach())) is not None]
        dots, squares = [m[0] for m in moments], [m[1] for m in moments]
        formed = {name: g for rule, _ in used for name, g in rule.formed.items()}
        self.sizes = [g[0].numel() for g in formed.values()]
        if formed:
            self.g = torch.cat([g.reshape(len(g), -1) for g in formed.values()], 1)
            self.G = received.joined(list(formed))
            dots.append((self.g * self.G).sum(1))
            squares.append((self.g * self.g).sum(1))
        self.dot, self.square = sum_of(dots), sum_of(squares)

    def gap(self) -> Tensor:
        """‖g_t − G_t‖² without cancellation."""
        gaps = [gap for rule, _ in self.used if (gap := rule.gap()) is not None]
        if self.sizes:
            gaps.append(((self.g - self.G) ** 2).sum(1))
        touched = {name for rule, _ in self.used for name in rule.names}
        return sum_of([*gaps, self.received.squares_without(touched)])

    def pull(self, a: Tensor, b: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Where v = a g + b G is pulled back to, and the cotangents there.

        A rule is let go as soon as it is done, and with it what it computed.
        """
        roots: list[Tensor] = []
        cotangents: list[Tensor] = []
        shares: Iterator[Tensor] = iter(())
        if self.sizes:
            v = torch.addcmul(self.g * a[:, None], self.G, b[:, None])
            shares = iter(torch.split_with_sizes(v, self.sizes, 1))
        while self.used:
            rule, d = self.used.pop(0)
            own = {name: next(shares).view_as(g) for name, g in rule.formed.items()}
            in_d, in_x = rule.pull(a, b, own)
            for root, cotangent in ((d, in_d), (rule.x, in_x)):
                if root is not None and cotangent is not None and root.requires_grad:
                    roots.append(root)
                    cotangents.append(cotangent)
        return roots, cotangents


def _summed(loss: Loss, logits: Tensor, labels: Tensor) -> Tensor:
    """Σ_t loss of trial t; logits (trials · b, classes), labels (trials, b[, classes])."""
    if loss is cross_entropy:
        total = cross_entropy(logits, labels.flatten(0, 1), reduction="sum")
        return total / labels.shape[1]
    rows = logits.reshape(*labels.shape[:2], *logits.shape[1:])
    return torch.stack([loss(r, y) for r, y in zip(rows, labels, strict=True)]).sum()
