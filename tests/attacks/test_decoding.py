"""Decoding encodings: every step against brute force, and the whole chain where time allows."""

from __future__ import annotations

from itertools import combinations, product

import pytest
import torch
from torch import Tensor

from gradleak import metrics
from gradleak.attacks.decoding import _assigned, _factors, _Solution, decode
from gradleak.data import load
from gradleak.defenses import InstaHide, MixUp
from gradleak.errors import InvalidInput
from gradleak.models import build
from gradleak.types import Batch, ModelState
from tests.laws.small import TwoTwins, batch_of, state_of, stream

STATE = state_of(TwoTwins)


def test_assignment_is_the_best_of_all_balanced_ones() -> None:
    """Six encodings of two of three images, each image in four: all 3⁶ by brute force."""
    scores = torch.rand((6, 3), generator=stream(0))
    pairs = list(combinations(range(3), 2))

    def worth(choice: tuple[int, ...]) -> float:
        used = torch.bincount(torch.tensor([j for p in choice for j in pairs[p]]), minlength=3)
        if int(used.max()) > 4:
            return -1.0
        return sum(float(scores[i, list(pairs[p])].sum()) for i, p in enumerate(choice))

    best = max(worth(choice) for choice in product(range(3), repeat=6))
    members = _assigned(scores, 2)
    assert float(scores.gather(1, members).sum()) == pytest.approx(best)


def test_factors_find_overlapping_groups() -> None:
    held = torch.zeros(30, 5)
    for i, (a, b) in enumerate(list(combinations(range(5), 2)) * 3):
        held[i, [a, b]] = 1.0
    sharing = (held @ held.T > 0).float()
    members = _assigned(_factors(sharing, 5, stream(1)), 2)
    found = torch.zeros(30, 5).scatter_(1, members, 1.0)
    overlap = found.T @ held
    assert (overlap.max(1).values == 12).all()  # every column is one image, and complete
    assert len(overlap.argmax(1).unique()) == 5


def solution(rule: MixUp | InstaHide, encodings: Batch) -> _Solution:
    signed = isinstance(rule, InstaHide)
    seen = (2 * encodings.inputs - 1).float()
    shape = seen.shape[1:]
    return _Solution(
        seen.abs() if signed else seen,
        encodings.labels.float(),
        torch.zeros(shape),
        torch.full(shape, 0.3),
        rule.images,
        signed,
    )


def blends(rule: MixUp | InstaHide, rounds: int) -> tuple[Tensor, Batch, Tensor]:
    """Four images that are classes of their own, encoded; and who is in which encoding."""
    images = batch_of(4).inputs
    source, named = stream(2), Batch(images, torch.eye(4, dtype=torch.float64))
    made = [rule.encode(STATE, named, source) for _ in range(rounds)]
    encodings = Batch(torch.cat([b.inputs for b in made]), torch.cat([b.labels for b in made]))
    own = 2
    return images, encodings, encodings.labels.topk(own, 1).indices


def test_blends_with_known_labels_are_undone_exactly() -> None:
    images, encodings, members = blends(MixUp(images=2, first=1), rounds=10)
    found, objective = solution(MixUp(images=2), encodings).images(members, 4)
    assert objective < 1e-9
    torch.testing.assert_close((found + 1) / 2, images.float(), rtol=0, atol=1e-4)


def test_signs_are_undone_up_to_one_sign_for_all() -> None:
    rule = InstaHide(images=2, private=2)
    images, encodings, members = blends(rule, rounds=40)
    found, objective = solution(rule, encodings).images(members, 4)
    gap = ((found.abs() - (2 * images - 1).abs()) ** 2).mean()
    guess = ((2 * images - 1).abs() - 0.5).square().mean()
    assert gap < guess / 2
    assert objective < 0.05


def test_too_few_encodings_are_refused_in_one_line() -> None:
    one = Batch(torch.rand(3, 1, 4, 4), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(InvalidInput, match="3 encodings of 2 of 10 images"):
        decode(
            one,
            rule=InstaHide(),
            state=STATE,
            count=10,
            batch_size=4,
            public=torch.rand(100, 1, 4, 4),
            generator=stream(0),
        )


@pytest.mark.slow
def test_many_encodings_identify_most_private_digits() -> None:
    """20 encodings of each of 10 digits; by chance 10 of 10 names of 1000 have P < 1e-20."""
    digits = load("mnist-5k")
    order = torch.randperm(len(digits), generator=stream(7))
    private, public = digits.batch(order[:10]), digits.batch(order[1000:3000])
    state = ModelState.of(build("lenet", digits.spec, seed=0))
    rule, source = InstaHide().informed(public), stream(8)
    made = [rule.encode(state, private, source) for _ in range(10)]
    found = decode(
        Batch(torch.cat([b.inputs for b in made]), torch.cat([b.labels for b in made])),
        rule=InstaHide(),
        state=state,
        count=10,
        batch_size=10,
        public=public.inputs,
        generator=stream(9),
    )
    claim = Batch(found.images, torch.zeros(10, dtype=torch.int64))
    bank = digits.batch(order[:1000]).inputs
    scores = metrics.score(claim, private, bank=bank, spec=digits.spec)
    assert sum(scores["identified"]) >= 7
