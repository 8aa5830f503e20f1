"""Rank analysis: whether the input of every layer of a chain is determined (R-GAP, Section 4)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from gradleak.attacks.closed_form.chain import Chain, chain_of, unknowns
from gradleak.attacks.closed_form.layer_equations import Convolution
from gradleak.attacks.closed_form.rgap import logistic
from gradleak.attacks.parts.smoothing import natural_like
from gradleak.mechanisms.client import own_buffers, template
from gradleak.types import DataSpec, ModelState

_DEFICIENT = 1e-7


@dataclass(frozen=True)
class LayerRank:
    """Whether one layer's input follows from what is above it.

    Attributes:
        name: of the layer.
        unknowns: numbers that enter it.
        weight_equations: outputs of the layer.
        gradient_equations: independent ones, after compression.
        rank: independent equations of both kinds together, up to float64.
    """

    name: str
    unknowns: int
    weight_equations: int
    gradient_equations: int
    rank: int

    @property
    def recoverable(self) -> bool:
        return self.rank >= self.unknowns


def recoverability(state: ModelState, data: DataSpec) -> list[LayerRank] | str:
    """Rank analysis of every layer, before any update is seen; or why the network is no chain.

    Ranks are those at a random picture with the spectrum of photographs and label 0: equal for
    almost every picture.

    Source: Zhu & Blaschko, ICLR 2021, Section 4 (rank analysis).
    """
    chain = chain_of(state, data)
    if isinstance(chain, str):
        return chain
    if data.modality == "image":
        picture = natural_like(data, 1)
    else:
        stream = torch.Generator().manual_seed(0)
        low, high = data.bounds
        picture = low + (high - low) * torch.rand((1, *data.shape), generator=stream).double()
    entered, errors = _passed(state, chain, picture)
    params = {k: v.detach().double().cpu() for k, v in state.params.items()}
    found = []
    for link in chain.links:
        n, d = unknowns(link), errors[link.name]
        if isinstance(link.layer, nn.Linear):
            found.append(LayerRank(link.name, n, d.numel(), n if d.any() else 0, n * bool(d.any())))
            continue
        layer = Convolution(link, params[f"{link.name}.weight"], d, torch.finfo(d.dtype).eps)
        x = entered[link.name]
        layer.first = float(1 / layer.outputs(x).norm())
        layer.second = float(1 / layer.gradients(x).norm())
        strengths = torch.linalg.eigvalsh(layer.gram()).clamp(min=0).sqrt()
        rank = int((strengths > _DEFICIENT * strengths[-1]).sum())
        equations = layer.ranks * layer.weight[0].numel()
        found.append(LayerRank(link.name, n, d.numel(), equations, rank))
    return found


def _passed(
    state: ModelState, chain: Chain, picture: Tensor
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What enters every layer for one picture, and ∂L/∂z where it leaves, L = −log p_0."""
    model = template(state.model, "eval").to(torch.float64)
    numbers = state.to(torch.float64)
    fixed = own_buffers(model, numbers)
    entered: dict[str, Tensor] = {}
    left: dict[str, Tensor] = {}

    def note(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(_: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> None:
            entered[name], left[name] = given[0].detach(), out

        return hook

    handles = [model.get_submodule(k.name).register_forward_hook(note(k.name)) for k in chain.links]
    try:
        logits = torch.func.functional_call(
            model, (dict(numbers.params), fixed), (picture.requires_grad_(),)
        )
    finally:
        for handle in handles:
            handle.remove()
    label = torch.zeros(1, dtype=torch.int64)
    loss = logistic(logits, label) if logits.shape[1] == 1 else cross_entropy(logits, label)
    errors = torch.autograd.grad(loss, list(left.values()))
    return entered, dict(zip(left, errors, strict=True))
