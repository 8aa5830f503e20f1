"""Noise and times that a client keeps to itself are out of the attacker's reach."""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

import gradleak as gl
from gradleak.attacks.recipes.gidm_plus import GIDMPlus
from gradleak.data import Dataset
from gradleak.denoising import UNet
from gradleak.mechanisms import Denoising, DenoisingAvg, Draws
from gradleak.threat import Truth
from gradleak.types import Exchange, Fact, Mechanism, ModelState, Observation
from tests.laws.small import SPEC, stream

IMAGES = torch.rand((3, 1, 4, 4), generator=stream(0))


def reachable(root: object) -> Iterator[object]:
    """Everything that an attacker holding `root` can get at without the package's modules."""
    seen: set[int] = set()
    kept, stack = [], [root]
    while stack:
        thing = stack.pop()
        if id(thing) in seen or isinstance(thing, type | types.ModuleType | str | bytes):
            continue
        seen.add(id(thing))
        kept.append(thing)  # so that no id is given twice
        yield thing
        if isinstance(thing, Mapping):
            stack += [*thing.keys(), *thing.values()]
        elif isinstance(thing, list | tuple | set | frozenset):
            stack += thing
        elif isinstance(thing, partial):
            stack += [thing.func, thing.args, thing.keywords]
        elif isinstance(thing, types.MethodType):
            stack += [thing.__self__, thing.__func__]
        elif isinstance(thing, types.FunctionType):
            stack += [thing.__defaults__, thing.__kwdefaults__]
            stack += [c.cell_contents for c in thing.__closure__ or ()]
        if isinstance(thing, Tensor):
            stack += [thing.grad if thing.is_leaf else None, thing.grad_fn]
        stack.append(getattr(thing, "__dict__", None))
        for kind in type(thing).__mro__:
            names = kind.__dict__.get("__slots__", ())
            names = (names,) if isinstance(names, str) else names
            stack += [getattr(thing, n, None) for n in names if not n.startswith("__")]


def leaks(seen: Observation, draws: Draws) -> list[str]:
    """What of the draws can be reached: most values of the noise, a time, or a client's stream."""
    assert draws.noise is not None
    assert draws.times is not None
    noise, times = draws.noise.flatten().float(), draws.times.flatten().tolist()
    found = []
    for thing in reachable(seen):
        if isinstance(thing, np.ndarray) and thing.dtype.kind in "fiu":
            thing = torch.from_numpy(thing)
        if isinstance(thing, Tensor):
            values = thing.detach().flatten().float()
            if torch.isin(noise, values).float().mean() > 0.5:
                found.append("noise")
            if torch.isin(torch.tensor(times).float(), values).all():
                found.append("times")
        elif isinstance(thing, int | float) and not isinstance(thing, bool) and thing in times:
            found.append("a time")
        elif isinstance(thing, torch.Generator | torch.autograd.graph.Node):
            found.append(type(thing).__name__)
    return found


def played(
    mechanism: Mechanism, *facts: Fact, state: ModelState | None = None
) -> tuple[Observation, Draws]:
    if state is None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            state = ModelState.of(UNet(1, width=8, multipliers=(1, 2)))
    data = replace(Dataset.of("d", IMAGES, torch.tensor([0, 1, 2])), spec=SPEC)
    threat = gl.ThreatModel(gl.ThreatModel().knows | set(facts))
    scenario = gl.Scenario(data, state, mechanism, threat=threat, batch_size=3)
    seen, truth = gl.simulate(scenario, generator=stream(1))
    assert truth.draws is not None
    return seen, truth.draws


CLIENTS: dict[str, Mechanism] = {
    "one step": Denoising(),
    "a fixed time": Denoising(timestep=487),
    "local steps": DenoisingAvg(epochs=2, minibatch_size=1),
    "clipped and noised": gl.defenses.GaussianNoise(0.01)(gl.defenses.Clip(1.0)(Denoising())),
    "drawn beforehand": Denoising(
        draws=Draws(torch.tensor([[611], [327], [853]]), torch.randn(3, 1, 1, 4, 4))
    ),
}


