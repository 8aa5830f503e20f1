"""PRECODE: its gradient against plain automatic differentiation, and what breaks it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, softplus

import gradleak as gl
from gradleak.attacks.closed_form.linear_layer import LinearLayer
from gradleak.attacks.parts import smoothing
from gradleak.attacks.parts.distances import squared_l2
from gradleak.attacks.parts.matching import Matching
from gradleak.data import load
from gradleak.defenses import Precode, difference, norm, undefended
from gradleak.defenses.precode import Latent, VariationalBottleneck, divergence, precode
from gradleak.errors import InvalidInput, NotApplicable
from gradleak.mechanisms import FedAvg, FedSGD
from gradleak.models import build, train
from gradleak.types import Batch, Mechanism, ModelState, Update
from tests.laws.small import Bottlenecked, OneWeight, TwoTwins, batch_of, state_of, stream

CLIENT = Precode()(FedSGD())


def spelled_out(network: nn.Module, batch: Batch, noise: Tensor) -> dict[str, Tensor]:
    """The client's gradient with every step written down."""
    model = network.double().eval()
    bottleneck: VariationalBottleneck = model.head[0]  # type: ignore[index,assignment]
    h = batch.inputs.flatten(1)
    for layer in (model.first, model.twin, model.other_twin):
        h = torch.tanh(layer(h))  # type: ignore[operator]
    mean, scale = bottleneck.encoder(h).chunk(2, 1)
    sigma = softplus(scale)
    logits = model.head[1](bottleneck.decoder(mean + sigma * noise))  # type: ignore[index,operator]
    normal = torch.distributions.Normal
    kl = torch.distributions.kl_divergence(normal(mean, sigma), normal(0.0, 1.0)).sum(1) / math.log(
        2
    )
    weight = float(bottleneck.divergence_weight)
    assert weight == pytest.approx(1e-3)
    loss = cross_entropy(logits, batch.labels) + weight * kl.mean()
    named = dict(model.named_parameters())
    return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


