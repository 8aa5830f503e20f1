"""LightSecAgg: masks of which everybody holds an encoded share, so that one answer undoes them.

    keys       every client publishes a public key
    shares     it draws a mask zᵢ, encodes it as N shares, and sends each sealed to its holder
    upload     it uploads yᵢ = xᵢ + zᵢ modulo p
    recovery   it returns its share of Σ zᵢ over those who uploaded

Any U answers make Σ zᵢ at once, whoever dropped out: Σ xᵢ = Σ yᵢ − Σ zᵢ.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from gradleak.crypto.coded import KEYS, SHARES, CodedParty, CodedServer, Letters, Share
from gradleak.crypto.encoding import centred
from gradleak.crypto.field import M31, M61, Residues
from gradleak.crypto.protocol import Step, Terms, Total, Vector
from gradleak.crypto.ramp import Code, field_for, lagrange_code, sizes
from gradleak.crypto.rejection import Reason, Rejected
from gradleak.crypto.sheet import Sheet
from gradleak.crypto.wire import Words


@dataclass(frozen=True)
class Masked:
    """A vector plus its mask."""

    values: Words


@dataclass(frozen=True)
class Survivors:
    """Who uploaded."""

    clients: tuple[int, ...]


STEPS = (KEYS, SHARES, Step("upload", Letters, Masked), Step("recovery", Survivors, Share))


class LightSecAggServer(CodedServer):
    id, steps = "lightsecagg", STEPS

    def __init__(self, terms: Terms, code: Code) -> None:
        super().__init__(terms, code)
        self._sum = np.zeros(terms.length, np.uint64)

    def ask(self, step: int) -> Mapping[int, object]:
        if step < 3:
            return super().ask(step)
        survivors = tuple(self.answered[2])
        return dict.fromkeys(survivors, Survivors(survivors))

    def accept(self, step: int, sender: int, reply: Any) -> None:
        if step == 2:
            field = self._code.field
            self._sum = field.add(self._sum, field.read(reply.values, self.terms.length))
        else:
            super().accept(step, sender, reply)

    def total_of(self) -> Total:
        field, clients = self._code.field, tuple(self.answered[2])
        whole = centred(field.sub(self._sum, self.recovered()), field.modulus)
        return Total(self.terms.encoding.decode(whole, clients=len(clients)), clients)


class LightSecAggParty(CodedParty):
    id, steps = "lightsecagg", STEPS

    def secret(self, seed: bytes) -> Residues:
        return self._code.field.uniform(seed, self.terms.length)

    def reply(self, step: int, request: Any) -> object:
        if step == 2:
            shares, field = self.opened(request), self._code.field
            own = field.residues(self.terms.encoding.encode(self.vector()))
            masked = field.add(own, self.secret(self._memory.seed))
            self._memory = replace(self._memory, seed=b"", shares=shares)
            return Masked(field.write(masked))
        if step == 3:
            return self.added(self._survivors(request.clients))
        return super().reply(step, request)

    def _survivors(self, clients: tuple[int, ...]) -> Mapping[int, Words]:
        """Shares of the survivors' masks, if they may be told."""
        shares = self._memory.shares
        self._enough(len(clients))
        if list(clients) != sorted(set(clients)) or self.number not in clients:
            raise Rejected(
                Reason.INCONSISTENT_SURVIVORS,
                f"survivors {clients}: expected ascending, with {self.number} among them",
            )
        if not shares.keys() >= set(clients):
            raise Rejected(
                Reason.INCONSISTENT_SURVIVORS, f"survivors {clients}: some have not shared a mask"
            )
        return {client: shares[client] for client in clients}


@dataclass(frozen=True)
class LightSecAgg:
    """LightSecAgg (So et al., MLSys 2022): U = N − D, shares of d/(U − T) words, T + D < N.

    Words are modulo 2³¹ − 1 where the sum fits, else modulo 2⁶¹ − 1.

    Args:
        privacy: T, clients that may collude with the server: a count, or below 1 a fraction.
        dropouts: D, clients that may drop out, at whatever steps: likewise.
    """

    id: ClassVar[str] = "lightsecagg"
    helpers: ClassVar[int] = 0
    sheet: ClassVar[Sheet] = Sheet(
        title="LightSecAgg",
        paper="So et al., LightSecAgg: a lightweight and versatile design for secure aggregation "
        "in federated learning, MLSys 2022",
        link="https://arxiv.org/abs/2109.14236",
        trusts="a server that keeps to the protocol and hands on keys and one list of survivors "
        "unchanged; at most T clients collude with it",
        survives="D clients at any steps, T + D < N; beyond, the round aborts",
        leaks="who took part; a client's bad letters can end a round",
        cost="4 steps; up, per client, d words and N - 1 shares of d/(N - D - T); the server "
        "decodes once, whatever the dropouts",
    )

    privacy: float = 0.5
    dropouts: float = 0.3

    def check(self, terms: Terms) -> None:
        self._code(terms)

    def server(self, terms: Terms) -> LightSecAggServer:
        return LightSecAggServer(terms, self._code(terms))

    def party(self, terms: Terms, number: int, vector: Vector | None = None) -> LightSecAggParty:
        return LightSecAggParty(terms, number, vector, self._code(terms))

    def _code(self, terms: Terms) -> Code:
        counts = sizes(len(terms.clients), self.privacy, self.dropouts)
        return lagrange_code(field_for(terms, M31, M61), counts)
