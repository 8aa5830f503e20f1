"""The client behind a belief, and its network made ready for many passes."""

from __future__ import annotations

import copy
import inspect
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from gradleak.defenses.wrapped import Wrapped
from gradleak.mechanisms.fedsgd import FedSGD
from gradleak.types import Mechanism, ModelState


def gradient_client(mechanism: Mechanism) -> FedSGD | None:
    """The client whose gradient `mechanism` predicts, if it predicts the gradient of one step.

    Protections that leave predictions alone (additive noise), or that another loss stands for, are
    looked through.
    """
    inside: Mechanism | None = mechanism
    while isinstance(inside, Wrapped):
        inside = inside.seen_through()
    return inside if isinstance(inside, FedSGD) else None


def plain_client(mechanism: Mechanism) -> FedSGD | None:
    """The same, if its loss is one of outputs and labels."""
    found = gradient_client(mechanism)
    return found if type(found) is FedSGD else None


def loaded(model: nn.Module, state: ModelState, *, trained: bool) -> nn.Module:
    """A copy of `model` on the state's own storage: no parameter is copied.

    Args:
        model: a template of the state's network.
        state: its numbers.
        trained: whether the state's parameters require gradients; nothing else does.
    """
    memo: dict[int, Any] = {}
    for name, value in model.named_parameters():
        number = state.params.get(name, state.buffers.get(name, value))
        memo[id(value)] = nn.Parameter(
            number.detach(), requires_grad=trained and name in state.params
        )
    for name, buffer in model.named_buffers():
        if name in state.buffers:
            memo[id(buffer)] = state.buffers[name].detach()
    return copy.deepcopy(model, memo)


def trained_tensors(model: nn.Module, state: ModelState) -> dict[str, Tensor]:
    """The parameters of a loaded network that the state trains, in the state's order."""
    own = dict(model.named_parameters())
    return {name: own[name] for name in state.params}


def takes_data_alone(model: nn.Module) -> bool:
    """Whether a network is called with the data and nothing else, as no denoising one is."""
    needed = [
        p
        for p in inspect.signature(model.forward).parameters.values()
        if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    return len(needed) <= 1


def differentiable_twice() -> AbstractContextManager[None]:
    """Attention in plain operations: its fused kernels cannot be differentiated twice."""
    plain: AbstractContextManager[None] = sdpa_kernel(SDPBackend.MATH)
    return plain
