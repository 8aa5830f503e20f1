"""Who talks to whom: every client to a server, or clients to their neighbours in a graph."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from gradleak.errors import InvalidInput
from gradleak.mechanisms.client import check_positive

Edges = tuple[tuple[int, ...], ...]
"""Neighbours of every node, sorted."""


@dataclass(frozen=True)
class Star:
    """Every client talks to the server, which sees every update."""

    id: ClassVar[str] = "star"
    attacker: ClassVar[int] = -1

    def check(self, clients: int) -> None:
        """Any number of clients will do."""


@dataclass(frozen=True)
class Gossip:
    """Clients talk to their neighbours, who see their models.

    Args:
        graph: "ring", "regular" (random, every client with `degree` neighbours) or "complete".
        degree: of "regular".
        attacker: number of the client whose view is recorded.
    """

    graph: Literal["ring", "regular", "complete"] = "ring"
    degree: int = 4
    attacker: int = 0

    id: ClassVar[str] = "gossip"

    def __post_init__(self) -> None:
        check_positive(degree=self.degree)

    def check(self, clients: int) -> None:
        """Raise `InvalidInput` where there is no such graph of so many clients."""
        if clients < 3:
            raise InvalidInput(f"gossip among {clients} clients: expected at least 3")
        if not 0 <= self.attacker < clients:
            raise InvalidInput(f"gossip:attacker={self.attacker}: expected 0 to {clients - 1}")
        if self.graph == "regular" and (
            not 2 <= self.degree < clients or clients * self.degree % 2
        ):
            raise InvalidInput(
                f"gossip:degree={self.degree}: no such graph of {clients} clients, expected 2 to "
                f"{clients - 1} and an even number of ends of edges"
            )

    def edges(self, clients: int, *, seed: int) -> Edges:
        """Neighbours of every client; connected."""
        offsets = {"ring": [1], "complete": list(range(1, clients // 2 + 1))}.get(self.graph)
        if offsets is None:
            return _regular(clients, self.degree, np.random.default_rng(seed))
        found = [{(i + d) % clients for o in offsets for d in (o, -o)} for i in range(clients)]
        return tuple(tuple(sorted(ends)) for ends in found)


def _regular(nodes: int, degree: int, draws: np.random.Generator) -> Edges:
    """A connected graph, every node with `degree` neighbours: ends of edges are paired at random.

    Pairs that are loops or doubles are paired again with ends of others until none is left.
    """
    while True:
        ends = draws.permutation(np.repeat(np.arange(nodes), degree)).reshape(-1, 2)
        for _ in range(100 * len(ends)):
            keys = np.sort(ends, axis=1) @ np.array([nodes, 1])
            _, first, counts = np.unique(keys, return_index=True, return_counts=True)
            bad = np.union1d(np.flatnonzero(ends[:, 0] == ends[:, 1]), first[counts > 1])
            if not len(bad):
                break
            a, b = int(bad[0]), int(draws.integers(len(ends)))
            ends[a, 1], ends[b, 1] = ends[b, 1], ends[a, 1]
        else:
            continue
        found: list[set[int]] = [set() for _ in range(nodes)]
        for a, b in ends.tolist():
            found[a].add(b)
            found[b].add(a)
        edges = tuple(tuple(sorted(each)) for each in found)
        if connected(edges):
            return edges


def connected(edges: Edges) -> bool:
    """Whether every node can be reached from the first."""
    seen, new = {0}, [0]
    while new:
        fresh = set(edges[new.pop()]) - seen
        seen |= fresh
        new += fresh
    return len(seen) == len(edges)


def metropolis(edges: Edges, node: int) -> dict[int, float]:
    """Weights of a node's mean over itself and its neighbours: w_ij = 1 / (1 + max(d_i, d_j)).

    The weights of all nodes are a symmetric, doubly stochastic matrix.

    Source: Xiao & Boyd, "Fast linear iterations for distributed averaging", 2004.
    """
    weights = {k: 1 / (1 + max(len(edges[node]), len(edges[k]))) for k in edges[node]}
    return {node: 1 - sum(weights.values()), **weights}


TOPOLOGIES: Mapping[str, type[Star] | type[Gossip]] = {t.id: t for t in (Star, Gossip)}
