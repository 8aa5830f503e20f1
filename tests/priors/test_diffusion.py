"""A diffusion prior: its network, its means, and what it draws."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor

from gradleak import priors
from gradleak.denoising import UNet
from gradleak.errors import InvalidInput, NotApplicable
from gradleak.priors import Denoiser, Diffusion
from gradleak.types import Batch, DataSpec
from tests.laws.small import stream

DATA = DataSpec.image((1, 8, 8), 2, bounds=(0.0, 2.0))


def public(n: int = 60) -> Batch:
    """Two classes: bright left halves, and bright right ones."""
    labels = torch.arange(n) % 2
    inputs = 0.1 * torch.rand((n, 1, 8, 8), generator=stream(0))
    inputs[labels == 0, :, :, :4] += 1.5
    inputs[labels == 1, :, :, 4:] += 1.5
    return Batch(inputs, labels)


@cache
def prior(*, conditional: bool = True) -> Denoiser:
    family = Diffusion(steps=3, batch_size=60, width=8, timesteps=20, conditional=conditional)
    fitted = family.fit(public(), DATA, seed=0)
    assert isinstance(fitted, Denoiser)
    return fitted


def test_the_output_is_the_networks_of_scaled_images() -> None:
    known, x, times = prior(), torch.randn((3, 1, 8, 8), generator=stream(1)), torch.arange(3)
    network = UNet(1, width=8, classes=2)
    network.load_state_dict(dict(known.network))
    for labels in (None, torch.tensor([0, 1, 0])):
        with torch.no_grad():
            wanted = network(x, times, labels)
        torch.testing.assert_close(known.output(x, times, labels), wanted)
    told = known.output(x, times, torch.tensor([0, 1, 0]), guidance=2.0)
    labels = torch.tensor([0, 1, 0])
    free, conditional = known.output(x, times), known.output(x, times, labels)
    torch.testing.assert_close(told, 3 * conditional - 2 * free)
    inputs = public(4).inputs
    assert float(known.scaled(inputs).min()) >= -1
    torch.testing.assert_close(known.unscaled(known.scaled(inputs)), inputs)


def test_labels_are_nothing_to_an_unconditional_prior() -> None:
    known, x, times = prior(conditional=False), torch.randn((2, 1, 8, 8)), torch.tensor([0, 3])
    assert torch.equal(known.output(x, times), known.output(x, times, torch.tensor([0, 1])))
    assert not [name for name in known.network if "class" in name]


def test_its_means_are_those_of_the_examples_it_saw() -> None:
    """Three minibatches of 60 with replacement: pixels of std 0.03 in 90 images, 6 SE."""
    known, given = prior(), public()
    for label in (0, 1):
        wanted = given.inputs[given.labels == label].mean(0)
        found = known.mean(torch.tensor([label]))[0]
        torch.testing.assert_close(found, wanted, rtol=0, atol=0.02)
    both = known.mean(torch.tensor([[0.25, 0.75]]))[0]
    mixed = 0.25 * known.mean(torch.tensor([0]))[0] + 0.75 * known.mean(torch.tensor([1]))[0]
    torch.testing.assert_close(both, mixed)
    assert known.mean(3).shape == (3, 1, 8, 8)


def test_samples_are_images_of_the_generators() -> None:
    known = prior()
    for labels in (2, torch.tensor([0, 1]), torch.tensor([[0.5, 0.5], [1.0, 0.0]])):
        drawn = [known.sample(labels, generator=stream(s)) for s in (0, 0, 1)]
        assert drawn[0].shape == (2, 1, 8, 8)
        assert torch.equal(drawn[0], drawn[1])
        assert not torch.equal(drawn[0], drawn[2])
        assert 0 <= float(drawn[0].min()) <= float(drawn[0].max()) <= 2


def test_images_are_differentiable_in_latents_and_weights() -> None:
    known = prior()
    latents = (0.2 * torch.randn((1, 1, 8, 8), generator=stream(2))).requires_grad_()
    weights = {k: v.clone().requires_grad_() for k, v in known.network.items()}
    drawn = known.images(latents, steps=2, weights=weights)
    assert torch.equal(drawn, known.images(latents, steps=2))
    slopes: list[Tensor] = list(
        torch.autograd.grad(drawn.sum(), (latents, weights["first.weight"]), allow_unused=False)
    )
    assert all(bool(s.isfinite().all()) for s in slopes)
    anomaly = known.anomaly(drawn.detach(), torch.tensor([3]), torch.zeros_like(drawn))
    assert anomaly.shape == (1,)
    with pytest.raises(NotApplicable, match="no density"):
        known.log_prob(drawn)


def test_weights_of_another_network_are_refused() -> None:
    known = prior()
    weights = {k: v for k, v in known.weights.items() if k != "network.last.bias"}
    with pytest.raises(InvalidInput, match="differ from its family's"):
        Denoiser(known.family, known.data, weights, known.examples)
    assert priors.PRIORS["diffusion"] is Diffusion
