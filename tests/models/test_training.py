"""Training stages."""

from __future__ import annotations

import pytest
import torch

from gradleak.data import Dataset, load, split
from gradleak.errors import Diverged, InvalidInput
from gradleak.models import STAGES, accuracy, build, stage_steps, train
from gradleak.types import DataSpec, ModelState


@pytest.fixture(scope="module")
def digits():
    return load("digits")


def test_training_moves_from_chance_to_skill(digits):
    parts = split(digits, 0)
    model = build("mlp", digits.spec, seed=0)
    states = [train(model, digits, parts.clients, steps=s, seed=0) for s in (0, 100)]
    before, after = (accuracy(s, digits, parts.public) for s in states)
    # A guess is right with p = 0.1: of n = 898, P(share > 0.17) < 1e-9; the seed is fixed.
    assert before < 0.3
    assert after > 0.85


def test_the_model_and_the_global_state_stay_as_they_were(digits):
    model = build("mlp", digits.spec, seed=0).eval()
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    random = torch.get_rng_state()
    state = train(model, digits, torch.arange(100), steps=3, seed=0)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not model.training
    assert state.model is model
    assert not torch.equal(state.params["2.weight"], weights["2.weight"])
    accuracy(state, digits, torch.arange(10))
    assert not model.training


def test_no_steps_give_the_initial_state(digits):
    model = build("lenet-tiny", digits.spec, seed=0)
    state = train(model, digits, torch.arange(10), steps=0, seed=0)
    assert all(torch.equal(v, state.params[k]) for k, v in ModelState.of(model).params.items())


def test_equal_seeds_give_equal_weights_even_with_dropout(digits):
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Dropout(), torch.nn.Linear(64, 10))
    runs = [
        train(model, digits, torch.arange(200), steps=4, seed=s).params["2.weight"]
        for s in (5, 5, 6)
    ]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_batch_statistics_are_learned(digits):
    model = torch.nn.Sequential(
        torch.nn.BatchNorm2d(1), torch.nn.Flatten(), torch.nn.Linear(64, 10)
    )
    state = train(model, digits, torch.arange(500), steps=60, seed=0)
    assert int(state.buffers["0.num_batches_tracked"]) == 60
    mean = float(digits.batch(torch.arange(500)).inputs.mean())
    assert float(state.buffers["0.running_mean"]) == pytest.approx(mean, rel=0.05)


def test_progress_is_told_after_each_step(digits):
    told = []
    train(
        build("mlp", digits.spec, seed=0),
        digits,
        torch.arange(5),
        steps=3,
        seed=0,
        progress=lambda done, total: told.append((done, total)),
    )
    assert told == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize(("text", "steps"), [*STAGES.items(), ("0", 0), ("250", 250)])
def test_stages_are_names_or_steps(text, steps):
    assert stage_steps(text) == steps


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("trianed", "did you mean 'trained'"),
        ("-5", "whole number"),
        ("1.5", "whole number"),
        ("99999999999999999999", "1000000"),
        ("", "early"),
        ("²", "whole number"),
    ],
)
def test_other_stages_are_refused(text, words):
    with pytest.raises(InvalidInput) as caught:
        stage_steps(text)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "options",
    [{"steps": -1}, {"batch_size": 0}, {"learning_rate": 0.0}, {"learning_rate": float("nan")}],
)
def test_senseless_options_are_refused(digits, options):
    model = build("mlp", digits.spec, seed=0)
    with pytest.raises(InvalidInput, match="training for"):
        train(model, digits, torch.arange(5), **{"steps": 1, "seed": 0, **options})


def test_no_examples_are_refused(digits):
    model = build("mlp", digits.spec, seed=0)
    nothing = torch.arange(0)
    with pytest.raises(InvalidInput, match="no examples"):
        train(model, digits, nothing, steps=1, seed=0)
    with pytest.raises(InvalidInput, match="no examples"):
        accuracy(ModelState.of(model), digits, nothing)


def test_divergence_is_an_error_and_not_a_state(digits):
    model = build("mlp", digits.spec, seed=0)
    with pytest.raises(Diverged, match="learning rate below"):
        train(model, digits, torch.arange(50), steps=50, seed=0, learning_rate=1e30)


def test_accuracy_counts_right_answers():
    class Constant(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.logits = torch.nn.Parameter(torch.tensor([0.0, 1.0, 0.0]))

        def forward(self, inputs):
            return self.logits.expand(len(inputs), 3)

    data = Dataset.of("ones", torch.zeros(600, 1, 2, 2), torch.arange(600) % 3)
    assert data.spec == DataSpec.image((1, 2, 2), 3)
    state = ModelState.of(Constant())
    assert accuracy(state, data, torch.arange(600)) == pytest.approx(1 / 3)
    assert accuracy(state, data, torch.tensor([1, 4, 5])) == pytest.approx(2 / 3)
