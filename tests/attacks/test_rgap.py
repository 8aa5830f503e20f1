"""R-GAP: exact inside its theory's range, an honest `no_solution` just outside it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import gradleak as gl
from gradleak.attacks.closed_form.ranks import recoverability
from gradleak.attacks.closed_form.rgap import RGap, logistic
from gradleak.mechanisms import FedAvg, FedSGD
from gradleak.models.layers import Normalize
from gradleak.models.seeding import seeded
from gradleak.types import Batch, DataSpec, Mechanism, ModelState, Reconstruction
from tests.laws.small import stream

SPEC = DataSpec.image(shape=(2, 8, 8), classes=4, bounds=(0.0, 1.0))
Activation = Callable[[], nn.Module]


def leaky() -> nn.Module:
    return nn.LeakyReLU(0.2)


def network(
    activation: Activation = leaky, *, bias: bool = False, outputs: int = 4, width: int = 16
) -> nn.Module:
    with seeded(3):
        return nn.Sequential(
            Normalize(),
            nn.Conv2d(2, width, 3, stride=2, padding=1, bias=bias),
            activation(),
            nn.Conv2d(width, width, 3, padding=1, bias=bias),
            activation(),
            nn.Flatten(),
            nn.Linear(width * 16, 20, bias=bias),
            activation(),
            nn.Linear(20, outputs, bias=bias),
        ).double()


def attacked(
    model: nn.Module,
    *,
    label: int = 1,
    mechanism: Mechanism | None = None,
    noise: float = 0.0,
    size: int = 1,
    dtype: torch.dtype = torch.float64,
) -> tuple[Reconstruction, Batch]:
    """R-GAP's claim and the batch behind it."""
    mechanism = mechanism or FedSGD()
    model = model.to(dtype)
    state = ModelState.of(model)
    inputs = torch.rand((size, *SPEC.shape), generator=stream(label), dtype=dtype)
    batch = Batch(inputs, torch.full((size,), label))
    values = mechanism.sample(state, batch, generator=stream(0)).values
    disturbed: dict[str, Tensor] = {
        k: v + noise * v.norm() / v.numel() ** 0.5 * torch.randn(v.shape, generator=stream(5)).to(v)
        for k, v in values.items()
    }
    seen = gl.observe(
        state,
        update=disturbed,
        kind=mechanism.kind,
        mechanism=mechanism,
        data=SPEC,
        batch_size=size,
    )
    return RGap()(seen, generator=stream(9)), batch


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", [leaky, nn.Tanh, nn.Sigmoid, nn.Softplus, nn.ELU])
def test_exact_for_every_invertible_activation(activation: Activation, bias: bool) -> None:
    for label in range(4):
        claim, truth = attacked(network(activation, bias=bias), label=label)
        assert claim.status == "solved", claim.message
        assert gl.metrics.psnr_db(claim.batch, truth) > 100
        assert claim.batch.labels.tolist() == [label]


@pytest.mark.parametrize("label", [0, 1])
def test_exact_behind_the_papers_logistic_output(label: int) -> None:
    mechanism = FedSGD(loss=logistic)
    claim, truth = attacked(network(outputs=1), label=label, mechanism=mechanism)
    assert claim.status == "solved", claim.message
    assert gl.metrics.psnr_db(claim.batch, truth) > 100
    assert claim.batch.labels.tolist() == [label]


def test_both_roots_are_tried() -> None:
    """A correctly classified example: −μ/(1 + e^μ) has two roots, on either side of 1.2785."""
    mechanism = FedSGD(loss=logistic)
    for scale in (0.5, 30.0):
        model = network(outputs=1)
        state = model.state_dict()
        head = [k for k in state if k.endswith("weight")][-1]
        state[head] *= scale
        logits = model(torch.rand((1, *SPEC.shape), generator=stream(1), dtype=torch.float64))
        label = int(logits[0, 0] > 0)
        claim, truth = attacked(model, label=label, mechanism=mechanism)
        assert claim.status == "solved", claim.message
        assert gl.metrics.psnr_db(claim.batch, truth) > 100


def test_single_precision_still_shows_the_picture() -> None:
    claim, truth = attacked(network(), dtype=torch.float32)
    assert claim.status == "solved", claim.message
    assert gl.metrics.psnr_db(claim.batch, truth) > 60


def test_a_thousandth_of_noise_is_noticed() -> None:
    claim, _ = attacked(network(), noise=1e-3)
    assert claim.status == "no_solution"
    assert "unexplained" in claim.message or "no single example" in claim.message


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"size": 2}, "the batch has 2"),
        ({"mechanism": FedAvg(steps=2, learning_rate=0.1)}, "plain gradient"),
    ],
)
def test_other_clients_have_no_solution(change: dict[str, object], words: str) -> None:
    claim, _ = attacked(network(), **change)  # type: ignore[arg-type]
    assert claim.status == "no_solution"
    assert words in claim.message


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        (nn.ReLU, "ReLU cannot be inverted"),
        (nn.GELU, "GELU cannot be inverted"),
        (nn.Hardswish, "Hardswish cannot be inverted"),
    ],
)
def test_other_layers_have_no_solution(layer: Activation, words: str) -> None:
    claim, _ = attacked(network(layer))
    assert claim.status == "no_solution"
    assert words in claim.message


def test_a_deficient_layer_is_foretold_and_found() -> None:
    """Two channels at half the size: 32 outputs and 36 gradients for 128 pixels."""
    poor = network(width=2)
    foretold = recoverability(ModelState.of(poor), SPEC)
    assert not isinstance(foretold, str)
    first = foretold[0]
    assert first.unknowns == 128
    assert first.weight_equations == 32
    assert not first.recoverable
    claim, _ = attacked(poor)
    assert claim.status == "no_solution"
    assert "fewer independent equations than unknowns" in claim.message
    rich = recoverability(ModelState.of(network()), SPEC)
    assert not isinstance(rich, str)
    assert all(layer.recoverable for layer in rich)
    assert [layer.name for layer in rich] == ["1", "3", "6", "8"]


def test_ranks_are_those_of_the_dense_equations() -> None:
    """Brute force: the stacked Jacobian of outputs and weight gradients in the layer's input."""
    model = network(width=6)
    found = recoverability(ModelState.of(model), SPEC)
    assert not isinstance(found, str)
    assert isinstance(model, nn.Sequential)
    layer = model[1]
    assert isinstance(layer, nn.Conv2d)
    x = torch.randn((1, 2, 8, 8), generator=stream(2), dtype=torch.float64)
    d = torch.randn(layer(x).shape, generator=stream(3), dtype=torch.float64)

    def equations(flat: Tensor) -> Tensor:
        z = torch.nn.functional.conv2d(flat.view(1, 2, 8, 8), layer.weight, None, 2, 1)
        patches = torch.nn.functional.unfold(flat.view(1, 2, 8, 8), 3, 1, 1, 2)[0]
        return torch.cat([z.flatten(), (d[0].flatten(1) @ patches.T).flatten()])

    dense = torch.autograd.functional.jacobian(equations, x.flatten())
    assert int(torch.linalg.matrix_rank(dense, rtol=1e-7)) == found[0].rank


def test_a_network_that_branches_is_no_chain() -> None:
    class Branched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.head = nn.Linear(128, 128), nn.Linear(128, 4)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.tanh(self.first(x.flatten(1)))
            return self.head(h + h.square())

    claim, _ = attacked(Branched().double())
    assert claim.status == "no_solution"
    assert "chain" in claim.message or "inverted" in claim.message
