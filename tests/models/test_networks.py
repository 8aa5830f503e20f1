"""The built-in networks: shapes, sizes, initialisation, and derivatives of derivatives."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from gradleak.denoising import denoises
from gradleak.errors import InvalidInput
from gradleak.models import MODELS, build
from gradleak.types import DataSpec, ModelState

MNIST = DataSpec.image((1, 28, 28), 10)
CIFAR = DataSpec.image((3, 32, 32), 10)
DIGITS = DataSpec.image((1, 8, 8), 10)
PARAMETERS = {
    ("mlp", DIGITS): 9_610,
    ("mlp", MNIST): 101_770,
    ("mlp", CIFAR): 394_634,
    ("lenet", DIGITS): 8_026,
    ("lenet", MNIST): 13_426,
    ("lenet", CIFAR): 15_826,
    ("lenet-tiny", DIGITS): 1_954,
    ("convnet", MNIST): 91_594,
    ("convnet", CIFAR): 101_482,
    ("convnet-bn", CIFAR): 101_658,
    ("cnn6", CIFAR): 154_256,
    ("vit-tiny", MNIST): 156_490,
    ("resnet18", MNIST): 11_172_810,
    ("resnet18", CIFAR): 11_173_962,
}


@pytest.mark.parametrize(("name", "spec"), PARAMETERS)
def test_the_number_of_parameters(name, spec):
    model = build(name, spec, seed=0)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name, spec]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 4, 4), (2, 13, 9), (1, 28, 28)])
def test_any_image_size_fits(name, shape):
    if name == "unet-diffusers" and shape == (2, 13, 9):
        pytest.skip("it halves sides twice and doubles them again: multiples of 4 alone")
    model = build(name, DataSpec.image(shape, 7), seed=0).eval()
    if MODELS[name].denoiser:
        assert denoises(model)
        assert model(torch.rand(2, *shape), torch.tensor([0, 3])).shape == (2, *shape)
    else:
        assert not denoises(model)
        assert model(torch.rand(2, *shape)).shape == (2, 7)


@pytest.mark.parametrize("name", ["lenet", "lenet-tiny"])
def test_lenet_starts_uniform_within_one_half(name):
    model = build(name, CIFAR, seed=3)
    values = torch.cat([p.detach().flatten() for p in model.parameters()]).double().sort().values
    assert float(values.abs().max()) <= 0.5
    # Kolmogorov-Smirnov against U(-0.5, 0.5), n > 10,000: P(distance > 2.7/sqrt(n)) < 1e-6.
    n = len(values)
    assert n > 10_000
    distance = (values + 0.5 - torch.arange(1, n + 1) / n).abs().max()
    assert float(distance) < 2.7 / n**0.5
    # The default initialisation of torch would be far narrower: the check is not vacuous.
    default = build("convnet", CIFAR, seed=3)[-1].weight.detach()
    assert float(default.abs().max()) < 0.1


@pytest.mark.parametrize("name", MODELS)
def test_seeds_fix_the_weights_and_leave_the_global_state(name):
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    first, again, other = (build(name, DIGITS, seed=s).state_dict() for s in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])  # noqa: NPY002
    assert random.getstate() == states[2]
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert any(not torch.equal(first[k], other[k]) for k in first)


def losses(model, state):
    def loss(params, inputs, labels):
        if denoises(model):
            given = (inputs, 100 * labels)  # times, here
            output = functional_call(model, {**params, **state.buffers}, given)
            return (output - inputs).square().mean()
        logits = functional_call(model, {**params, **state.buffers}, (inputs,))
        return F.cross_entropy(logits, labels)

    return loss


@pytest.mark.parametrize("name", MODELS)
def test_per_trial_gradients_by_vmap_equal_those_one_by_one(name):
    model = build(name, DIGITS, seed=0).eval()
    state = ModelState.of(model).to(torch.float64)
    loss = losses(model, state)
    generator = torch.Generator().manual_seed(0)
    inputs = torch.rand(3, 2, 1, 8, 8, dtype=torch.float64, generator=generator)
    labels = torch.tensor([[0, 1], [2, 3], [9, 9]])
    together = vmap(grad(loss), in_dims=(None, 0, 0))(state.params, inputs, labels)
    for trial in range(3):
        alone = grad(loss)(state.params, inputs[trial], labels[trial])
        for key, value in alone.items():
            torch.testing.assert_close(together[key][trial], value, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", MODELS)
def test_double_backward_agrees_with_a_finite_difference(name):
    model = build(name, DIGITS, seed=0).eval()
    state = ModelState.of(model).to(torch.float64)
    loss = losses(model, state)
    generator = torch.Generator().manual_seed(0)
    truth, start, direction = torch.rand(3, 1, 1, 8, 8, dtype=torch.float64, generator=generator)
    labels = torch.tensor([4])
    target = grad(loss)(state.params, truth, labels)

    def matching(inputs):
        there = grad(loss)(state.params, inputs, labels)
        return sum((there[k] - target[k]).square().sum() for k in target)

    slope = float((grad(matching)(start) * direction).sum())
    step = 1e-6  # small enough that no ReLU of these seeds changes sign
    forward, back = (float(matching(start + s * direction)) for s in (step, -step))
    assert slope == pytest.approx((forward - back) / (2 * step), rel=1e-4)
    assert abs(slope) > 1e-12
    inputs = start.clone().requires_grad_(True)
    matching(inputs).backward()
    assert float((inputs.grad * direction).sum()) == pytest.approx(slope, rel=1e-9)


def test_resnet_in_training_mode_uses_and_updates_batch_statistics():
    model = build("resnet18", DIGITS, seed=0)
    before = {k: v.clone() for k, v in model.named_buffers()}
    model.train()(torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0)))
    changed = [k for k, v in model.named_buffers() if not torch.equal(v, before[k])]
    # 20 batch normalisations (stem, 16 in blocks, 3 shortcuts), three buffers each.
    assert len(changed) == 60
    assert all(
        about.batch_norm == (name in ("resnet18", "convnet-bn")) for name, about in MODELS.items()
    )


def test_normalisation_is_no_parameter():
    state = ModelState.of(build("convnet", CIFAR, seed=0))
    assert {k: float(v) for k, v in state.buffers.items()} == {"0.mean": 0.5, "0.std": 0.25}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("lennet", "did you mean 'lenet'"),
        ("", "unknown model"),
        ("mlp:hidden=5", "has no fields"),
        ("resnet50", "resnet18"),
    ],
)
def test_unknown_names(name, words):
    with pytest.raises(InvalidInput) as caught:
        build(name, MNIST, seed=0)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_networks_for_images_refuse_other_data():
    with pytest.raises(InvalidInput, match="images"):
        build("mlp", DataSpec("tabular", (14,), (0.0, 1.0), 2), seed=0)
