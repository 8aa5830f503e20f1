"""How a data set is divided among clients."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor

from gradleak.errors import InvalidInput
from gradleak.mechanisms.client import check_positive


class Partition(Protocol):
    """Labels of the examples -> disjoint positions of every client, which cover them."""

    def __call__(
        self, labels: Tensor, *, clients: int, generator: torch.Generator
    ) -> tuple[Tensor, ...]: ...


@dataclass(frozen=True)
class Iid:
    """Every client has its share of examples drawn alike."""

    id: ClassVar[str] = "iid"

    def __call__(
        self, labels: Tensor, *, clients: int, generator: torch.Generator
    ) -> tuple[Tensor, ...]:
        return torch.randperm(len(labels), generator=generator).tensor_split(clients)


@dataclass(frozen=True)
class Dirichlet:
    """Class by class, clients' shares are p ~ Dir(alpha, ..., alpha).

    Clients with fewer than `minimum` examples are given some of the richest client, one by one.

    Args:
        alpha: small for clients with few classes, large for clients alike.
        minimum: examples of every client.

    Source: Hsu, Qi & Brown, "Measuring the effects of non-identical data distribution for
    federated visual classification", 2019.
    """

    alpha: float = 0.5
    minimum: int = 10

    id: ClassVar[str] = "dirichlet"

    def __post_init__(self) -> None:
        check_positive(alpha=self.alpha, minimum=self.minimum)

    def __call__(
        self, labels: Tensor, *, clients: int, generator: torch.Generator
    ) -> tuple[Tensor, ...]:
        if clients * self.minimum > len(labels):
            raise InvalidInput(
                f"dirichlet:minimum={self.minimum}: {clients} clients have {len(labels)} examples "
                "together"
            )
        draws = np.random.default_rng(generator.initial_seed())
        parts: list[list[int]] = [[] for _ in range(clients)]
        for label in np.unique(labels.numpy()):
            own = draws.permutation(np.flatnonzero(labels.numpy() == label))
            shares = draws.dirichlet([self.alpha] * clients)
            cuts = (shares.cumsum()[:-1] * len(own)).astype(int)
            for part, piece in zip(parts, np.split(own, cuts), strict=True):
                part.extend(piece.tolist())
        while len(poorest := min(parts, key=len)) < self.minimum:
            richest = max(parts, key=len)
            poorest.append(richest.pop(int(draws.integers(len(richest)))))
        return tuple(torch.tensor(draws.permutation(part)) for part in parts)


PARTITIONS: Mapping[str, type[Partition]] = {p.id: p for p in (Iid, Dirichlet)}
