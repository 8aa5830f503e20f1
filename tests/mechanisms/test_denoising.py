"""Clients of diffusion models against plain PyTorch, and who learns what they draw."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from gradleak.data import load
from gradleak.defenses import build as protect
from gradleak.defenses import informed, rebased, undefended
from gradleak.denoising import Schedule
from gradleak.errors import IntractableLikelihood, InvalidInput, NotApplicable
from gradleak.mechanisms import Denoising, DenoisingAvg, Draws, FedSGD, summed
from gradleak.mechanisms.denoising import carried_images, carry, one_step
from gradleak.models import build, train
from gradleak.observation import observe
from gradleak.scenario import Scenario, simulate
from gradleak.threat import ThreatModel
from gradleak.types import Batch, Fact, Mechanism, ModelState, Update
from tests.laws.small import SPEC, SmallDenoiser, TwoTwins, batch_of, state_of, stream

DATA = load("digits")
KNOWN = frozenset({Fact.MECHANISM, Fact.BATCH_SIZE, Fact.TIMESTEPS, Fact.NOISE})


def flat(update: Update) -> Tensor:
    return torch.cat([v.flatten() for v in update.values.values()])


def draws(b: int, visits: int = 1, *, seed: int = 7, timesteps: int = 1000) -> Draws:
    source = stream(seed)
    times = torch.randint(timesteps, (b, visits), generator=source)
    noise = torch.randn((b, visits, 1, 4, 4), generator=source, dtype=torch.float64)
    return Draws(times, noise)


def plain(state: ModelState) -> nn.Module:
    model = SmallDenoiser().double()
    model.load_state_dict(dict(state.params))
    return model


def loss(network: nn.Module, x: Tensor, noise: Tensor, t: Tensor, *, v: bool = False) -> Tensor:
    """As a textbook has it, image by image."""
    alphas = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)
    total = torch.zeros((), dtype=torch.float64)
    for image, e, time in zip(2 * x - 1, noise, t, strict=True):
        a, s = alphas[time].sqrt(), (1 - alphas[time]).sqrt()
        target = a * e - s * image if v else e
        output = network((a * image + s * e)[None], time[None])[0]
        total = total + (output - target).square().mean()
    return total / len(x)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_denoising_is_the_gradient_of_the_textbooks_loss(prediction: str) -> None:
    state, batch, drawn = state_of(SmallDenoiser), batch_of(3), draws(3)
    assert drawn.noise is not None
    assert drawn.times is not None
    model = plain(state)
    v = prediction == "v_prediction"
    loss(model, batch.inputs, drawn.noise[:, 0], drawn.times[:, 0], v=v).backward()
    client = Denoising(prediction=prediction, draws=drawn)  # type: ignore[arg-type]
    assert client.deterministic
    found = client.mean(state, batch).values
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-9, atol=1e-13)
    again = client.sample(state, batch, generator=stream(0))
    torch.testing.assert_close(flat(again), flat(client.predict(again, state, batch)))


def test_federated_averaging_draws_anew_for_every_visit() -> None:
    """Three epochs over minibatches of two of four images: a loop of an optimiser, by hand."""
    state, batch, drawn = state_of(SmallDenoiser), batch_of(4), draws(4, 3)
    assert drawn.noise is not None
    assert drawn.times is not None
    client = DenoisingAvg(learning_rate=0.3, epochs=3, minibatch_size=2, draws=drawn)
    model = plain(state)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.3)
    for epoch in range(3):
        for visit in ([0, 1], [2, 3]):
            optimiser.zero_grad()
            x, e, t = batch.inputs[visit], drawn.noise[visit, epoch], drawn.times[visit, epoch]
            loss(model, x, e, t).backward()
            optimiser.step()
    found = client.mean(state, batch).values
    for name, parameter in model.named_parameters():
        wanted = parameter.detach() - state.params[name]
        torch.testing.assert_close(found[name], wanted, rtol=1e-8, atol=1e-12)
    swapped = Draws(drawn.times.flip(1), drawn.noise.flip(1))
    other = DenoisingAvg(learning_rate=0.3, epochs=3, minibatch_size=2, draws=swapped)
    assert not torch.allclose(flat(other.mean(state, batch)), flat(client.mean(state, batch)))


def test_one_local_step_is_a_scaled_gradient() -> None:
    state, batch, drawn = state_of(SmallDenoiser), batch_of(2), draws(2)
    delta = DenoisingAvg(learning_rate=0.2, steps=1, draws=drawn).mean(state, batch)
    gradient = Denoising(draws=drawn).mean(state, batch)
    torch.testing.assert_close(flat(delta), -0.2 * flat(gradient), rtol=1e-9, atol=1e-14)


def test_an_order_and_draws_that_are_unknown_have_no_mean() -> None:
    state, batch = state_of(SmallDenoiser), batch_of(2)
    for client in (Denoising(), DenoisingAvg(), Denoising(draws=Draws(times=draws(2).times))):
        assert not client.deterministic
        with pytest.raises(IntractableLikelihood, match="noise and times"):
            client.mean(state, batch)


def test_a_fixed_time_is_drawn_and_a_known_one_stays() -> None:
    batch = batch_of(3)
    fixed = Denoising(timestep=50).draw(batch, generator=stream(0))
    assert fixed.times is not None
    assert fixed.times.tolist() == [[50]] * 3
    known = Denoising(draws=Draws(times=torch.tensor([[1], [2], [3]])))
    assert torch.equal(known.draw(batch, generator=stream(0)).times, known.draws.times)  # type: ignore
    with pytest.raises(InvalidInput, match="expected 3"):
        Denoising(draws=draws(2)).draw(batch, generator=stream(0))
    with pytest.raises(InvalidInput, match="0 to 999"):
        Denoising(timestep=1000)


def test_times_are_uniform_and_noise_is_standard() -> None:
    """n = 20 000 times in 10 bins, χ² below its 1 − 1e-6 quantile 45.1; 16 n normal draws, 6 SE."""
    big = Batch(torch.zeros((20_000, 1, 4, 4)), torch.zeros(20_000, dtype=torch.int64))
    drawn = Denoising(timesteps=10).draw(big, generator=stream(1))
    assert drawn.times is not None
    assert drawn.noise is not None
    counts = torch.bincount(drawn.times.flatten(), minlength=10).double()
    assert float(((counts - 2000) ** 2 / 2000).sum()) < 45.1
    n = drawn.noise.numel()
    assert abs(float(drawn.noise.mean())) < 6 / n**0.5
    assert abs(float(drawn.noise.var()) - 1) < 6 * (2 / n) ** 0.5


def test_images_that_carry_their_draws_are_a_deterministic_client() -> None:
    """Under protections, too: noise and times may be searched for through any of them."""
    state, batch, drawn = state_of(SmallDenoiser), batch_of(2), draws(2)
    received = Denoising(draws=drawn).mean(state, batch)
    carrying = carry(batch, drawn)
    assert carrying.inputs.shape == (2, 3, 4, 4)
    assert torch.equal(carried_images(carrying.inputs), batch.inputs)
    belief = rebased(protect("top-k:fraction=0.5")(Denoising()), carried=True)
    assert belief.deterministic
    found = belief.predict(received, state, carrying)
    kept = flat(found) != 0
    torch.testing.assert_close(flat(found)[kept], flat(received)[kept])
    inputs = carrying.inputs.clone().requires_grad_()
    value = flat(belief.predict(received, state, Batch(inputs, batch.labels))).square().sum()
    (slope,) = torch.autograd.grad(value, inputs)
    assert bool((slope.flatten(2).abs().sum(2) > 0).all())  # image, noise and time
    several = carry(batch, draws(2, 3))
    assert torch.equal(carried_images(several.inputs, visits=3), batch.inputs)


def test_dp_sgd_clips_every_images_gradient() -> None:
    state, batch, drawn, bound = state_of(SmallDenoiser), batch_of(3), draws(3), 0.05
    assert drawn.noise is not None
    assert drawn.times is not None
    client = protect(f"clip:norm={bound},scope=example")(Denoising(draws=drawn))
    wanted = torch.zeros_like(flat(client.mean(state, batch)))
    for i in range(3):
        model = plain(state)
        one = slice(i, i + 1)
        loss(model, batch.inputs[one], drawn.noise[one, 0], drawn.times[one, 0]).backward()
        g = torch.cat([p.grad.flatten() for p in model.parameters()])  # type: ignore[union-attr]
        wanted += g * min(1.0, bound / float(g.norm())) / 3
    torch.testing.assert_close(flat(client.mean(state, batch)), wanted, rtol=1e-9, atol=1e-14)


def test_protections_by_risk_are_told_public_images_of_a_diffusion_client() -> None:
    """Slices follow from what everybody knows: the belief without draws cuts them alike."""
    state, public = state_of(SmallDenoiser), batch_of(20, seed=9)
    for spec in ("gradient-slices", "risk-noise"):
        client = informed(protect(spec)(Denoising(timestep=3, draws=draws(2))), public)
        belief = informed(protect(spec)(Denoising()), public)
        update = client.sample(state, batch_of(2), generator=stream(0))
        assert bool(flat(update).isfinite().all())
        if spec == "gradient-slices":
            pairs = zip(client.slices(state), belief.slices(state), strict=True)  # type: ignore
            assert all(torch.equal(a, b) for a, b in pairs)


def test_a_sum_of_diffusion_clients_is_one_batch() -> None:
    assert summed(Denoising(), 4) == Denoising()
    state, batch, drawn = state_of(SmallDenoiser), batch_of(4), draws(4)
    assert drawn.noise is not None
    assert drawn.times is not None
    halves = [
        flat(
            Denoising(draws=Draws(drawn.times[s], drawn.noise[s])).mean(
                state, Batch(batch.inputs[s], batch.labels[s])
            )
        )
        for s in (slice(0, 2), slice(2, 4))
    ]
    one = flat(Denoising(draws=drawn).mean(state, batch))
    torch.testing.assert_close((halves[0] + halves[1]) / 2, one, rtol=1e-9, atol=1e-13)


def scenario(mechanism: Mechanism, knows: frozenset[Fact], **more: object) -> Scenario:
    return Scenario(
        data=DATA, model=SmallDigits(), mechanism=mechanism, batch_size=2,
        threat=ThreatModel(knows=knows, **more.pop("threat", {})), **more,  # type: ignore
    )  # fmt: skip


class SmallDigits(nn.Module):
    """A denoiser of 8×8 digits."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(64) / 3)

    def forward(self, x: Tensor, times: Tensor) -> Tensor:
        return (x.flatten(1) @ self.weight).reshape(x.shape)