@pytest.mark.parametrize("client", CLIENTS)
def test_neither_noise_nor_time_can_be_reached(client: str) -> None:
    seen, draws = played(CLIENTS[client])
    assert leaks(seen, draws) == []


@pytest.mark.parametrize("fact", [Fact.NOISE, Fact.TIMESTEPS])
def test_what_is_granted_is_reached(fact: Fact) -> None:
    found = leaks(*played(Denoising(), fact))
    assert any(word in fact.value or word == "times" for word in found)
    assert ("noise" in found) == (fact is Fact.NOISE)


@pytest.mark.parametrize("place", ["buffer", "loss", "hook", "graph", "fixed time"])
def test_a_planted_leak_is_found(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    grant = gl.ThreatModel.grant

    def leaky(self: gl.ThreatModel, truth: Truth, *rest: object) -> Observation:
        seen = grant(self, truth, *rest)  # type: ignore[arg-type]
        assert truth.draws is not None
        noise = truth.draws.noise
        assert noise is not None
        state, update, belief = seen.state, seen.update, seen.mechanism
        if place == "buffer":
            state = replace(state, buffers={"smuggled": noise.double().flip(0)})
        elif place == "loss":
            belief = replace(belief, loss=lambda a, b: mse_loss(a, b) + 0 * noise.sum())  # type: ignore[type-var]
        elif place == "hook":
            state.model.register_forward_hook(lambda *_: noise.sum() and None)
        elif place == "graph":
            first = {k: v + noise.clone().requires_grad_().sum() for k, v in update.values.items()}
            update = replace(update, values=first)
        else:
            belief = replace(belief, timestep=487)  # type: ignore[type-var]
        return replace(seen, exchanges=(Exchange(state, update),), mechanism=belief)

    monkeypatch.setattr(gl.ThreatModel, "grant", leaky)
    assert leaks(*played(Denoising(timestep=487) if place == "fixed time" else Denoising()))


class Blinkered(nn.Module):
    """Denoises the left half of the picture from it, and gives zeros for the right."""

    def __init__(self) -> None:
        super().__init__()
        self.time, self.hidden, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor, times: Tensor) -> Tensor:
        angles = times[:, None].to(x) * torch.logspace(-3, 0, 3).to(x)
        time = self.time(torch.cat([angles.sin(), angles.cos()], 1))
        left = self.head(torch.tanh(self.hidden(x[..., :2].flatten(1)) + time))
        return nn.functional.pad(left.view(-1, 1, 4, 2), (0, 2))


@pytest.mark.parametrize("granted", [(), (Fact.TIMESTEPS,)], ids=["private", "times granted"])
def test_worlds_that_differ_in_withheld_draws_alone_give_one_claim(
    granted: tuple[Fact, ...],
) -> None:
    """H0: the claim depends on the observation alone. Exact, no tolerance."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        state = ModelState.of(Blinkered())
    data = replace(Dataset.of("d", IMAGES[:1], torch.tensor([0])), spec=SPEC)
    noise = torch.randn((1, 1, 1, 4, 4), generator=stream(2))
    other = noise.clone()
    other[..., 2:] = torch.randn((1, 1, 1, 4, 2), generator=stream(3))
    claims, updates = [], []
    for own in (noise, other):
        client = Denoising(draws=Draws(torch.tensor([[611]]), own))
        threat = gl.ThreatModel(gl.ThreatModel().knows | set(granted))
        scenario = gl.Scenario(data, state, client, threat=threat)
        seen, _ = gl.simulate(scenario, generator=stream(4))
        updates.append(seen.update.values)
        claims.append(GIDMPlus(steps=6)(seen, generator=stream(5)).batch.inputs)
    assert all(torch.equal(v, updates[1][k]) for k, v in updates[0].items())
    assert torch.equal(*claims)
