"""Re-identification and attribute inference: ranks, controls, chance; embeddings of the public."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gradleak.errors import InvalidInput
from gradleak.metrics import (
    attribute_inference,
    classifier,
    clopper_pearson,
    features,
    fisherfaces,
    gallery,
    majority,
    ranks,
    reidentification,
    similarity,
)
from gradleak.types import Batch, ModelState
from tests.laws.small import stream


def flat(inputs: Tensor) -> Tensor:
    return inputs.flatten(1)


def people(count: int, each: int, *, seed: int, noise: float = 0.3) -> Batch:
    """Pictures of people: a face each, and light that is the same for nobody."""
    faces = torch.randn((count, 1, 1, 4, 5), generator=stream(seed), dtype=torch.float64)
    other = torch.randn((count, each, 1, 4, 5), generator=stream(seed + 1), dtype=torch.float64)
    light = torch.randn((count, each, 1, 1, 1), generator=stream(seed + 2), dtype=torch.float64)
    inputs = faces + noise * other + 2 * light
    return Batch(inputs.flatten(0, 1), torch.arange(count).repeat_interleave(each))


def test_likeness_is_the_cosine_and_a_gallery_the_mean_of_unit_rows() -> None:
    pictures = [torch.rand((m, 1, 2, 3), generator=stream(m)).double() for m in (2, 4)]
    known = gallery(pictures, flat)
    for row, each in zip(known, pictures, strict=True):
        rows = each.flatten(1).numpy()
        wanted = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).mean(0)
        assert np.allclose(row.numpy(), wanted, atol=1e-12)
    claim = torch.rand((1, 1, 2, 3), generator=stream(9)).double()
    found = similarity(claim, known, flat)
    a, b = claim.flatten().numpy(), known[1].numpy()
    assert float(found[0, 1]) == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def test_ranks_count_who_is_at_least_as_alike() -> None:
    likeness = torch.tensor([[0.9, 0.1, 0.5], [0.5, 0.5, 0.1], [0.2, 0.1, float("nan")]])
    assert ranks(likeness, torch.tensor([2, 0, 2])).tolist() == [2, 2, 3]
    assert ranks(likeness, torch.tensor([0, 1, 1])).tolist() == [1, 2, 3]
    with pytest.raises(InvalidInput, match="expected"):
        ranks(likeness, torch.tensor([0, 1, 3]))


def test_a_perfect_claim_and_one_claim_for_everybody() -> None:
    users = torch.arange(12).repeat(2)
    perfect = reidentification(torch.eye(12)[users], users)
    assert (perfect.rate, perfect.control, perfect.users, perfect.claims) == (1.0, 0.0, 12, 24)
    assert perfect.interval == clopper_pearson(12, 12)  # users count, not claims
    assert perfect.p == pytest.approx(0.5**12)
    assert perfect.excess.low > 0.5
    same = reidentification(torch.arange(12.0).expand(24, 12), users)
    assert same.rate == same.control == same.chance == 1 / 12
    assert same.excess.low < 0


def test_chance() -> None:
    """H0: likeness says nothing of the user. n = 4000 claims, alpha = 1e-6 for each k."""
    users = torch.arange(10).repeat(400)
    likeness = torch.rand((4000, 10), generator=stream(3))
    for k in (1, 3):
        found = reidentification(likeness, users, k=k)
        sure = clopper_pearson(round(found.rate * 4000), 4000, confidence=1 - 1e-6)
        assert sure.low < found.chance < sure.high
        planted = reidentification(likeness + 0.2 * torch.eye(10)[users], users, k=k)
        found_low = clopper_pearson(round(planted.rate * 4000), 4000, confidence=1 - 1e-6).low
        assert found_low > planted.chance


def test_fisherfaces_tell_unseen_people_apart_where_pixels_do_not() -> None:
    """The light swamps pixels; the public people teach what to ignore."""
    public, private = people(12, 8, seed=10), people(10, 6, seed=20)
    embed = fisherfaces(public)
    shown = private.inputs.unflatten(0, (10, 6))
    users = torch.arange(10)
    hits = {}
    for name, each in (("fisher", embed), ("pixels", flat)):
        known = gallery(list(shown[:, 3:]), each)
        hits[name] = reidentification(similarity(shown[:, 0], known, each), users).rate
    assert hits["fisher"] >= 0.8
    assert hits["pixels"] <= 0.5
    assert embed(public.inputs).mean(0).abs().max() < 1e-9
    assert embed(public.inputs).shape[1] <= 11  # one fewer than there are people
    assert fisherfaces(public, dimensions=3)(public.inputs).shape == (96, 3)


def test_two_people_give_fishers_discriminant() -> None:
    """With two people the one direction is S_within^-1 (m_1 - m_2) but for its length."""
    public = people(2, 200, seed=5, noise=1.0)
    rows = public.inputs.flatten(1).numpy()
    first, second = rows[:200], rows[200:]
    within = np.cov(first.T) + np.cov(second.T)
    within += np.eye(20) * np.trace(within) / 20 / 100
    wanted = np.linalg.solve(within, first.mean(0) - second.mean(0))
    embed = fisherfaces(public)
    found = embed(torch.eye(20, dtype=torch.float64).reshape(20, 1, 4, 5))[:, 0]
    found = found - embed(torch.zeros((1, 1, 4, 5), dtype=torch.float64))[0, 0]
    cosine = found.numpy() @ wanted / np.linalg.norm(found.numpy()) / np.linalg.norm(wanted)
    assert abs(cosine) > 0.97  # the components before it keep 95 % of the variance


def test_features_are_what_the_head_is_given() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(20, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    inputs = people(3, 4, seed=1).inputs
    state = ModelState.of(network)
    embed = features(state, inputs)
    wanted = network[:3](inputs)
    assert torch.allclose(embed(inputs), wanted - wanted.mean(0))
    assert torch.equal(classifier(state)(inputs), network(inputs).argmax(1))
    with pytest.raises(InvalidInput, match="linear"):
        features(ModelState.of(nn.Conv2d(1, 1, 1)), inputs)


def test_attributes_are_read_off_and_the_control_has_another() -> None:
    attributes = majority([torch.tensor(a) for a in ([1, 1, 2], [1], [0, 0, 4], [2, 0])])
    assert attributes.tolist() == [1, 1, 0, 0]
    users = torch.arange(4)
    claims = attributes.double().reshape(4, 1, 1, 1).clone()
    claims[3] = torch.nan

    def classify(inputs: Tensor) -> Tensor:
        return inputs.flatten().long()

    found = attribute_inference(claims, users, attributes, classify, chance=0.5)
    assert (found.rate, found.control) == (0.75, 0.0)
    blind = attribute_inference(torch.ones(4, 1, 1, 1), users, attributes, classify, chance=0.5)
    assert (blind.rate, blind.control) == (0.5, 0.5)
    with pytest.raises(InvalidInput, match="share"):
        attribute_inference(claims, users, torch.ones(4).long(), classify, chance=0.5)
