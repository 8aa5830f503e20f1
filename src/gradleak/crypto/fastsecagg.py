"""FastSecAgg: the vectors themselves are shared, by a Fourier transform over a prime field.

    keys     every client publishes a public key
    shares   it shares its vector as N shares, and sends each sealed to its holder
    sums     it returns the sum of the shares that it holds

Any U answers make the sum. Who has shared is in it, though it drop out afterwards.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from gradleak.crypto.coded import KEYS, SHARES, CodedParty, CodedServer, Letters, Share
from gradleak.crypto.encoding import centred
from gradleak.crypto.field import Residues
from gradleak.crypto.ntt import N31, N50
from gradleak.crypto.protocol import Step, Terms, Total, Vector
from gradleak.crypto.ramp import Code, field_for, sizes, spectral_code
from gradleak.crypto.sheet import Sheet

STEPS = (KEYS, SHARES, Step("sums", Letters, Share))


class FastSecAggServer(CodedServer):
    id, steps = "fastsecagg", STEPS

    def total_of(self) -> Total:
        clients = tuple(self.answered[1])
        whole = centred(self.recovered(), self._code.field.modulus)
        return Total(self.terms.encoding.decode(whole, clients=len(clients)), clients)


class FastSecAggParty(CodedParty):
    id, steps = "fastsecagg", STEPS

    def secret(self, seed: bytes) -> Residues:
        return self._code.field.residues(self.terms.encoding.encode(self.vector()))

    def reply(self, step: int, request: Any) -> object:
        return self.added(self.opened(request)) if step == 2 else super().reply(step, request)


@dataclass(frozen=True)
class FastSecAgg:
    """FastSecAgg (Kadhe et al., 2020) with packed Shamir sharing: U = N − D, T + D < N.

    A vector is S = U − T blocks; those, T random ones and zeros are the spectrum whose number-
    theoretic transform are the shares. The paper sets the zeros on a grid, so that a product
    code's rows and columns decode each other in turn from *random* dropouts, in O(n log n); here
    they are the upper end of the spectrum, so that *any* D dropouts are survived, and decoding is
    one product with a matrix, S·U per word of a share. Words are modulo 15·2²⁷ + 1 where the sum
    fits, else modulo a prime of 50 bits.

    Args:
        privacy: T, clients that may collude with the server: a count, or below 1 a fraction.
        dropouts: D, clients that may drop out, at whatever steps: likewise.
    """

    id: ClassVar[str] = "fastsecagg"
    helpers: ClassVar[int] = 0
    sheet: ClassVar[Sheet] = Sheet(
        title="FastSecAgg",
        paper="Kadhe et al., FastSecAgg: scalable secure aggregation for privacy-preserving "
        "federated learning, 2020",
        link="https://arxiv.org/abs/2009.11248",
        trusts="a server that keeps to the protocol and hands on keys and letters unchanged; at "
        "most T clients collude with it",
        survives="D clients at any steps, T + D < N; beyond, the round aborts",
        leaks="who took part; a client's bad letters can end a round",
        cost="3 steps; up, per client, N - 1 shares of d/(N - D - T) words; the server decodes "
        "once, whatever the dropouts",
    )

    privacy: float = 0.5
    dropouts: float = 0.3

    def check(self, terms: Terms) -> None:
        self._code(terms)

    def server(self, terms: Terms) -> FastSecAggServer:
        return FastSecAggServer(terms, self._code(terms))

    def party(self, terms: Terms, number: int, vector: Vector | None = None) -> FastSecAggParty:
        return FastSecAggParty(terms, number, vector, self._code(terms))

    def _code(self, terms: Terms) -> Code:
        counts = sizes(len(terms.clients), self.privacy, self.dropouts)
        return spectral_code(field_for(terms, N31, N50), counts)