@pytest.mark.parametrize("core", [Denoising(timestep=50), DenoisingAvg(epochs=2, timestep=50)])
@pytest.mark.parametrize("defense", ["none", "gaussian-noise"])
def test_draws_reach_the_attacker_only_where_they_are_granted(
    core: Denoising | DenoisingAvg, defense: str
) -> None:
    mechanism = protect(defense)(core)
    seen, truth = simulate(scenario(mechanism, KNOWN), generator=stream(0))
    belief = undefended(seen.mechanism)
    assert isinstance(belief, Denoising | DenoisingAvg)
    assert truth.draws is not None
    assert belief.draws is not None
    assert torch.equal(belief.draws.noise, truth.draws.noise)  # type: ignore[arg-type]
    assert belief.draws.times.tolist() == [[50] * core.visits(2)] * 2  # type: ignore[union-attr]
    if defense == "none":
        again = belief.mean(seen.state, truth.batch)
        torch.testing.assert_close(flat(again), flat(seen.update), rtol=1e-4, atol=1e-6)

    seen, _ = simulate(scenario(mechanism, KNOWN - {Fact.NOISE}), generator=stream(0))
    belief = undefended(seen.mechanism)
    assert belief.draws.noise is None  # type: ignore[attr-defined]

    seen, _ = simulate(
        scenario(mechanism, KNOWN - {Fact.NOISE, Fact.TIMESTEPS}), generator=stream(0)
    )
    belief = undefended(seen.mechanism)
    assert belief.draws is None  # type: ignore[attr-defined]
    assert belief.timestep is None  # type: ignore[attr-defined]  # t that an experiment fixes


