"""What any secure aggregation should do, checked from outside.

An `Implementation` adapts one to a round of vectors and dropouts; `examine` holds it to every law.
Of this package it is `Rehearsed`. Statistical laws reject a sound one with probability < 1e-6.
"""

from __future__ import annotations

import itertools
import random
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.special import chdtrc

from gradleak.crypto.encoding import Encoding, FixedPoint, Reals
from gradleak.crypto.protocol import Aggregation, Envelope, Total
from gradleak.crypto.rehearsal import rehearse, terms_for
from gradleak.crypto.rejection import Aborted
from gradleak.crypto.wire import decode
from gradleak.errors import GradleakError

ALPHA = 1e-9
"""Level of one statistical comparison; a law makes fewer than 1000."""

LENGTH = 4096
"""Entries of the vectors that statistical laws look at."""

Unsigned = NDArray[np.unsignedinteger[Any]]


class Broken(GradleakError):
    """A law that does not hold, with the case that shows it."""


@dataclass(frozen=True, eq=False)
class Played:
    """A round as the server sees it.

    Attributes:
        total: what it learns.
        hidden: by client, the words in which it received that client's vector.
    """

    total: Total
    hidden: Mapping[int, Unsigned]


class Implementation(Protocol):
    """An adapter: what is examined."""

    @property
    def clients(self) -> int:
        """How many take part, numbered from 0."""
        ...

    @property
    def steps(self) -> int:
        """Exchanges of a round."""
        ...

    @property
    def survives(self) -> int:
        """Dropouts, at whichever steps, that a round must survive."""
        ...

    @property
    def modulus(self) -> int:
        """Hidden words are uniform below this; 0 where they are a ciphertext of another form."""
        ...

    @property
    def tolerance(self) -> float:
        """Largest error of an entry of a sum of small integers."""
        ...

    def play(self, vectors: Mapping[int, Reals], drops: Mapping[int, int]) -> Played:
        """One round; `drops` names the step from which on a client no longer answers.

        Raises:
            Aborted: too few are left.
        """
        ...


@dataclass(frozen=True)
class Rehearsed:
    """A protocol of this package, played in one process.

    Args:
        aggregation: the protocol.
        clients: how many.
        survives: dropouts that its parameters allow.
        modulus: of its words; what it sends as bytes is taken modulo 256.
        tolerance: largest error of an entry.
        encoding: reals to integers.
    """

    aggregation: Aggregation
    clients: int
    survives: int
    modulus: int
    tolerance: float = 0.0
    encoding: Encoding = field(default_factory=FixedPoint)

    @property
    def steps(self) -> int:
        """Of its server."""
        vectors = {n: np.zeros(1) for n in range(self.clients)}
        return len(self.aggregation.server(terms_for(vectors, self.encoding)).steps)

    def play(self, vectors: Mapping[int, Reals], drops: Mapping[int, int]) -> Played:
        """One rehearsal."""
        terms = terms_for(vectors, self.encoding)
        kinds = [step.reply for step in self.aggregation.server(terms).steps]
        hidden: dict[int, Unsigned] = {}

        def look(step: int, sender: int, raw: bytes) -> bytes:
            for found in _contents(decode(kinds[step], decode(Envelope, raw).body)):
                if found.nbytes > (hidden[sender].nbytes if sender in hidden else 0):
                    hidden[sender] = found
            return raw

        total, _ = rehearse(self.aggregation, vectors, terms=terms, drops=drops, up=look)
        return Played(total, {n: words for n, words in hidden.items() if n in vectors})


def _contents(message: object) -> Iterator[Unsigned]:
    """The vectors of a message, and its letters as bytes."""
    for value in vars(message).values():
        items = list(value.values()) if isinstance(value, dict) else [value]
        if items and all(isinstance(item, bytes) for item in items):
            yield np.frombuffer(b"".join(items), np.uint8)
        elif items and all(isinstance(item, np.ndarray) for item in items):
            yield np.concatenate(items)


