"""MixUp, InstaHide and label smoothing: what is trained on, its law, and what attackers match."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats
from torch import Tensor
from torch.nn.functional import cross_entropy

import gradleak as gl
from gradleak.attacks.parts.distances import squared_l2
from gradleak.attacks.parts.known_labels import labels_to_match
from gradleak.attacks.parts.matching import Matching
from gradleak.data import load
from gradleak.defenses import (
    GaussianNoise,
    InstaHide,
    LabelSmoothing,
    MixUp,
    build,
    difference,
    informed,
    mixes_labels,
    norm,
)
from gradleak.errors import InvalidInput
from gradleak.mechanisms import FedSGD
from gradleak.models import build as build_model
from gradleak.run.preflight import preflight
from gradleak.types import Batch, Fact, ModelState
from tests.laws.small import TwoTwins, batch_of, state_of, stream

STATE = state_of(TwoTwins)
ALPHA = 1e-6


def named(batch: Batch) -> Batch:
    """Every example a class of its own, so that mixed labels are the weights."""
    return Batch(batch.inputs, torch.eye(len(batch), dtype=torch.float64))


def constant(value: float, size: int) -> Batch:
    inputs = torch.full((size, 1, 4, 4), value, dtype=torch.float64)
    return Batch(inputs, torch.zeros(size, dtype=torch.int64))


@pytest.mark.parametrize("size", [4, 7])
def test_mixup_blends_inputs_as_it_blends_labels(size: int) -> None:
    batch = named(batch_of(size))
    mixed = MixUp(images=4).encode(STATE, batch, stream(1))
    expected = torch.einsum("ij,j...->i...", mixed.labels, batch.inputs)
    torch.testing.assert_close(mixed.inputs, expected)
    assert ((mixed.labels > 0).sum(1) == 4).all()
    torch.testing.assert_close(mixed.labels.sum(1), torch.ones(size, dtype=torch.float64))


def own_weights(rule: MixUp, *, draws: int) -> Tensor:
    source, batch = stream(2), named(batch_of(4))
    drawn = [rule.encode(STATE, batch, source).labels.diagonal() for _ in range(draws)]
    return torch.cat(drawn)


def test_an_examples_own_weight_is_dirichlets() -> None:
    """Dirichlet(3, 1, 1, 1) has the marginal Beta(3, 3); n = 2000, Kolmogorov–Smirnov at 1e-6."""
    drawn = own_weights(MixUp(images=4, first=3), draws=500).numpy()
    assert stats.kstest(drawn, stats.beta(3, 3).cdf).pvalue > ALPHA
    faulty = own_weights(MixUp(images=4, first=1), draws=500).numpy()
    assert stats.kstest(faulty, stats.beta(3, 3).cdf).pvalue < ALPHA


def test_two_images_with_equal_concentration_are_zhangs_mixup() -> None:
    drawn = own_weights(MixUp(images=2, first=1), draws=500).numpy()
    assert stats.kstest(drawn, stats.uniform.cdf).pvalue > ALPHA


def test_a_batch_of_one_needs_public_examples() -> None:
    one = batch_of(1)
    alone = MixUp().encode(STATE, one, stream(0))
    assert torch.equal(alone.inputs, one.inputs)
    assert torch.equal(alone.labels.argmax(1), one.labels)
    told = MixUp().informed(constant(0.25, 9)).encode(STATE, one, stream(0))
    weight = (told.inputs - 0.25) / (one.inputs - 0.25)
    torch.testing.assert_close(weight, weight.mean().expand_as(weight))
    assert 0 < float(weight.mean()) < 1


def shown(rule: InstaHide, *, draws: int) -> Tensor:
    """Encodings about the middle of a white image among grey ones: ± half its weight."""
    told, source, white = rule.informed(constant(0.5, 9)), stream(3), constant(1.0, 1)
    found = [told.encode(STATE, white, source).inputs.flatten() - 0.5 for _ in range(draws)]
    return torch.stack(found)


def test_instahide_bounds_every_weight_and_draws_every_sign() -> None:
    """n = 300 encodings of 16 pixels; signs binomial, α = 1e-6."""
    found = shown(InstaHide(), draws=300)
    weights = 2 * found.abs()
    torch.testing.assert_close(weights, weights[:, :1].expand_as(weights))
    assert 0.3 <= float(weights.min()) <= float(weights.max()) <= 0.65
    up = int((found > 0).sum())
    assert stats.binomtest(up, found.numel()).pvalue > ALPHA
    assert len(found.sign().unique(dim=0)) > 290
    assert float(2 * shown(InstaHide(most=1.0), draws=300).abs().max()) > 0.65


def test_instahide_labels_only_what_is_private() -> None:
    told = InstaHide().informed(constant(0.5, 9))
    made = told.encode(STATE, named(batch_of(5)), stream(4))
    assert ((made.labels > 0).sum(1) == 2).all()
    assert (made.labels.diagonal() > 0).all()
    torch.testing.assert_close(made.labels.sum(1), torch.ones(5, dtype=torch.float64))
    assert 0 <= float(made.inputs.min()) <= float(made.inputs.max()) <= 1


def test_instahide_without_signs_is_a_blend() -> None:
    """Inside the batch, |e − ½| is |Σ λ x − ½| with λ the labels."""
    batch = named(batch_of(6))
    made = InstaHide().encode(STATE, batch, stream(5))
    blend = torch.einsum("ij,j...->i...", made.labels, batch.inputs)
    torch.testing.assert_close((made.inputs - 0.5).abs(), (blend - 0.5).abs())


@pytest.mark.parametrize("rule", [MixUp(), InstaHide()], ids=lambda rule: rule.id)
def test_the_update_is_the_gradient_of_blends_under_soft_labels(rule: MixUp | InstaHide) -> None:
    batch = batch_of(4)
    sent = rule(FedSGD()).sample(STATE, batch, generator=stream(6)).values
    blend = rule(FedSGD()).trained_on(STATE, batch, generator=stream(6))
    params = {k: v.clone().requires_grad_() for k, v in STATE.params.items()}
    logits = torch.func.functional_call(STATE.model, params, (blend.inputs,))
    loss = -(blend.labels * logits.log_softmax(1)).sum(1).mean()
    expected = torch.autograd.grad(loss, list(params.values()))
    for value, wanted in zip(sent.values(), expected, strict=True):
        torch.testing.assert_close(value, wanted)


@pytest.mark.parametrize("size", [1, 3])
def test_label_smoothing_is_torchs(size: int) -> None:
    batch, client = batch_of(size), LabelSmoothing(share=0.3)(FedSGD())
    sent = client.sample(STATE, batch, generator=stream(0))
    params = {k: v.clone().requires_grad_() for k, v in STATE.params.items()}
    logits = torch.func.functional_call(STATE.model, params, (batch.inputs,))
    loss = cross_entropy(logits, batch.labels, label_smoothing=0.3)
    expected = torch.autograd.grad(loss, list(params.values()))
    for value, wanted in zip(sent.values.values(), expected, strict=True):
        torch.testing.assert_close(value, wanted)
    # Who knows it explains the update by classes or by soft labels; who does not cannot.
    soft = client.trained_on(STATE, batch, generator=stream(0))
    for claim in (batch, soft):
        assert norm(difference(client.predict(sent, STATE, claim), sent)) < 1e-12
    assert norm(difference(FedSGD().mean(STATE, batch), sent)) > 1e-2 * norm(sent)


def test_searches_see_smoothing_as_a_loss_and_take_the_fast_road() -> None:
    """By closed forms, as by double backward: the distance is zero at the truth alone."""
    digits = load("digits")
    state = ModelState.of(build_model("lenet", digits.spec, seed=0))
    scenario = gl.Scenario(digits, state, LabelSmoothing(share=0.3)(FedSGD()), batch_size=2)
    seen, truth = gl.simulate(scenario, generator=stream(1))
    fit = Matching([seen], squared_l2, dtype=torch.float64)
    assert fit.fast is not None
    inputs, labels = truth.batch.inputs[None].double(), truth.batch.labels[None]
    soft = torch.nn.functional.one_hot(labels, 10).double() * 0.7 + 0.03
    for claim in (labels, soft):
        assert float(fit.fast(inputs, claim, [0])) < 1e-9
    wrong = (labels + 1) % 10
    expected = fit.one(inputs[0], wrong[0], fit.received[0])
    assert float(fit.fast(inputs, wrong, [0])) == pytest.approx(float(expected), rel=1e-6)


def test_noise_around_smoothed_labels_keeps_its_density() -> None:
    batch, std = batch_of(2), 0.1
    client = GaussianNoise(std)(LabelSmoothing()(FedSGD()))
    sent = client.sample(STATE, batch, generator=stream(0))
    clean = LabelSmoothing()(FedSGD()).mean(STATE, batch)
    gap, n = difference(sent, clean), sum(v.numel() for v in sent.values.values())
    expected = -(norm(gap) ** 2) / (2 * std**2) - n * math.log(std * math.sqrt(2 * math.pi))
    assert float(client.log_prob(sent, STATE, batch)) == pytest.approx(expected)


def observed(rule: MixUp, *, size: int, aware: bool) -> tuple[gl.Observation, Batch]:
    digits = load("digits")
    state = ModelState.of(build_model("lenet-tiny", digits.spec, seed=0)).to(torch.float64)
    client = informed(rule(FedSGD()), digits.batch(torch.arange(900, 1000)))
    facts = {Fact.BATCH_SIZE, Fact.LABELS} | ({Fact.MECHANISM} if aware else set())
    scenario = gl.Scenario(
        digits, state, client, gl.ThreatModel(knows=frozenset(facts)), batch_size=size
    )
    seen, truth = gl.simulate(scenario, generator=stream(3))
    assert preflight(scenario, seen, truth, generator=stream(3)) == []
    return seen, truth.trained_on


def test_who_knows_of_mixing_reads_soft_labels_off_or_searches_for_them() -> None:
    seen, made = observed(MixUp(), size=1, aware=True)
    assert mixes_labels(seen.mechanism)
    found = labels_to_match([seen])
    assert found is not None
    torch.testing.assert_close(found[0], made.labels, rtol=0, atol=1e-8)
    assert float(made.labels.max()) < 0.999
    unaware = labels_to_match([observed(MixUp(), size=1, aware=False)[0]])
    assert unaware is not None
    assert unaware.dtype == torch.int64
    assert labels_to_match([observed(MixUp(), size=3, aware=True)[0]]) is None


def test_an_aware_search_ends_at_the_blends() -> None:
    seen, made = observed(MixUp(), size=1, aware=True)
    attack = gl.attacks.build("inverting-gradients:steps=300,total_variation=0")
    claim = attack(seen, generator=stream(0))
    assert gl.metrics.psnr_db(claim.batch, made) > 25
    torch.testing.assert_close(claim.batch.labels.double(), made.labels, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "spec",
    [
        "mixup:images=0",
        "mixup:first=0",
        "instahide:private=5",
        "instahide:most=0.2",
        "instahide:least=0.9",
        "label-smoothing:share=1",
    ],
)
def test_a_bad_number_is_named(spec: str) -> None:
    with pytest.raises(InvalidInput, match=spec.partition(":")[2]):
        build(spec)


def test_public_examples_are_no_field_to_set() -> None:
    with pytest.raises(InvalidInput, match="no field 'public'"):
        build("mixup:public=1")
