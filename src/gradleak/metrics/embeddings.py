"""Embeddings of pictures that an auditor makes from public people, none of whom is a user."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call

from gradleak.errors import InvalidInput
from gradleak.types import Batch, ModelState

_KEPT = 0.95
"""Share of the variance within people that the components before the discriminants keep."""


def fisherfaces(public: Batch, *, dimensions: int | None = None) -> Callable[[Tensor], Tensor]:
    """Directions in which people differ most, over how much pictures of one do.

        max over W of |W' S_between W| / |W' S_within W|, on principal components

    Args:
        public: pictures and whom they show; at least two of some, and two people.
        dimensions: of the embedding; None for one fewer than there are people.

    Returns:
        Inputs (n, *shape) -> (n, dimensions) float64, zero at the public mean.

    Source: Belhumeur, Hespanha and Kriegman, PAMI 1997.
    """
    rows, people = public.inputs.detach().cpu().double().flatten(1), public.classes.cpu()
    known = torch.unique(people)
    spare = len(rows) - len(known)
    if len(known) < 2 or spare < 1:
        raise InvalidInput(
            f"{len(rows)} pictures of {len(known)} people: expected two people, and more pictures "
            "than people"
        )
    centre = rows.mean(0)
    _, sizes, axes = torch.linalg.svd(rows - centre, full_matrices=False)
    share = (sizes**2).cumsum(0) / (sizes**2).sum()
    count = max(1, min(spare, int((share < _KEPT).sum()) + 1))
    axes = axes[:count]
    low = (rows - centre) @ axes.T
    means = torch.stack([low[people == person].mean(0) for person in known])
    inner = low - means[torch.searchsorted(known, people)]
    within = inner.T @ inner / spare
    # A hundredth of the mean variance keeps directions without spread from counting for all.
    within += torch.eye(count, dtype=within.dtype) * within.trace() / count / 100
    values, vectors = torch.linalg.eigh(within)
    whiten = vectors / values.sqrt()
    kept = min(len(known) - 1, count, dimensions or len(known))
    _, _, best = torch.linalg.svd((means - means.mean(0)) @ whiten, full_matrices=False)
    directions: Tensor = axes.T @ whiten @ best[:kept].T

    def embed(inputs: Tensor) -> Tensor:
        return (inputs.detach().cpu().double().flatten(1) - centre) @ directions

    return embed


def features(state: ModelState, public: Tensor) -> Callable[[Tensor], Tensor]:
    """What a trained classifier hands to its last linear layer, zero at the public mean.

    Args:
        state: a classifier that ends in a linear layer.
        public: (n, *shape).

    Returns:
        Inputs (n, *shape) -> (n, d) float64.
    """
    template = copy.deepcopy(state.model).eval()
    layers = [m for m in template.modules() if isinstance(m, nn.Linear)]
    if not layers:
        raise InvalidInput("a network without a linear layer: expected one that ends in it")
    numbers = {**state.params, **state.buffers}
    like = next(iter(state.params.values()))
    seen: list[Tensor] = []
    layers[-1].register_forward_pre_hook(lambda module, given: seen.append(given[0]))

    def raw(inputs: Tensor) -> Tensor:
        seen.clear()
        with torch.no_grad():
            functional_call(template, numbers, (inputs.to(like),))
        return seen.pop().flatten(1).cpu().double()

    centre = raw(public).mean(0)
    return lambda inputs: raw(inputs) - centre


def classifier(state: ModelState) -> Callable[[Tensor], Tensor]:
    """The class that a trained classifier names: (n, *shape) -> (n,) int64."""
    template = copy.deepcopy(state.model).eval()
    numbers = {**state.params, **state.buffers}
    like = next(iter(state.params.values()))

    def classify(inputs: Tensor) -> Tensor:
        with torch.no_grad():
            named: Tensor = functional_call(template, numbers, (inputs.to(like),)).argmax(1).cpu()
        return named

    return classify