def exact(subject: Implementation) -> None:
    """No dropout, or as many as it must survive at whichever steps: the exact sum of the others.

    Every client at every step alone, then 20 mixed sets of the largest size.
    """
    n, draw = subject.clients, np.random.default_rng(1)
    cases: list[dict[int, int]] = [{}]
    if subject.survives:
        cases += [{c: s} for s in range(subject.steps) for c in range(n)]
        for _ in range(20):
            gone = draw.choice(n, subject.survives, replace=False)
            cases.append({int(c): int(draw.integers(subject.steps)) for c in gone})
    for drops in cases:
        try:
            _right(subject, drops)
        except Aborted as error:
            raise Broken(
                f"dropouts {drops}: no sum, though it must survive them: {error}"
            ) from None


def never_wrong(subject: Implementation) -> None:
    """More dropouts than it must survive: an abort or an exact sum.

    At every step, every number of clients beyond the limit, and 20 mixed sets.
    """
    n, draw = subject.clients, np.random.default_rng(2)
    beyond = range(subject.survives + 1, n + 1)
    cases = [dict.fromkeys(range(k), s) for s in range(subject.steps) for k in beyond]
    for _ in range(20):
        gone = draw.choice(n, int(draw.choice(beyond)), replace=False)
        cases.append({int(c): int(draw.integers(subject.steps)) for c in gone})
    for drops in cases:
        try:
            _right(subject, drops)
        except Aborted:
            continue


def _right(subject: Implementation, drops: Mapping[int, int]) -> None:
    draw = np.random.default_rng(3)
    vectors = {c: draw.integers(-3, 4, 7).astype(float) for c in range(subject.clients)}
    total = subject.play(vectors, drops).total
    if lost := set(vectors) - set(drops) - set(total.clients):
        raise Broken(f"dropouts {drops}: clients {sorted(lost)} answered and are not in the sum")
    error = np.abs(total.values - sum(vectors[c] for c in total.clients)).max()
    if not error <= subject.tolerance:
        raise Broken(f"dropouts {drops}: a wrong sum, off by {error:.3g}")


def uniform(subject: Implementation) -> None:
    """What hides a vector of zeros is uniform: χ² of each word's high and low byte, by client."""
    if not subject.modulus:
        return
    for client, words in _zeros(subject).items():
        _uniform(words, subject.modulus, f"client {client}'s words")


def fresh(subject: Implementation) -> None:
    """Two rounds over the same vectors have nothing in common: differences are uniform too."""
    first, second = _zeros(subject), _zeros(subject)
    for (a, x), (b, y) in itertools.product(first.items(), second.items()):
        _unlike(x, y, subject.modulus, f"client {a}'s words in one round, {b}'s in the next")
    for (a, x), (b, y) in itertools.combinations(first.items(), 2):
        _unlike(x, y, subject.modulus, f"clients {a} and {b} in one round")


def unseeded(subject: Implementation) -> None:
    """The same with Python's, numpy's and torch's global generators set to one state before each.

    Their states are as before afterwards.
    """
    python, legacy = random.getstate(), np.random.get_state()
    torch: Any = sys.modules.get("torch")
    before = torch.get_rng_state() if torch else None
    rounds = []
    try:
        for _ in range(2):
            random.seed(0)
            np.random.seed(0)
            if torch:
                torch.manual_seed(0)
            rounds.append(_zeros(subject))
    finally:
        random.setstate(python)
        np.random.set_state(legacy)
        if torch:
            torch.set_rng_state(before)
    for client, words in rounds[0].items():
        where = f"client {client}'s words under one state of the seeded generators"
        _unlike(words, rounds[1][client], subject.modulus, where)


def _zeros(subject: Implementation) -> Mapping[int, Unsigned]:
    return subject.play({c: np.zeros(LENGTH) for c in range(subject.clients)}, {}).hidden


