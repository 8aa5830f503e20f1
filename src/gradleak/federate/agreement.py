"""What server and clients of a secure sum agree on beforehand, and how a mean becomes a sum."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from flwr.app import ConfigRecord, RecordDict

from gradleak.crypto import Aggregation, FixedPoint, Terms, Total
from gradleak.crypto.encoding import Reals
from gradleak.crypto.protocol import SESSION
from gradleak.errors import InvalidInput
from gradleak.federate.weights import STATISTICS, Weights
from gradleak.mechanisms.client import check_positive
from gradleak.registry import describe
from gradleak.types import UpdateKind

LETTER = "gradleak.secure_sum"
"""Record of a message with a step of the protocol."""

DIGEST = 32
"""Bytes of a digest."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Agreement:
    """The terms of all sessions of a training; neither side takes them from the other.

        x_i = (w_i clamp(u_i, ±clip), w_i clip),   w_i = min(n_i, most) / most
        mean = Σ w_i u_i / Σ w_i

    is what a client's vector holds and what the server makes of the vectors' sum, for updates u_i
    of n_i examples. A weight is rounded to 1 in clip·2^fraction, and is at least that.

    Attributes:
        aggregation: the protocol.
        encoding: of the vectors.
        most_examples: more count as so many.
        least: fewest clients of a session and of a sum.
        attempts: sessions over the same broadcast.
        kind: "delta" where the app replies weights; "gradient" where it replies gradients.
    """

    aggregation: Aggregation
    encoding: FixedPoint
    most_examples: int
    least: int
    attempts: int
    kind: UpdateKind

    def __post_init__(self) -> None:
        check_positive(most_examples=self.most_examples, attempts=self.attempts)
        if self.least < 2:
            raise InvalidInput(f"a sum of {self.least}: expected at least 2 clients")

    @property
    def text(self) -> str:
        """The terms in words, which both sides compare."""
        return (
            f"{describe(self.aggregation)}, {self.encoding}, at most {self.most_examples} "
            f"examples, at least {self.least} clients, {self.attempts} attempts, {self.kind}"
        )

    def terms(self, nonce: bytes, clients: tuple[int, ...], *, length: int, digest: bytes) -> Terms:
        """Terms of a session, whose name depends on all that its members must see alike.

        Clients who are sent other parameters, other settings or other members are in another
        session: their letters to one another are not authentic there, and no sum is made.
        """
        seen = repr((nonce, self.text, clients, length, digest)).encode()
        return Terms(hashlib.sha256(seen).digest()[:SESSION], clients, length, self.encoding)

    def check(self, clients: int, before: Weights) -> None:
        """Return if the protocol can sum so many clients' changes of the server's tensors.

        Raises:
            InvalidInput: it cannot.
        """
        if clients < self.least:
            raise InvalidInput(f"a sum over {clients} clients: expected at least {self.least}")
        self.aggregation.check(
            self.terms(
                bytes(SESSION), tuple(range(clients)), length=self.length(before), digest=b""
            )
        )

    def vector(self, before: Weights, after: Weights, *, examples: float) -> Reals:
        """A client's vector, from the server's tensors and the app's.

        Raises:
            InvalidInput: names or shapes differ, or a number is not finite or not positive.
        """
        if not 0 < examples < math.inf:
            raise InvalidInput(f"num-examples={examples}: expected a positive number")
        bound, clip = self.encoding.bound, self.encoding.clip
        weight = max(1, round(bound * min(examples / self.most_examples, 1))) / bound
        update = np.concatenate([v.numpy().ravel() for v in self._update(before, after).values()])
        inside = np.clip(update, -clip, clip)
        clipped = int((inside != update).sum())
        level = logging.WARNING if clipped > 0.01 * len(update) else logging.INFO
        _log.log(level, "%d of %d numbers were clipped to ±%g", clipped, len(update), clip)
        return np.append(inside * weight, clip * weight)

    def mean(self, total: Total, before: Weights) -> tuple[Weights, float]:
        """What the server's strategy would have made of the clients' replies, and their examples.

        Raises:
            InvalidInput: the sum is none of vectors within the clip.
        """
        clients, clip = len(total.clients), self.encoding.clip
        weight = float(total.values[-1]) / clip
        if not 0 < weight < clients * 1.001:  # some protocols compute with real numbers
            raise InvalidInput(
                f"sum of weights {weight:g} of {clients} clients: not one of weights"
            )
        values, at, made = total.values[:-1] / weight, 0, {}
        for name, old in self._numbers(before).items():
            mean = torch.from_numpy(values[at : (at := at + old.numel())]).reshape(old.shape)
            made[name] = (old.double() + mean if self.kind == "delta" else mean).to(old.dtype)
        whole = before if self.kind == "delta" else {}
        return whole | made, round(weight * self.most_examples)

    def length(self, before: Weights) -> int:
        """Of the vectors: the numbers that are summed, and a weight."""
        return sum(v.numel() for v in self._numbers(before).values()) + 1

    def _numbers(self, before: Weights) -> Weights:
        """The server's floating-point tensors; gradients have no running estimates."""
        floats = {k: v for k, v in before.items() if v.is_floating_point()}
        if self.kind == "delta":
            return floats
        return {k: v for k, v in floats.items() if not k.endswith(STATISTICS)}

    def _update(self, before: Weights, after: Weights) -> Weights:
        """The change of every floating-point tensor; gradients that are not replied are zero."""
        names = self._numbers(before)
        strange = after.keys() - before.keys()
        missing = names.keys() - after.keys() if self.kind == "delta" else set()
        if strange or missing:
            raise InvalidInput(
                f"the reply's names differ from the server's: missing {sorted(missing)[:3]}, "
                f"unknown {sorted(strange)[:3]}"
            )
        update = {}
        for name, old in names.items():
            new = after.get(name, torch.zeros_like(old))
            if new.shape != old.shape:
                raise InvalidInput(
                    f"{name!r} is {tuple(new.shape)} in the reply: expected {tuple(old.shape)}"
                )
            update[name] = new.double() - (old.double() if self.kind == "delta" else 0)
            if not bool(update[name].isfinite().all()):
                raise InvalidInput(f"{name!r} holds NaN or infinite values after training")
        return update


def fixed_point(clip: float, bits: int) -> FixedPoint:
    """The finest encoding of numbers up to `clip` in so many bits, sign included.

    Raises:
        InvalidInput: there is none.
    """
    check_positive(clip=clip, bits=bits)
    fraction = bits - 1 - math.ceil(math.log2(clip))
    return FixedPoint(math.floor(math.ldexp(clip, fraction)) * 2.0**-fraction, fraction)


def digest_of(content: RecordDict) -> bytes:
    """SHA-256 of all records of a message but the protocol's own, whatever their order."""
    parts = []
    for name in sorted(content.keys() - {LETTER}):
        record = content[name]
        if name in content.array_records:
            arrays: Mapping[str, object] = {
                k: (a.dtype, tuple(a.shape), a.stype, hashlib.sha256(a.data).digest())
                for k, a in record.items()
            }
        else:
            arrays = record
        parts.append((name, type(record).__name__, sorted(arrays.items())))
    return hashlib.sha256(repr(parts).encode()).digest()


def letter(content: RecordDict) -> ConfigRecord | None:
    """The protocol's record of a message."""
    return content.config_records.get(LETTER)