def test_a_sum_grants_no_draws_and_networks_must_fit() -> None:
    with pytest.raises(InvalidInput, match="to grant"):
        scenario(Denoising(), KNOWN, clients=2, threat={"view": "aggregate"})
    with pytest.raises(InvalidInput, match="expected mechanism 'denoising'"):
        Scenario(data=DATA, model=SmallDigits())
    with pytest.raises(InvalidInput, match="trains a denoiser"):
        Scenario(data=DATA, model=build("lenet", DATA.spec, seed=0), mechanism=Denoising())
    update = {k: torch.zeros_like(v) for k, v in TwoTwins().named_parameters()}
    with pytest.raises(InvalidInput, match="classifies"):
        observe(TwoTwins(), update=update, data=SPEC, batch_size=1, mechanism=Denoising())
    denoiser = SmallDenoiser()
    update = {k: torch.zeros_like(v) for k, v in denoiser.named_parameters()}
    seen = observe(denoiser, update=update, data=SPEC, batch_size=1, mechanism=Denoising())
    assert undefended(seen.mechanism) == Denoising()


def test_attacks_on_classifiers_refuse_a_denoiser() -> None:
    from gradleak.attacks import ATTACKS
    from gradleak.attacks import build as attack

    seen, _ = simulate(scenario(Denoising(), KNOWN), generator=stream(0))
    names = [n for n, a in ATTACKS.items() if a.about.classifiers and a.about.server == "honest"]
    assert {"linear-layer", "cafe", "idlg"} <= set(names)
    for name in names:
        with pytest.raises(NotApplicable, match="expected a classifier"):
            attack(name)(seen, generator=stream(0))


