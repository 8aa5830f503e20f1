"""Whether a claim gives away whose update it was made from, or what that user's pictures share.

A claim about a user need not resemble any single picture. It is scored by what it lets a reader
infer: the user among N (re-identification), or an attribute that most of the user's pictures have.
Users are the unit of every interval; several claims about one user count as one observation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from gradleak.errors import InvalidInput
from gradleak.metrics.statistics import (
    Interval,
    clustered_rate,
    excess_risk_interval,
    sign_test,
)

Embedding = Callable[[Tensor], Tensor]
"""Inputs (n, *shape) -> (n, d)."""
Classify = Callable[[Tensor], Tensor]
"""Inputs (n, *shape) -> (n,) int64."""


@dataclass(frozen=True, slots=True)
class UserRate:
    """A share of claims that give something away, beside what they would without the update.

    Attributes:
        rate: of the claims about the user whose update they were made from.
        interval: Clopper-Pearson's, a user counting as one observation.
        control: of the same claims about the next user, whose update they never saw.
        control_interval: likewise.
        excess: interval of (rate - control) / (1 - control).
        p: one-sided, of the sign test over users that the rate exceeds the control.
        chance: of a guess.
        claims: their number.
        users: their number.
    """

    rate: float
    interval: Interval
    control: float
    control_interval: Interval
    excess: Interval
    p: float
    chance: float
    claims: int
    users: int


def gallery(pictures: Sequence[Tensor], embed: Embedding) -> Tensor:
    """Mean over each user's pictures (m, *shape) of their embeddings of length 1: (N, d)."""
    if not pictures or any(not len(each) for each in pictures):
        raise InvalidInput("a gallery without pictures: expected at least one of every user")
    return torch.stack([_unit(embed(each)).mean(0) for each in pictures])


def similarity(claims: Tensor, known: Tensor, embed: Embedding) -> Tensor:
    """Cosine of the embedding of every claim (n, *shape) to every row of a gallery: (n, N)."""
    return _unit(embed(claims)) @ _unit(known).T


def ranks(likeness: Tensor, users: Tensor) -> Tensor:
    """Place of the right user among all, by likeness: 1 is the most alike.

    Ties count against the attack, and so does a claim that is alike to nobody (NaN).

    Args:
        likeness: (n, N), of claims and users.
        users: (n,) int64, the right one of every claim.

    Returns:
        (n,) int64 from 1 to N.
    """
    count, width = likeness.shape if likeness.ndim == 2 else (-1, 0)
    if users.shape != (count,) or not bool(((users >= 0) & (users < width)).all()):
        raise InvalidInput(
            f"likeness {tuple(likeness.shape)} and users {tuple(users.shape)}: expected (n, N) "
            "and n whole numbers from 0 to N - 1"
        )
    own = likeness.gather(1, users[:, None])
    return (~(likeness < own)).sum(1)


def reidentification(
    likeness: Tensor, users: Tensor, *, k: int = 1, confidence: float = 0.95
) -> UserRate:
    """Share of claims whose user is among the k most alike of N; chance is k / N.

    Args:
        likeness: (n, N), see `similarity`.
        users: (n,) int64, whose update every claim was made from.
        k: 1 to N - 1.
        confidence: of the intervals.
    """
    width = likeness.shape[1]
    if not 1 <= k < width:
        raise InvalidInput(f"rank {k} among {width} users: expected 1 to {width - 1}")
    hits = ranks(likeness, users) <= k
    others = ranks(likeness, (users + 1) % width) <= k
    return _rate(hits, others, users, chance=k / width, confidence=confidence)


def majority(attributes: Sequence[Tensor]) -> Tensor:
    """The most frequent attribute of each user, the smallest of equals: (N,) int64."""
    if any(not len(each) for each in attributes):
        raise InvalidInput("a user without pictures: expected at least one attribute of each")
    return torch.stack([torch.bincount(each).argmax() for each in attributes])


def attribute_inference(
    claims: Tensor,
    users: Tensor,
    attributes: Tensor,
    classify: Classify,
    *,
    chance: float,
    confidence: float = 0.95,
) -> UserRate:
    """Share of claims in which a classifier sees the attribute of their user.

    The control reads every claim as one about the next user *whose attribute differs*: an attribute
    that many users share would otherwise count as a hit of the control.

    Args:
        claims: (n, *shape); one with a non-finite entry is a miss.
        users: (n,) int64, whose update every claim was made from.
        attributes: (N,) int64, of every user; at least two differ.
        classify: one that has no part in the attack.
        chance: of a guess that knows what the attacker is told anyway.
        confidence: of the intervals.
    """
    if len(torch.unique(attributes)) < 2:
        raise InvalidInput("all users share their attribute: expected at least two attributes")
    finite = claims.flatten(1).isfinite().all(1)
    found = classify(claims.nan_to_num(0.0, 0.0, 0.0))
    total = len(attributes)
    others = []
    for user in users.tolist():
        later = [(user + shift) % total for shift in range(1, total)]
        others.append(next(u for u in later if attributes[u] != attributes[user]))
    hits = (found == attributes[users]) & finite
    wrong = (found == attributes[torch.tensor(others)]) & finite
    return _rate(hits, wrong, users, chance=chance, confidence=confidence)


def _rate(
    hits: Tensor, others: Tensor, users: Tensor, *, chance: float, confidence: float
) -> UserRate:
    own, control = (_by_user(each, users) for each in (hits, others))
    return UserRate(
        rate=float(hits.double().mean()),
        interval=clustered_rate(own, confidence=confidence),
        control=float(others.double().mean()),
        control_interval=clustered_rate(control, confidence=confidence),
        excess=excess_risk_interval(own, control, confidence=confidence),
        p=sign_test(own, control),
        chance=chance,
        claims=len(users),
        users=len(torch.unique(users)),
    )


def _by_user(hits: Tensor, users: Tensor) -> list[list[float]]:
    return [hits[users == user].double().tolist() for user in torch.unique(users)]


def _unit(rows: Tensor) -> Tensor:
    return F.normalize(rows.double(), dim=1)
