"""SecAgg: every pair of clients shares a mask (Bonawitz et al., CCS 2017)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from gradleak.crypto.masking import Masking, Rules
from gradleak.crypto.protocol import Terms
from gradleak.crypto.sheet import Sheet


@dataclass(frozen=True)
class SecAgg(Masking):
    """Masks between all pairs, and one of each client's own: see `masking`.

    Args:
        threshold: t, clients that must answer to the end, and whose shares open a secret; 0 for
            ⌊n/2⌋ + 1, or ⌊2n/3⌋ + 1 against an active server.
        active: the server may lie: keys are signed, and survivors agree on who they are.
    """

    threshold: int = 0
    active: bool = False
    id: ClassVar[str] = "secagg"
    sheet: ClassVar[Sheet] = Sheet(
        title="SecAgg",
        paper="Bonawitz et al., Practical Secure Aggregation for Privacy-Preserving Machine "
        "Learning, CCS 2017",
        link="https://eprint.iacr.org/2017/281",
        trusts="fewer than t clients collude with the server; it follows the protocol, or with "
        "active=true may lie to fewer than n/3 colluding clients' benefit",
        survives="n − t clients gone at any step",
        leaks="who took part, and the sum over those whose vectors arrived, at least t of them",
        cost="4 steps (5 if active); a client makes n masks; the server n, and n more for each "
        "client lost after sharing its keys; no ciphertext is larger than the vector",
    )

    def rules(self, terms: Terms) -> Rules:
        """All are neighbours of all."""
        n = len(terms.clients)
        threshold = self.threshold or (2 * n // 3 if self.active else n // 2) + 1
        return Rules(
            self.id, terms, self.active, threshold, threshold, peers=lambda client: terms.clients
        )
