"""Peeling: exact where the equations outnumber the unknowns, and no claim where they do not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import gradleak as gl
from gradleak.attacks.closed_form.disaggregate import Separated, disaggregate
from gradleak.attacks.closed_form.peel import (
    Activations,
    Place,
    at_head,
    head_place,
    peel,
    places,
)
from gradleak.attacks.parts import smoothing
from gradleak.data import load
from gradleak.types import ModelState, Observation
from tests.laws.small import stream

DIGITS = load("digits")


def seeded(*layers: nn.Module) -> nn.Sequential:
    """The layers with weights that do not depend on the order of tests."""
    model = nn.Sequential(*layers)
    source = stream(8)
    with torch.no_grad():
        for p in model.parameters():
            fan = p[0].numel() if p.ndim > 1 else 100
            p.copy_(torch.randn(p.shape, generator=source) / fan**0.5)
    return model


def convolutional(*, pooled: bool = False) -> nn.Sequential:
    """Three convolutions for 8×8 digits; the second one's inputs are overdetermined."""
    middle: list[nn.Module] = [nn.MaxPool2d(2), nn.ReLU()] if pooled else [nn.ReLU()]
    return seeded(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 24, 3, padding=1),
        *middle,
        nn.Conv2d(24, 48, 3, stride=1 if pooled else 2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(48 * 16, 10),
    )


def fully_connected() -> nn.Sequential:
    return seeded(
        nn.Flatten(),
        nn.Linear(64, 120),
        nn.ReLU(),
        nn.Linear(120, 200),
        nn.ReLU(),
        nn.Linear(200, 10),
    )


def seen_of(model: nn.Module, size: int) -> tuple[Observation, Tensor]:
    """A gradient in float64, and the images in ascending order of their distinct labels."""
    indices = [int((DIGITS.labels == label).nonzero()[3]) for label in range(size)]
    state = ModelState.of(model).to(torch.float64)
    scenario = gl.Scenario(DIGITS, state, batch_size=size, indices=torch.tensor(indices))
    seen, truth = gl.simulate(scenario, generator=stream(0))
    order = truth.batch.labels.argsort()
    return seen, truth.batch.inputs[order].double()


def chain_of(seen: Observation) -> list[Place]:
    network = smoothing.swapped(seen.state.model)
    smoothing.measure(network, seen.state, seen.data)
    return places(network)


def peeled(seen: Observation, chain: list[Place]) -> tuple[int, Activations]:
    separated = disaggregate(seen)
    assert isinstance(separated, Separated), separated
    return peel(seen, separated, chain)


def entering(place: Place, inputs: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = place.below.double()(inputs)
    return found


def assert_known(found: Activations, place: Place, inputs: Tensor, seen: Observation) -> None:
    """Features are those of the truth, and the cotangents give its gradients below."""
    assert not any(
        name.startswith(f"{place.reader}.") for name, _ in place.below.named_parameters()
    )
    torch.testing.assert_close(found.features, entering(place, inputs).relu(), rtol=0, atol=1e-8)
    parameters = dict(place.below.double().named_parameters())
    product = (place.below(inputs) * found.cotangents).sum()
    gradients = torch.autograd.grad(product, list(parameters.values()))
    for name, gradient in zip(parameters, gradients, strict=True):
        torch.testing.assert_close(gradient, seen.update.values[name], rtol=1e-6, atol=1e-9)


def test_places_chain_from_the_head_down() -> None:
    seen, _ = seen_of(convolutional(), 1)
    assert [(p.reader, p.writer) for p in chain_of(seen)] == [("7", "4"), ("4", "2"), ("2", "0")]


@pytest.mark.parametrize("size", [1, 3])
def test_activations_and_errors_are_exact_for_a_batch(size: int) -> None:
    seen, inputs = seen_of(convolutional(), size)
    chain = chain_of(seen)
    depth, found = peeled(seen, chain)
    assert depth >= 1
    assert_known(found, chain[depth], inputs, seen)


def test_linear_layers_are_peeled_down_to_the_first() -> None:
    seen, inputs = seen_of(fully_connected(), 2)
    chain = chain_of(seen)
    depth, found = peeled(seen, chain)
    assert depth == 1
    assert_known(found, chain[1], inputs, seen)


def test_a_pooling_ends_the_chain_and_is_part_of_what_lies_below() -> None:
    seen, inputs = seen_of(convolutional(pooled=True), 1)
    chain = chain_of(seen)
    assert [(p.reader, p.writer) for p in chain] == [("8", "5"), ("5", None)]
    depth, found = peeled(seen, chain)
    assert depth == 1
    assert_known(found, chain[1], inputs, seen)


def test_more_unknowns_than_equations_are_not_claimed() -> None:
    """Five examples of 24 × 8 × 8 unknowns against 24 · 48 · 9 equations and active units."""
    narrow = seeded(
        nn.Conv2d(1, 24, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(24, 16, 3, padding=1, stride=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * 64, 10),
    )
    seen, inputs = seen_of(narrow, 5)
    chain = chain_of(seen)
    depth, found = peeled(seen, chain)
    assert depth == 0
    assert_known(found, chain[0], inputs, seen)


def test_a_gradient_that_no_input_explains_is_not_peeled() -> None:
    """Only the middle layer's gradient is disturbed, by a thousandth."""
    seen, _ = seen_of(convolutional(), 1)
    wrong = {k: v.clone() for k, v in seen.update.values.items()}
    noise = torch.randn(wrong["4.weight"].shape, generator=stream(1), dtype=torch.float64)
    wrong["4.weight"] += 1e-3 * wrong["4.weight"].norm() * noise / noise.norm()
    exchange = replace(seen.exchanges[0], update=replace(seen.update, values=wrong))
    seen = replace(seen, exchanges=(exchange,))
    assert peeled(seen, chain_of(seen))[0] == 0


def test_a_head_that_reads_no_relu_has_a_place_but_nothing_to_peel() -> None:
    averaged = seeded(
        nn.Conv2d(1, 24, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 10)
    )
    seen, inputs = seen_of(averaged, 2)
    assert chain_of(seen) == []
    place = head_place(smoothing.swapped(averaged))
    assert place is not None
    separated = disaggregate(seen)
    assert isinstance(separated, Separated), separated
    found = at_head(seen, separated, place)
    torch.testing.assert_close(found.features, entering(place, inputs), rtol=0, atol=1e-8)