def test_what_is_not_granted_is_named() -> None:
    from dataclasses import replace

    from gradleak.attacks import ATTACKS
    from gradleak.attacks.parts.needs import require

    about = replace(ATTACKS["dlg"].about, needs=frozenset({Fact.TIMESTEPS, Fact.NOISE}))
    seen, _ = simulate(scenario(Denoising(), KNOWN), generator=stream(0))
    require(about, seen)
    seen, _ = simulate(scenario(Denoising(), KNOWN - {Fact.NOISE}), generator=stream(0))
    with pytest.raises(NotApplicable, match="needs noise: not granted"):
        require(about, seen)


def test_training_lowers_the_denoising_loss_and_leaves_the_model_alone() -> None:
    """Mean loss at t < 100 of 64 other images on equal draws: identity / 3 does worse."""
    network = SmallDigits()
    before = copy.deepcopy(network.state_dict())
    client = one_step(DenoisingAvg(timesteps=100, timestep=3))
    assert client == Denoising(timesteps=100)
    state = train(network, DATA, torch.arange(500), steps=60, seed=0, client=client)
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())
    batch, drawn = DATA.batch(torch.arange(600, 664)), stream(5)
    objective = client.drawn(batch, generator=drawn)

    def at(params: dict[str, Tensor]) -> float:
        with torch.no_grad():
            return float(objective(lambda *to: torch.func.functional_call(network, params, to)))

    assert at(dict(state.params)) < 0.9 * at(before)
    again = train(network, DATA, torch.arange(500), steps=5, seed=0, client=client)
    twice = train(network, DATA, torch.arange(500), steps=5, seed=0, client=client)
    assert torch.equal(again.params["weight"], twice.params["weight"])


def test_bounds_of_other_data_are_scaled_away() -> None:
    state, batch, drawn = state_of(SmallDenoiser), batch_of(2), draws(2)
    wide = Batch(batch.inputs * 255, batch.labels)
    torch.testing.assert_close(
        flat(Denoising(draws=drawn, bounds=(0.0, 255.0)).mean(state, wide)),
        flat(Denoising(draws=drawn).mean(state, batch)),
    )
    assert Schedule() == Denoising().noise_schedule
    assert Denoising().loss is mse_loss
    assert isinstance(Denoising(), FedSGD)