def _unlike(x: Unsigned, y: Unsigned, modulus: int, where: str) -> None:
    if np.array_equal(x, y):
        raise Broken(f"{where}: the same")
    if modulus and x.shape == y.shape:
        whole = x.astype(np.uint64) - y.astype(np.uint64)  # modulo 2⁶⁴
        whole[x < y] += np.uint64(_size(x, modulus) % 2**64)
        _uniform(whole.astype(x.dtype), modulus, f"{where}: differences")


def _uniform(words: Unsigned, modulus: int, where: str) -> None:
    size = _size(words, modulus)
    if (over := int((words > size - 1).sum())) > 0:
        raise Broken(f"{where}: {over} words are not below {size}")
    high = np.minimum(words / size * 256, 255).astype(np.int64)
    for name, byte in (("high", high), ("low", (words & 255).astype(np.int64))):
        counts = np.bincount(byte, minlength=256)
        expected = len(words) / 256
        if (p := chdtrc(255, float(((counts - expected) ** 2).sum() / expected))) < ALPHA:
            raise Broken(f"{where}: {name} bytes are not uniform, n={len(words)}, p={p:.1e}")


def _size(words: Unsigned, modulus: int) -> int:
    return 256 if words.dtype == np.uint8 else modulus


LAWS: Mapping[str, Callable[[Implementation], None]] = {
    law.__name__: law for law in (exact, never_wrong, uniform, fresh, unseeded)
}


def examine(subject: Implementation) -> dict[str, str]:
    """What is wrong, by law; an empty string where it holds."""
    found = dict.fromkeys(LAWS, "")
    for name, law in LAWS.items():
        try:
            law(subject)
        except Broken as fault:
            found[name] = str(fault)
    return found


def whole_seed(expand: Callable[[bytes], Unsigned], *, size: int = 32) -> None:
    """Return if every bit of a seed counts for the mask made of it.

    Flips each bit alone, and each with the same bit of the next 32-bit word: a fold to 32 bits
    or fewer undoes the latter.

    Raises:
        Broken: two seeds give one mask.
    """
    seen: dict[bytes, int] = {}
    for flips in (
        0,
        *(1 << k for k in range(8 * size)),
        *((1 << k) + (1 << k + 32) for k in range(32)),
    ):
        mask = expand(flips.to_bytes(size, "little")).tobytes()
        if mask in seen:
            raise Broken(f"seeds {seen[mask]:#x} and {flips:#x} give one mask")
        seen[mask] = flips


def learnt(inputs: NDArray[Any], views: NDArray[Any], modulus: int) -> int:
    """How many linear combinations of the inputs a view determines linearly, besides constants.

        rank X + rank V − rank [X V]   over the prime field; over F₂, of low bits, where m = 2^k

    Args:
        inputs: the honest clients' encoded entries, uniform, shape `(rounds, a)`.
        views: all that a coalition and the server hold, shape `(rounds, b)`; rounds > a + b + 30,
            so that what is no law of the protocol holds in all with probability < 2⁻³⁰.
        modulus: a prime or a power of two.
    """
    prime = 2 if modulus & (modulus - 1) == 0 else modulus
    x = _centre(inputs, prime)
    v = _centre(views, prime)
    return _rank(x, prime) + _rank(v, prime) - _rank(np.concatenate([x, v], axis=1), prime)


def _centre(rows: NDArray[Any], prime: int) -> NDArray[Any]:
    whole = np.array([[int(e) % prime for e in row] for row in rows], dtype=object)
    return (whole[1:] - whole[:1]) % prime


def _rank(matrix: NDArray[Any], prime: int) -> int:
    """By elimination, with Python integers."""
    rows, rank = matrix.copy(), 0
    for column in range(rows.shape[1]):
        below = np.flatnonzero(rows[rank:, column])
        if not len(below):
            continue
        rows[[rank, rank + below[0]]] = rows[[rank + below[0], rank]]
        rows[rank] = rows[rank] * pow(int(rows[rank, column]), -1, prime) % prime
        rows[rank + 1 :] = (
            rows[rank + 1 :] - np.outer(rows[rank + 1 :, column], rows[rank])
        ) % prime
        rank += 1
        if rank == len(rows):
            break
    return rank
