"""The laws themselves: a sound implementation passes all, and each planted fault breaks its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pytest

from gradleak.crypto import Aborted, Total
from gradleak.crypto.conformance import (
    Broken,
    Played,
    Rehearsed,
    Unsigned,
    examine,
    learnt,
    whole_seed,
)
from gradleak.crypto.encoding import Reals
from gradleak.crypto.keys import fresh, stream, words32
from tests.crypto.plain import Plain


@dataclass(frozen=True)
class Ideal:
    """A trusted third party: hides by uniform words, sums what arrives before step 1 of 3."""

    fault: str = ""
    clients: int = 5
    steps: int = 3
    survives: int = 2
    modulus: int = 2**31 - 1
    tolerance: float = 0.0

    def play(self, vectors: Mapping[int, Reals], drops: Mapping[int, int]) -> Played:
        there = tuple(c for c in vectors if drops.get(c, 3) > 0)
        most = self.survives - (self.fault == "fragile")
        if len(drops) > most and not (self.fault == "always answers"):
            raise Aborted("too few")
        if self.fault == "forgetful" and drops:
            there = there[1:]
        values = np.array(sum((vectors[c] for c in there), np.zeros(len(vectors[0]))))
        if self.fault == "always answers" and len(drops) > most:
            values = values + 1
        return Played(Total(values, there), {c: self._hide(c, len(vectors[c])) for c in there})

    def _hide(self, client: int, count: int) -> Unsigned:
        if self.fault == "seeded":
            return np.random.randint(0, self.modulus, count).astype(np.uint64)
        if self.fault == "reused":
            return words32(bytes([client]) * 32, count) % np.uint32(self.modulus)
        if self.fault == "one mask for all":
            shared = words32(fresh(), count) if client == 0 else _LAST[0]
            _LAST[:] = [shared]
            return shared % np.uint32(self.modulus)
        words = words32(fresh(), count) % np.uint32(self.modulus)
        if self.fault == "short":
            return words >> np.uint32(1)
        if self.fault == "even":
            return words & ~np.uint32(1)
        if self.fault == "over":
            return words32(fresh(), count)
        return words


_LAST: list[Unsigned] = []


def test_a_sound_implementation_holds_every_law() -> None:
    assert set(examine(Ideal()).values()) == {""}


@pytest.mark.parametrize(
    ("fault", "laws"),
    [
        ("fragile", {"exact"}),
        ("forgetful", {"exact"}),
        ("always answers", {"never_wrong"}),
        ("seeded", {"unseeded"}),
        ("reused", {"fresh", "unseeded"}),
        ("one mask for all", {"fresh"}),
        ("short", {"uniform", "fresh", "unseeded"}),
        ("even", {"uniform"}),
        ("over", {"uniform", "fresh", "unseeded"}),
    ],
)
def test_each_planted_fault_breaks_its_law(fault: str, laws: set[str]) -> None:
    assert {law for law, what in examine(Ideal(fault)).items() if what} == laws


def test_vectors_in_the_clear_break_every_law_of_privacy() -> None:
    found = examine(Rehearsed(Plain(), clients=4, survives=3, modulus=2**64))
    assert {law for law, what in found.items() if what} == {"uniform", "fresh", "unseeded"}


def test_a_folded_seed_is_found() -> None:
    def folded(seed: bytes) -> Unsigned:
        fold = np.bitwise_xor.reduce(np.frombuffer(seed, "<u4"))
        return words32(bytes(28) + fold.tobytes(), 8)

    whole_seed(lambda seed: words32(seed, 8))
    whole_seed(lambda seed: np.frombuffer(bytes(stream(seed, 32)), np.uint8))
    with pytest.raises(Broken, match="one mask"):
        whole_seed(folded)
    with pytest.raises(Broken, match="one mask"):
        whole_seed(lambda seed: words32(bytes(4) + seed[4:], 8))


@pytest.mark.parametrize("modulus", [2**31 - 1, 2**61 - 1, 2**32])
def test_what_a_view_determines_is_counted(modulus: int) -> None:
    """Three clients' x + m with Σm known: the sum alone; with one mask more, two combinations."""
    draw = np.random.default_rng(0)
    x, m = (draw.integers(0, modulus, (50, 3), dtype=np.uint64).astype(object) for _ in range(2))
    view = np.concatenate([(x + m) % modulus, m.sum(1, keepdims=True) % modulus], axis=1)
    assert learnt(x, view[:, :3], modulus) == 0
    assert learnt(x, view, modulus) == 1
    assert learnt(x, np.concatenate([view, m[:, :1]], axis=1), modulus) == 2
    assert learnt(x, np.concatenate([view, x], axis=1), modulus) == 3
