"""The objective's door: engines agree with each other and with plain autograd."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import gradleak as gl
from gradleak.attacks import DLG, InvertingGradients
from gradleak.attacks.parts.matching import Matching
from gradleak.defenses import DEFENSES
from gradleak.errors import InvalidInput
from gradleak.mechanisms import FedAvg, FedSGD
from gradleak.types import Mechanism, Observation
from tests.laws.small import NEEDED, SPEC, Normalised, TwoTwins, batch_of, state_of, stream

CORES: dict[str, Mechanism] = {
    "fedsgd": FedSGD(),
    "fedsgd-train": FedSGD(batch_norm="train"),
    "fedavg": FedAvg(steps=2, learning_rate=0.1),
}


def observations(
    mechanism: Mechanism, count: int, *, size: int = 2, network: type[nn.Module] = Normalised
) -> list[Observation]:
    state = state_of(network)
    return [
        gl.observe(
            state,
            update=mechanism.sample(state, batch_of(size, seed=i), generator=stream(i)).values,
            kind=mechanism.kind,
            mechanism=mechanism,
            data=SPEC,
            batch_size=size,
            labels=batch_of(size, seed=i).labels,
        )
        for i in range(count)
    ]


@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("defense", DEFENSES)
def test_vmap_and_loop_agree(core: str, defense: str) -> None:
    network = NEEDED.get(defense, Normalised)
    seen = observations(DEFENSES[defense]()(CORES[core]), 3, network=network)
    objective = replace(DLG().compose(seen), targets=(0, 1, 2))
    variables = objective.unknown.start(stream(0), restarts=3)
    results = {
        engine: replace(objective, engine=engine).value_and_gradient(variables, [0, 1, 2])
        for engine in ("vmap", "loop")
    }
    (values, gradients), (looped, looped_gradients) = results["vmap"], results["loop"]
    torch.testing.assert_close(values, looped, rtol=1e-10, atol=1e-14)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, looped_gradients[name], rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_the_gradient_is_plain_autograds(mode: Literal["eval", "train"]) -> None:
    (seen,) = observations(FedSGD(batch_norm=mode), 1)
    objective = DLG().compose([seen])
    variables = objective.unknown.start(stream(1), restarts=1)
    value, gradient = objective.value_and_gradient(variables, [0])

    model = Normalised().double().train(mode == "train")
    model.load_state_dict({**seen.state.params, **seen.state.buffers})
    inputs = variables["inputs"][0].clone().requires_grad_()
    logits = variables["logits"][0].clone().requires_grad_()
    loss = cross_entropy(model(inputs), logits.softmax(1))
    update = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
    target = seen.update.values.values()
    distance = sum(((u - t) ** 2).sum() for u, t in zip(update, target, strict=True))
    wanted = torch.autograd.grad(distance, (inputs, logits))  # type: ignore[arg-type]
    torch.testing.assert_close(value[0], torch.as_tensor(distance).detach())
    torch.testing.assert_close(gradient["inputs"][0], wanted[0])
    torch.testing.assert_close(gradient["logits"][0], wanted[1])


@pytest.mark.parametrize("core", CORES)
def test_the_fit_is_zero_at_the_truth_and_only_there(core: str) -> None:
    (seen,) = observations(CORES[core], 1)
    truth, other = batch_of(2, seed=0), batch_of(2, seed=9)
    assert DLG().fit(seen)(truth) == pytest.approx(0, abs=1e-20)
    assert InvertingGradients().fit(seen)(truth) == pytest.approx(0, abs=1e-5)
    assert DLG().fit(seen)(other) > 1e-4


def test_believing_the_wrong_batch_norm_mode_shows_at_the_truth() -> None:
    (seen,) = observations(CORES["fedsgd-train"], 1)
    mistaken = replace(seen, mechanism=FedSGD(batch_norm="eval"))
    assert DLG().fit(mistaken)(batch_of(2, seed=0)) > 1e-4


def test_large_groups_are_cut_to_the_memory_at_hand() -> None:
    seen = observations(FedSGD(), 3)
    objective = replace(DLG().compose(seen), targets=(0, 1, 2), engine="vmap")
    variables = objective.unknown.start(stream(0), restarts=3)
    whole = objective.value_and_gradient(variables, [0, 1, 2])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(objective), "trials_at_once", property(lambda self: 2))
        cut = objective.value_and_gradient(variables, [0, 1, 2])
    torch.testing.assert_close(whole[0], cut[0])
    torch.testing.assert_close(whole[1]["inputs"], cut[1]["inputs"])


def test_observations_of_different_states_do_not_mix() -> None:
    first, second = observations(FedSGD(), 1) + observations(FedSGD(), 1)
    with pytest.raises(InvalidInput, match="differ in state"):
        Matching([first, second], lambda p, r: p["head.bias"].sum(), dtype=torch.float64)


def test_a_group_starts_each_target_where_it_would_start_alone() -> None:
    seen = observations(FedSGD(), 3)
    attack = DLG(steps=5, restarts=2)
    together = gl.attack_all(attack, seen, seed=7)
    for i, claim in enumerate(together):
        alone = attack(seen[i], generator=gl.attacks.target_generator(7, i))
        torch.testing.assert_close(alone.batch.inputs, claim.batch.inputs, rtol=0, atol=1e-6)
        assert alone.evaluations == claim.evaluations


def test_mixed_precision_states_and_twins_compose() -> None:
    state = state_of(TwoTwins)
    update = FedSGD().mean(state, batch_of(1)).values
    seen = gl.observe(state.to(torch.float32), update=update, data=SPEC, batch_size=1)
    claim = InvertingGradients(steps=3)(seen, generator=stream(0))
    assert claim.batch.inputs.dtype == torch.float32
