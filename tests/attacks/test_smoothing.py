"""The smooth copy has the network's parameters, no kink, and the network as its limit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradleak.attacks.parts import smoothing
from gradleak.data import load
from gradleak.errors import NotApplicable
from gradleak.models import build
from gradleak.types import DataSpec, ModelState

SPEC = DataSpec.image((1, 8, 8), 10)


class Functional(nn.Module):
    """Calls its activation and its pooling as functions, and reuses one module twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3, padding=1)
        self.second = nn.Conv2d(4, 4, 3, padding=1)
        self.act = nn.LeakyReLU(0.1)
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.first(x)), 3, stride=2, padding=1)
        x = self.act(self.second(self.act(x)))
        return self.head(x.relu().flatten(1))


class Branching(nn.Module):
    """Cannot be traced: a branch on a value."""

    def __init__(self, *, functional: bool) -> None:
        super().__init__()
        self.first, self.act, self.head = nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10)
        self.functional = functional

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() < -1e9:
            return x
        x = self.first(x.flatten(1))
        return self.head(torch.relu(x) if self.functional else self.act(x))


def smooth_of(model: nn.Module) -> nn.Module:
    model = model.double().eval()
    network = smoothing.swapped(model)
    smoothing.measure(network, ModelState.of(model), SPEC)
    return network


with torch.random.fork_rng():
    torch.manual_seed(0)
    FUNCTIONAL = Functional()
    RELU6 = nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.ReLU6())


@pytest.mark.parametrize(
    "model",
    [
        FUNCTIONAL,
        build("convnet", SPEC, seed=0),
        build("resnet18", SPEC, seed=0),
        RELU6,
    ],
    ids=["functional", "convnet", "resnet18", "relu6"],
)
def test_the_copy_tends_to_the_network_under_the_same_names(model: nn.Module) -> None:
    network = smooth_of(model)
    assert {k for k, _ in network.named_parameters()} == {k for k, _ in model.named_parameters()}
    x = smoothing.natural_like(SPEC, 3)
    with torch.no_grad():
        truth = model(x)
        gaps = [
            float((smoothing.at_beta(network, b)(x) - truth).norm() / truth.norm())
            for b in (4.0, 64.0, 1e6)
        ]
        torch.testing.assert_close(network(x), truth)
    assert gaps[0] > gaps[1] > gaps[2]
    assert gaps[2] < 1e-4


def test_spreads_are_measured_layer_by_layer_and_kept_by_copies() -> None:
    network = smooth_of(build("convnet", SPEC, seed=0))
    layers = [m for m in network.modules() if isinstance(m, smoothing.Smooth)]
    spreads = [layer.spread for layer in layers]
    assert len(set(spreads)) == len(spreads) == 4
    copies = [
        m for m in smoothing.at_beta(network, 8.0).modules() if isinstance(m, smoothing.Smooth)
    ]
    assert [c.sharpness for c in copies] == pytest.approx([8.0 / s for s in spreads])


def test_a_smooth_network_has_nothing_to_smooth() -> None:
    assert not smoothing.kinked(smooth_of(build("lenet-tiny", SPEC, seed=0)))


def test_a_network_that_cannot_be_traced_has_its_modules_swapped() -> None:
    assert smoothing.kinked(smooth_of(Branching(functional=False)))


@pytest.mark.parametrize(
    "model",
    [Branching(functional=True), nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.Hardswish())],
)
def test_a_kink_that_cannot_be_swapped_is_refused_by_name(model: nn.Module) -> None:
    with pytest.raises(NotApplicable, match=r"relu|hardswish"):
        smooth_of(model)


def test_synthetic_images_spread_activations_as_photographs_do() -> None:
    """On digits only roughly (they are mostly black): within a factor of two, every layer."""
    digits = load("digits")
    model = build("convnet", SPEC, seed=0).double()
    network = smooth_of(model)
    spreads = [m.spread for m in network.modules() if isinstance(m, smoothing.Smooth)]
    found: list[float] = []
    for layer in model.modules():
        if isinstance(layer, nn.ReLU):
            layer.register_forward_pre_hook(lambda _, x: found.append(float(x[0].std())))
    with torch.no_grad():
        model(digits.batch(range(8)).inputs.double())
    for own, real in zip(spreads, found, strict=True):
        assert 0.5 < own / real < 2


@pytest.mark.parametrize(("window", "stride", "padding"), [(2, 2, 0), (3, 2, 1), (3, 3, 0)])
@pytest.mark.parametrize("size", [7, 8, 9, 10])
def test_pooling_with_sizes_rounded_up_has_the_pooling_as_its_limit(
    window: int, stride: int, padding: int, size: int
) -> None:
    pool = nn.MaxPool2d(window, stride, padding, ceil_mode=True)
    smooth = smoothing.SmoothMaxPool(pool)
    a = torch.randn((2, 3, size, size), generator=torch.Generator().manual_seed(0)).double()
    assert torch.equal(smooth(a), pool(a))
    smooth.beta = 1e6
    torch.testing.assert_close(smooth(a), pool(a), rtol=0, atol=1e-5)