@pytest.mark.parametrize("size", [1, 3])
def test_the_update_is_the_gradient_of_loss_and_divergence_at_the_noise_drawn(size: int) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Bottlenecked()
    state, batch = ModelState.of(network).to(torch.float64), batch_of(size)
    update = CLIENT.sample(state, batch, generator=stream(5))
    noise = torch.randn((size, 3), generator=stream(5), dtype=torch.float64)
    expected = spelled_out(network, batch, noise)
    assert update.values.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(update.values[name], value, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("core", [FedSGD(), FedAvg(steps=1)], ids=lambda c: c.id)
def test_one_example_gives_its_noise_away(core: Mechanism) -> None:
    state, batch = state_of(Bottlenecked), batch_of(1)
    client = Precode()(core)
    assert isinstance(client, Latent)
    received = client.sample(state, batch, generator=stream(5))
    noise = torch.randn(
        client.latent_shape(state, batch_size=1), generator=stream(5), dtype=torch.float64
    )
    found = client.latent_of(received, state)  # type: ignore[attr-defined]
    torch.testing.assert_close(found, noise, rtol=1e-9, atol=1e-9)
    predicted = client.predict(received, state, batch)
    assert norm(difference(predicted, received)) < 1e-10 * norm(received)
    other = client.predict(received, state, batch_of(1, seed=1))
    assert norm(difference(other, received)) > 1e-3 * norm(received)


def test_a_batch_mutes_the_bottleneck_and_the_latent_explains_it() -> None:
    state, batch = state_of(Bottlenecked), batch_of(3)
    received = CLIENT.sample(state, batch, generator=stream(5))
    noise = torch.randn((3, 3), generator=stream(5), dtype=torch.float64)
    muted = CLIENT.predict(received, state, batch).values
    for name, value in received.values.items():
        assert torch.equal(muted[name], value) == name.startswith("head.0.")
    assert isinstance(CLIENT, Latent)
    exact = CLIENT.predict_given(received, state, batch, noise)
    assert norm(difference(exact, received)) == 0
    latent = torch.zeros((3, 3), dtype=torch.float64, requires_grad=True)
    gap = difference(CLIENT.predict_given(received, state, batch, latent), received)
    (slope,) = torch.autograd.grad(
        torch.stack([(v**2).sum() for v in gap.values.values()]).sum(), latent
    )
    assert slope.abs().min() > 0


def test_a_search_compares_all_but_the_bottleneck() -> None:
    """By double backward and under vmap alike, the distance is that of the other tensors."""
    digits = load("digits")
    scenario = gl.Scenario(digits, build("lenet-tiny+precode", digits.spec, seed=0), CLIENT)
    seen, truth = gl.simulate(scenario, generator=stream(0))
    matching = Matching([seen], squared_l2, dtype=torch.float64)
    assert matching.compared
    assert not any("coder" in name for name in matching.compared)
    inputs, labels = truth.batch.inputs.double().flip(-1)[None], truth.batch.labels[None]
    predicted = CLIENT.predict(
        Update(matching.received[0], "gradient"), matching.state, Batch(inputs[0], labels[0])
    ).values
    expected = sum(((predicted[k] - matching.received[0][k]) ** 2).sum() for k in matching.compared)
    alone = matching(inputs, labels, [0])
    both = matching(inputs.repeat(2, 1, 1, 1, 1), labels.repeat(2, 1), [0, 0])
    torch.testing.assert_close(alone[0], expected)
    torch.testing.assert_close(both, alone.expand(2))


def test_the_divergence_is_that_of_torch_distributions() -> None:
    statistics = torch.randn((4, 6), generator=stream(0), dtype=torch.float64)
    normal = torch.distributions.Normal
    reference = torch.distributions.kl_divergence(
        normal(statistics[:, :3], softplus(statistics[:, 3:])), normal(0.0, 1.0)
    ).sum(1)
    torch.testing.assert_close(divergence(statistics) * math.log(2), reference)


def test_without_noise_the_network_is_deterministic_and_the_unaware_attacker_believes_it() -> None:
    state, batch = state_of(Bottlenecked), batch_of(1)
    assert undefended(CLIENT) == FedSGD()
    clean = FedSGD().mean(state, batch)
    again = FedSGD().mean(state, batch)
    sent = CLIENT.sample(state, batch, generator=stream(0))
    assert norm(difference(clean, again)) == 0
    assert norm(difference(clean, sent)) > 1e-3 * norm(clean)


def test_smoothing_keeps_the_bottleneck() -> None:
    """An attack may put a traced copy of the network in the state."""
    state, batch = state_of(Bottlenecked), batch_of(1)
    received = CLIENT.sample(state, batch, generator=stream(5))
    traced = ModelState(smoothing.swapped(state.model), state.params, state.buffers)
    predicted = CLIENT.predict(received, traced, batch)
    assert norm(difference(predicted, received)) < 1e-10 * norm(received)


class PublishedMLP(nn.Module):
    """Two hidden layers of 1024 units, then the bottleneck, as in the authors' code."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = precode(
            nn.Sequential(
                nn.Flatten(),
                nn.Linear(64, 1024),
                nn.ReLU(),
                nn.Linear(1024, 1024),
                nn.ReLU(),
                nn.Linear(1024, 10),
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("index", range(3))
def test_the_first_layer_of_the_published_mlp_leaks_whatever_the_noise(index: int) -> None:
    digits = load("digits")
    state = ModelState.of(PublishedMLP()).to(torch.float64)
    scenario = gl.Scenario(digits, state, CLIENT, indices=torch.tensor([index]))
    seen, truth = gl.simulate(scenario, generator=stream(index))
    claim = LinearLayer()(seen, generator=stream(1))
    assert claim.status == "solved"
    assert gl.metrics.psnr_db(claim.batch, truth.batch) > 120


def test_just_outside_its_theory_a_convolution_comes_first() -> None:
    digits = load("digits")
    state = ModelState.of(build("lenet-tiny+precode", digits.spec, seed=0))
    scenario = gl.Scenario(digits, state, CLIENT, indices=torch.tensor([0]))
    seen, _ = gl.simulate(scenario, generator=stream(0))
    assert LinearLayer()(seen, generator=stream(1)).status == "no_solution"


def test_a_network_without_a_bottleneck_is_refused_in_one_line() -> None:
    with pytest.raises(NotApplicable, match=r"NAME\+precode"):
        CLIENT.sample(state_of(TwoTwins), batch_of(1), generator=stream(0))
    with pytest.raises(InvalidInput, match="linear layer"):
        precode(OneWeight())


def test_a_frozen_noise_would_be_found() -> None:
    """ε read off 40 updates, n = 120: its mean square is 1 ± 6 √(2/n); a frozen ε is 0."""
    state, batch, source = state_of(Bottlenecked), batch_of(1), stream(6)

    def mean_square(update: Update) -> float:
        return float((CLIENT.latent_of(update, state) ** 2).mean())  # type: ignore[attr-defined]

    drawn = [mean_square(CLIENT.sample(state, batch, generator=source)) for _ in range(40)]
    assert sum(drawn) / 40 == pytest.approx(1, abs=6 * math.sqrt(2 / 120))
    assert mean_square(FedSGD().mean(state, batch)) < 1e-18


def test_training_draws_noise_and_lowers_loss_and_divergence() -> None:
    digits = load("digits")
    model = build("mlp+precode", digits.spec, seed=0)
    half = torch.arange(0, len(digits), 2)
    state = train(model, digits, half, steps=30, seed=0)
    again = train(model, digits, half, steps=30, seed=0)
    assert all(torch.equal(v, again.params[k]) for k, v in state.params.items())
    assert not any(v.any() for k, v in state.buffers.items() if k.endswith("latent_noise"))
    free = build("mlp+precode", digits.spec, seed=0)
    for layer in free.modules():
        if isinstance(layer, VariationalBottleneck):
            layer.divergence_weight.fill_(0.0)
    unpenalised = train(free, digits, half, steps=30, seed=0)
    name = next(k for k in state.params if k.endswith("encoder.bias"))
    assert not torch.equal(state.params[name], unpenalised.params[name])
