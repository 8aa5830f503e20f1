"""The convolutional bottleneck: its gradient spelled out, and what a search over noise finds."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, softplus

from gradleak.data import load
from gradleak.defenses import ConvolutionalBottleneck, difference, norm
from gradleak.defenses.cvb import cvb
from gradleak.defenses.precode import Latent, VariationalBottleneck
from gradleak.errors import InvalidInput, NotApplicable
from gradleak.mechanisms import FedSGD
from gradleak.models import build, train
from gradleak.types import ModelState
from tests.laws.small import Convolved, TwoTwins, batch_of, state_of, stream

CLIENT = ConvolutionalBottleneck()(FedSGD())


@pytest.mark.parametrize("size", [1, 3])
def test_the_update_is_the_gradient_at_the_noise_drawn(size: int) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Convolved().double()
    state, batch = ModelState.of(network), batch_of(size)
    assert isinstance(CLIENT, Latent)
    shape = CLIENT.latent_shape(state, batch_size=size)
    assert shape == (size, 1, 2, 2)
    sent = CLIENT.sample(state, batch, generator=stream(5)).values
    noise = torch.randn(shape, generator=stream(5), dtype=torch.float64)

    first, bottleneck = network.conv[0], network.conv[1]  # type: ignore[index]
    mean, scale = bottleneck.encoder(first(batch.inputs)).chunk(2, 1)
    sigma = softplus(scale)
    h = torch.tanh(bottleneck.decoder(mean + sigma * noise)).flatten(1)
    logits = TwoTwins.forward(network, network.widen(h))
    normal = torch.distributions.Normal
    kl = torch.distributions.kl_divergence(normal(mean, sigma), normal(0.0, 1.0))
    loss = cross_entropy(logits, batch.labels)
    loss = loss + 1e-3 / 4 * kl.flatten(1).sum(1).mean() / math.log(2)
    named = dict(network.named_parameters())
    expected = dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))
    assert sent.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(sent[name], value, rtol=1e-6, atol=1e-12)


def test_only_the_noise_explains_the_update() -> None:
    state, batch = state_of(Convolved), batch_of(2)
    assert isinstance(CLIENT, Latent)
    sent = CLIENT.sample(state, batch, generator=stream(5))
    shape = CLIENT.latent_shape(state, batch_size=2)
    noise = torch.randn(shape, generator=stream(5), dtype=torch.float64)
    assert norm(difference(CLIENT.predict_given(sent, state, batch, noise), sent)) == 0
    held = CLIENT.predict(sent, state, batch)
    assert norm(difference(held, sent)) > 1e-2 * norm(sent)
    assert CLIENT.spent(state) == frozenset()


def test_networks_are_built_and_trained_with_it() -> None:
    digits = load("digits")
    model = build("lenet-tiny+cvb", digits.spec, seed=0)
    (bottleneck,) = (m for m in model.modules() if isinstance(m, VariationalBottleneck))
    assert bottleneck.latent_noise.shape == (1, 4, 8, 8)
    state = train(model, digits, torch.arange(200), steps=3, seed=0)
    assert not any(v.any() for k, v in state.buffers.items() if k.endswith("latent_noise"))


def test_a_network_without_its_place_is_refused_in_one_line() -> None:
    with pytest.raises(NotApplicable, match=r"NAME\+cvb"):
        CLIENT.sample(state_of(TwoTwins), batch_of(1), generator=stream(0))
    with pytest.raises(InvalidInput, match="convolution"):
        cvb(nn.Sequential(nn.Linear(2, 2)), (2,))
