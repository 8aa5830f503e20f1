"""One picture for a whole batch: its prior's gradient, its labels, its clients."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import gradleak as gl
from gradleak import defenses, priors
from gradleak.attacks.recipes.user_level import UserLevelDiffusion
from gradleak.errors import InvalidInput, NotApplicable
from gradleak.mechanisms import FedAvg
from gradleak.priors import Denoiser
from gradleak.seeding import normal
from gradleak.types import Batch, DataSpec, Mechanism, Observation
from tests.laws.small import SMALL_PRIORS, SPEC, TwoTwins, batch_of, state_of, stream

PUBLIC = Batch(torch.rand((40, 1, 4, 4), generator=stream(7)), torch.arange(40) % 3)


@pytest.fixture(scope="module")
def prior() -> Denoiser:
    found = priors.fit(SMALL_PRIORS["diffusion"], PUBLIC, SPEC, seed=0)
    assert isinstance(found, Denoiser)
    return found


def seen_of(prior: Denoiser, private: Batch, *, mechanism: Mechanism | None = None) -> Observation:
    client, state = mechanism or gl.FedSGD(), state_of(TwoTwins)
    update = client.sample(state, private, generator=stream(0))
    return gl.observe(
        state, update=update.values, data=SPEC, batch_size=len(private), mechanism=client,
        kind=client.kind, labels=private.labels, prior=prior,
    )  # fmt: skip


def penalty_of(recipe: UserLevelDiffusion, seen: Observation, inputs: Tensor) -> Tensor:
    ((weight, penalty),) = recipe.compose([seen]).penalties
    return penalty(inputs, [0]) * weight


@pytest.mark.parametrize("through", [False, True])
def test_the_prior_is_the_error_of_its_noise(prior: Denoiser, through: bool) -> None:
    """Value: Denoiser's own anomaly; gradient: ε̂ − ε by hand, or by differences."""
    recipe = UserLevelDiffusion(prior_weight=2.0, last=0.5, through=through)
    seen = seen_of(prior, batch_of(2, seed=3))
    inputs = torch.rand((2, 1, *SPEC.shape), generator=stream(2), requires_grad=True)
    found = penalty_of(recipe, seen, inputs)
    noise = normal(SPEC.shape, generator=stream(0), dtype=torch.float32).expand(2, *SPEC.shape)
    times = torch.full((2,), round(0.5 * 19))
    assert torch.allclose(found / 2, prior.anomaly(inputs[:, 0], times, noise), rtol=1e-5)
    (slope,) = torch.autograd.grad(found.sum(), inputs)
    if through:
        step = 1e-2 * slope / slope.norm()
        ahead, behind = (penalty_of(recipe, seen, inputs.detach() + s * step) for s in (1, -1))
        change = (ahead - behind).sum() / 2
        assert float(change) == pytest.approx(1e-2 * float(slope.norm()), rel=0.05)
        return
    noised = prior.schedule.noised(prior.scaled(inputs[:, 0]), noise, times)
    gap = prior.output(noised, times) - noise
    low, high = SPEC.bounds
    wanted = 2 * 2 * gap * (2 / (high - low)) / gap[0].numel()
    assert torch.allclose(slope[:, 0], wanted, rtol=1e-4, atol=1e-7)


def test_the_claim_is_one_picture_with_the_most_frequent_label(prior: Denoiser) -> None:
    private = Batch(batch_of(5, seed=3).inputs, torch.tensor([0, 2, 1, 2, 2]))
    claim = UserLevelDiffusion(steps=6)(seen_of(prior, private), generator=stream(1)).batch
    assert claim.labels.tolist() == [2] * 5
    assert claim.inputs.shape == (5, *SPEC.shape)
    assert torch.equal(claim.inputs, claim.inputs[:1].expand_as(claim.inputs))


def test_a_client_of_many_steps_meets_the_whole_batch(prior: Denoiser) -> None:
    """The picture is shown once where the client averages, else as often as the batch is long."""
    private = batch_of(4, seed=3)
    local = FedAvg(learning_rate=0.1, epochs=2, minibatch_size=2, order="sequential")
    noisy = defenses.build("gaussian-noise:std=0.1")(gl.FedSGD())
    for mechanism, rows in ((gl.FedSGD(), 1), (noisy, 1), (local, 4)):
        seen = seen_of(prior, private, mechanism=mechanism)
        objective = UserLevelDiffusion().compose([seen])
        start = objective.unknown.start(stream(1), restarts=2)
        inputs, labels = objective.unknown.decode(start, [0, 0])
        assert inputs.shape == (2, rows, *SPEC.shape)
        assert labels.shape == (2, rows)
        claim = objective.unknown.claimed(inputs[0], labels[0])
        shown = float(objective.values(start, [0, 0])[0])
        assert objective.at(claim) == pytest.approx(shown, rel=1e-4)


def test_equal_pictures_are_found(prior: Denoiser) -> None:
    """A batch of one picture four times over: the fit falls to a tenth of the start's at least."""
    one = batch_of(1, seed=5)
    private = Batch(one.inputs.repeat(4, 1, 1, 1), one.labels.repeat(4))
    recipe = UserLevelDiffusion(steps=60, prior_weight=1e-4)
    seen = seen_of(prior, private)
    start = recipe.compose([seen]).unknown.start(stream(1), restarts=1)["inputs"]
    claim = recipe(seen, generator=stream(1)).batch
    fit = recipe.fit(seen)
    before = fit(Batch(start[0].expand(4, *SPEC.shape), private.labels))
    assert fit(claim) < before / 10
    assert fit(private) == pytest.approx(0, abs=1e-5)


def test_refinement_leaves_the_objective_of_its_claim(prior: Denoiser) -> None:
    seen = seen_of(prior, batch_of(2, seed=3))
    recipe = UserLevelDiffusion(steps=6, refinement=0.3, restarts=2)
    found = recipe(seen, generator=stream(1))
    plain = replace(recipe, refinement=0.0)(seen, generator=stream(1))
    assert not torch.equal(found.batch.inputs, plain.batch.inputs)
    assert recipe.objective(seen)(found.batch) == pytest.approx(found.objective, rel=1e-3)


def test_without_weight_the_prior_is_not_asked(prior: Denoiser) -> None:
    seen = seen_of(prior, batch_of(2, seed=3))
    other = priors.fit(SMALL_PRIORS["diffusion"], PUBLIC, SPEC, seed=1)
    recipe = UserLevelDiffusion(steps=6, prior_weight=0.0)
    first, second = (
        recipe(replace(seen, knowledge=replace(seen.knowledge, prior=p)), generator=stream(1))
        for p in (prior, other)
    )
    assert torch.equal(first.batch.inputs, second.batch.inputs)


def test_what_it_refuses(prior: Denoiser) -> None:
    with pytest.raises(InvalidInput, match="last <= first"):
        UserLevelDiffusion(first=0.1, last=0.2)
    with pytest.raises(InvalidInput, match="refinement"):
        UserLevelDiffusion(refinement=1.5)
    seen = seen_of(prior, batch_of(2, seed=3))
    other = replace(seen, data=DataSpec.image((1, 5, 5), 3))
    with pytest.raises(NotApplicable, match="a prior of images"):
        UserLevelDiffusion().compose([other])
