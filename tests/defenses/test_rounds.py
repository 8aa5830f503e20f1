"""Clients that remember, protections that are told public examples, and parts at the server."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from gradleak.defenses import Clip, GaussianNoise, Wrapped, advanced, compensated, informed
from gradleak.defenses.wrapped import Mapped, Memory
from gradleak.mechanisms import FedSGD
from gradleak.types import Batch, Mechanism, ModelState, Update
from tests.laws.small import TwoTwins, batch_of, state_of, stream


@dataclass(frozen=True)
class Late:
    """Sends what it held back the round before, and adds to it what it is told."""

    told: float = 0.0

    id: ClassVar[str] = "late"
    title: ClassVar[str] = "Late"

    def __call__(self, mechanism: Mechanism) -> Mechanism:
        return _Late(mechanism, self)

    def doubt(self, before: Update, after: Update) -> tuple[str, float] | None:
        return None

    def map(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {k: v / 2 + self.told for k, v in values.items()}

    def informed(self, public: Batch) -> Self:
        return replace(self, told=float(len(public)))

    def compensated(self, values: Mapping[str, Tensor], *, clients: int) -> dict[str, Tensor]:
        return {k: v * clients for k, v in values.items()}


@dataclass(frozen=True)
class _Late(Mapped):
    def advance(
        self, state: ModelState, batch: Batch, memory: Memory, *, generator: torch.Generator
    ) -> tuple[Update, Memory]:
        clean = self.inner.sample(state, batch, generator=generator).values
        sent = self.rule.map({k: v + memory.get(k, torch.zeros_like(v)) for k, v in clean.items()})
        return Update(sent, self.kind), clean


def test_a_client_remembers_through_the_layers_around_it() -> None:
    client = GaussianNoise(std=0.1)(Clip(norm=0.5)(Late()(FedSGD())))
    state, batch = state_of(TwoTwins), batch_of(2)
    first, memory = advanced(client, state, batch, {}, generator=stream(0))
    plain = client.sample(state, batch, generator=stream(0))
    clean = FedSGD().mean(state, batch)
    for k, v in plain.values.items():
        assert torch.equal(first.values[k], v)
        assert torch.equal(memory[k], clean.values[k])
    inside = Late()(FedSGD())
    second, _ = advanced(inside, state, batch, memory, generator=stream(0))
    for k, v in clean.values.items():
        torch.testing.assert_close(second.values[k], v)


def test_a_client_that_forgets_returns_the_memory_it_was_given() -> None:
    state, batch, memory = state_of(TwoTwins), batch_of(2), {"kept": torch.ones(1)}
    update, after = advanced(Clip()(FedSGD()), state, batch, memory, generator=stream(0))
    assert after is memory
    assert update.kind == "gradient"


def test_public_examples_reach_the_layer_that_asks_for_them() -> None:
    told = informed(Clip()(Late()(FedSGD())), batch_of(3))
    assert isinstance(told, Wrapped)
    assert told.inner == Late(told=3.0)(FedSGD())


def test_the_server_undoes_the_outermost_layer_first() -> None:
    mean = Update({"w": torch.ones(2)}, "gradient")
    client = Late()(Clip()(Late()(FedSGD())))
    assert torch.equal(compensated(client, mean, clients=3).values["w"], torch.full((2,), 9.0))
