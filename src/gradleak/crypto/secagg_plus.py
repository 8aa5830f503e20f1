"""SecAgg+: masks between few neighbours only (Bell et al., CCS 2020)."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from math import ceil, comb, floor, prod
from typing import ClassVar

import numpy as np

from gradleak.crypto.keys import words64
from gradleak.crypto.masking import Masking, Rules
from gradleak.crypto.protocol import Terms
from gradleak.crypto.sheet import Sheet
from gradleak.errors import InvalidInput

PRIVATE, EXACT = 2.0**-40, 2.0**-30
"""Largest probabilities that a graph hides somebody too little, and that it needs too many."""


@cache
def degree(clients: int, colluding: int, dropouts: int) -> tuple[int, int]:
    """The fewest neighbours k, even or all n − 1, and the threshold t of k + 1 shares to go with.

    Clients stand in a random ring, each with the k/2 next on either side. With c colluding and d
    lost, over the choice of the ring and by union bounds:

        n·P[≥ t of k neighbours collude] ≤ 2⁻⁴⁰,    n·P[< t of k neighbours are left] ≤ 2⁻³⁰,
        n·P[k/2 in a row collude or are lost] ≤ 2⁻⁴⁰ (else honest survivors are connected)

    Source: after Bell et al., CCS 2020; the tails are exact hypergeometric ones.

    Raises:
        InvalidInput: not even all neighbours suffice.
    """
    for k in range(2, clients - 1, 2):
        gone = colluding + dropouts
        row = prod(max(gone - i, 0) / (clients - i) for i in range(k // 2))
        if clients * row > PRIVATE:
            continue
        t = k // 2 + 1
        while t <= k and clients * _tail(clients - 1, colluding, k, t) > PRIVATE:
            t += 1
        if clients * _tail(clients - 1, dropouts, k, k - t + 1) <= EXACT:
            return k, t
    t = max(clients // 2, colluding) + 1
    if t > clients - dropouts:
        raise InvalidInput(
            f"{colluding} colluding and {dropouts} lost of {clients} clients: expected at least "
            f"{t} to be left"
        )
    return clients - 1, t


def _tail(others: int, marked: int, drawn: int, least: int) -> float:
    """P[at least so many of those drawn without replacement are marked]."""
    ways = sum(
        comb(marked, i) * comb(others - marked, drawn - i)
        for i in range(least, min(marked, drawn) + 1)
    )
    return ways / comb(others, drawn)


@dataclass(frozen=True)
class SecAggPlus(Masking):
    """SecAgg over a random ring in which each client has k neighbours.

    The ring follows from the session's name, so all know it and nobody needs to be told; who could
    choose among names could choose the ring, so the name must not be the server's choice alone.

    Args:
        neighbours: k, even or n − 1; 0 for the fewest that `degree` allows.
        threshold: t of the k + 1 shares; 0 for the least that `degree` allows, or for more than
            half of them where the neighbours are given.
        colluding: largest share of clients that collude with the server.
        dropouts: largest share of clients that may be lost; with more, there is no sum.
        active: the server may lie: keys are signed, and survivors agree on who they are.
    """

    neighbours: int = 0
    threshold: int = 0
    colluding: float = 0.1
    dropouts: float = 0.3
    active: bool = False
    id: ClassVar[str] = "secagg-plus"
    sheet: ClassVar[Sheet] = Sheet(
        title="SecAgg+",
        paper="Bell et al., Secure Single-Server Aggregation with (Poly)Logarithmic Overhead, "
        "CCS 2020",
        link="https://eprint.iacr.org/2020/704",
        trusts="the server follows the protocol, with the colluding share of clients on its side, "
        "chosen before the ring; with active=true it may lie",
        survives="the stated share of clients gone at any step, but for a chance of 2⁻³⁰",
        leaks="who took part, and the sum over those whose vectors arrived",
        cost="4 steps (5 if active); a client makes k + 1 masks; the server n, and k more for each "
        "client lost after sharing its keys; k grows with log n",
    )

    def __post_init__(self) -> None:
        for name in ("colluding", "dropouts"):
            if not 0 <= getattr(self, name) < 1:
                raise InvalidInput(f"{name}={getattr(self, name)}: expected 0 ≤ share < 1")
        if self.threshold and not self.neighbours:
            raise InvalidInput("threshold without neighbours: expected both or the first alone")

    def rules(self, terms: Terms) -> Rules:
        """Neighbours are the next k/2 either way in the session's ring."""
        n = len(terms.clients)
        lost = floor(self.dropouts * n)
        if self.neighbours:
            k, threshold = self.neighbours, self.threshold or (self.neighbours + 1) // 2 + 1
        else:
            k, threshold = degree(n, ceil(self.colluding * n), lost)
        if (k % 2 and k != n - 1) or not 1 <= k <= n - 1:
            raise InvalidInput(f"neighbours={k}: expected an even number below {n}, or {n - 1}")
        seed = hashlib.sha256(self.id.encode() + terms.session).digest()
        ring = [terms.clients[i] for i in np.argsort(words64(seed, n), kind="stable")]
        place = {client: i for i, client in enumerate(ring)}

        @cache
        def peers(client: int) -> tuple[int, ...]:
            if k == n - 1:
                return terms.clients
            i = place[client]
            return tuple(sorted(ring[(i + j) % n] for j in range(-(k // 2), k // 2 + 1)))

        return Rules(self.id, terms, self.active, threshold, n - lost, peers)
