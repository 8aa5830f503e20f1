"""Protections that go by the leakage risk of tensors, measured on public examples."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Self

import torch
from torch import Tensor

from gradleak.defenses.risk import all_ones_risk, frobenius_risk
from gradleak.defenses.wrapped import Memory, OnPublic
from gradleak.mechanisms import Denoising, Diffusing, FedSGD
from gradleak.mechanisms.denoising import one_step
from gradleak.types import Batch, Mechanism, ModelState

_PER_CLASS = 5
_PROBES = 1


@dataclass(frozen=True)
class OnPublicRisk(OnPublic):
    """What such a protection was told: the first five public examples of every class."""

    digest: str = field(default="", init=False, repr=False)

    def informed(self, public: Batch) -> Self:
        """Keep the first five examples of every class."""
        labels = public.classes
        first = [torch.nonzero(labels == c).flatten()[:_PER_CLASS] for c in set(labels.tolist())]
        index = torch.cat(first).sort().values
        root = Batch(public.inputs[index].detach(), labels[index])
        told = super().informed(root)
        object.__setattr__(told, "digest", _digest({"inputs": root.inputs, "labels": root.labels}))
        return told

    def measured(
        self, state: ModelState, core: Mechanism, *, published: bool = False
    ) -> tuple[float, ...]:
        """R_l of every tensor, in the state's order, for one that was told.

        Args:
            state: broadcast state.
            core: the client without protections.
            published: whether by a probe of ones.
        """
        assert self.public is not None
        loss = getattr(core, "loss", FedSGD().loss)
        client = one_step(core) if isinstance(core, Diffusing) else FedSGD(loss=loss)
        digests = (self.digest, _digest(state.params), _digest(state.buffers))
        return _risks(_Case(published, client, digests, state, self.public))


def held(
    name: str, memory: Memory, refresh: int, measure: Callable[[], Sequence[float]]
) -> tuple[list[float], int, Memory]:
    """Risks that a client keeps for `refresh` rounds.

    Returns:
        The risks of this round, how many rounds went before, and what to keep.
    """
    earlier, *known = memory[name].tolist() if name in memory else [0.0]
    if earlier % refresh == 0:
        known = list(measure())
    kept = torch.tensor([earlier + 1, *known], dtype=torch.float64)
    return known, int(earlier), {name: kept}


@dataclass(frozen=True)
class _Case:
    """What risks depend on; equal by what it holds, whatever its precision on the way."""

    published: bool
    client: FedSGD
    digests: tuple[str, ...]
    state: ModelState = field(compare=False)
    public: Batch = field(compare=False)


def _digest(values: Mapping[str, Tensor]) -> str:
    """Of names and numbers, as float32."""
    seen = hashlib.blake2b()
    for name, value in values.items():
        seen.update(name.encode())
        seen.update(value.detach().float().cpu().numpy().tobytes())
    return seen.hexdigest()


@lru_cache(maxsize=64)
def _risks(case: _Case) -> tuple[float, ...]:
    state = case.state.to(torch.float32)
    like = next(iter(state.params.values()))
    public = Batch(case.public.inputs.to(like), case.public.labels.to(like.device))
    client = case.client
    if isinstance(client, Denoising):
        client = replace(
            client, draws=client.draw(public, generator=torch.Generator().manual_seed(0))
        )
    if case.published:
        found = all_ones_risk(state, public, client=client)
    else:
        found = frobenius_risk(state, public, client=client, probes=_PROBES)
    return tuple(float(f"{risk:.3g}") for risk in found.values())  # alike on every machine
