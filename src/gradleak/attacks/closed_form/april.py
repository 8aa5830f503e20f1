"""One image from the gradients of attention and its positions (APRIL; Lu et al., CVPR 2022)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import fold

from gradleak.attacks.closed_form.affine import probes
from gradleak.attacks.closed_form.explained import (
    labelled,
    no_solution,
    plain_classifier,
    rounding,
    unexplained,
)
from gradleak.attacks.closed_form.first_layer import FirstLayer, first_layer
from gradleak.attacks.parts.needs import require
from gradleak.mechanisms.client import own_buffers, template
from gradleak.mechanisms.fedsgd import FedSGD
from gradleak.types import About, Batch, DataSpec, Fact, ModelState, Observation, Reconstruction

_HOLDS = 1e-8
_ROUNDED = 1e-2


@dataclass(frozen=True)
class April:
    """Σ_r W_rᵀ ∂L/∂W_r = (∂L/∂P)ᵀ Z, where Z are the tokens that query, key and value read.

    With Z = E + P, patch embeddings E and positions P (tokens × width), and r over query, key and
    value, ∂L/∂W_r = δ_rᵀ Z and ∂L/∂Z = Σ_r δ_r W_r. Nothing but the attention reads Z, so ∂L/∂P is
    ∂L/∂Z and the identity above follows: linear in Z. An honest server solves it, subtracts P, and
    inverts the patch embedding.

    The server tries the identity on a random picture of its own first: where it fails there,
    something else reads the tokens or stands between positions and attention.

    Exact for one example, independent gradients of all positions (so no more tokens than width)
    and patches of no more pixels than width; else `no_solution`.
    """

    about: ClassVar[About] = About(
        id="april",
        title="Closed form of attention behind positions (APRIL)",
        paper="Lu, Zhang, Zhao, He, Cheng, APRIL: Finding the Achilles' Heel on Privacy for Vision "
        "Transformers, CVPR 2022",
        link="https://arxiv.org/abs/2112.14087",
        modalities=frozenset({"image"}),
        classifiers=True,
        needs=frozenset({Fact.BATCH_SIZE}),
        likelihood="exact equations",
        prior="none",
        deviations=(
            "the closed form alone; the paper's search with the positions' cosine is not built",
            "whether the theory covers a network is found by trying the identity, not by reading "
            "its code",
            "accepted by the gap of the whole update",
        ),
    )

    def __call__(self, seen: Observation, *, generator: torch.Generator) -> Reconstruction:
        require(self.about, seen)
        refuse = partial(no_solution, seen)
        size = seen.knowledge.batch_size
        if size != 1:
            return refuse(f"positions sum over examples: expected one, the batch has {size}")
        client = plain_classifier(seen)
        if isinstance(client, str):
            return refuse(client)
        found = attended(seen.state, seen.data, client)
        if isinstance(found, str):
            return refuse(found)
        update = {k: v.detach().double().cpu() for k, v in seen.update.values.items()}
        tokens = found.tokens(update, rounding(seen))
        if isinstance(tokens, str):
            return refuse(tokens)
        claim = labelled(seen, found.picture(tokens).clamp(*seen.data.bounds)[None])
        if isinstance(claim, str):
            return refuse(claim)
        gap = unexplained(seen, claim)
        if not gap <= _ROUNDED:
            return refuse(f"the picture leaves {gap:.1%} of the update unexplained")
        if gap > rounding(seen) ** 0.5:
            told = f"rounding of the update, amplified, leaves {gap:.2%} of it unexplained"
            return Reconstruction(claim, gap, "exhausted", message=told)
        return Reconstruction(claim, gap, "solved")

    def objective(self, seen: Observation) -> Callable[[Batch], float]:
        """The share of the update that a claim leaves unexplained."""
        return partial(unexplained, seen)


@dataclass(frozen=True)
class Attended:
    """What reads patches plus positions, in float64.

    Attributes:
        patches: the layer that embeds patches; its input is the data, but for an affine map.
        grid: patches (down, across).
        positions: name of P.
        readers: names of the weights (any, width) that read the tokens.
        params: all parameters.
    """

    patches: FirstLayer
    grid: tuple[int, int]
    positions: str
    readers: tuple[str, ...]
    params: Mapping[str, Tensor]

    def identity(self, update: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """∂L/∂P (tokens, width) and Σ_r W_rᵀ ∂L/∂W_r (width, width)."""
        products = [self.params[name].T @ update[name] for name in self.readers]
        total = torch.stack(products).sum(0)
        return update[self.positions].reshape(-1, len(total)), total

    def tokens(self, update: Mapping[str, Tensor], tolerance: float) -> Tensor | str:
        """Z (tokens, width), or why it is not determined."""
        slopes, total = self.identity(update)
        count, width = slopes.shape
        if count > width:
            return f"{count} tokens of width {width}: expected no more tokens than width"
        left, strengths, right = torch.linalg.svd(slopes.T, full_matrices=False)
        rank = int((strengths > tolerance * strengths[0]).sum())
        if rank < count:
            return f"the positions' gradient has rank {rank}: expected {count}, one a token"
        found: Tensor = (right.T / strengths) @ (left.T @ total)
        return found

    def picture(self, tokens: Tensor) -> Tensor:
        """The image whose patches are embedded as these tokens less their positions."""
        layer = self.patches.layer
        assert isinstance(layer, nn.Conv2d)
        embedded = (tokens - self.params[self.positions].reshape(tokens.shape))[-self.count :]
        if self.patches.bias in self.params:
            embedded = embedded - self.params[self.patches.bias]
        weight = self.params[self.patches.weight].flatten(1)
        columns = torch.linalg.lstsq(weight, embedded.T, driver="gelsd").solution
        down, across = (n * k for n, k in zip(self.grid, layer.kernel_size, strict=True))
        whole: Tensor = fold(columns[None], (down, across), layer.kernel_size, stride=layer.stride)
        return self.patches.undo(whole)

    @property
    def count(self) -> int:
        """Patches."""
        return self.grid[0] * self.grid[1]


def attended(state: ModelState, data: DataSpec, client: FedSGD) -> Attended | str:
    """What the theory needs of a network, or what the network lacks.

    Args:
        state: what the server broadcasts.
        data: form of the data.
        client: sends the plain gradient.
    """
    first = first_layer(state, data)
    if isinstance(first, str):
        return first
    layer = first.layer
    if not (
        isinstance(layer, nn.Conv2d)
        and layer.kernel_size == layer.stride
        and layer.groups == 1
        and layer.padding == (0, 0)
        and layer.dilation == (1, 1)
        and layer.weight[0].numel() <= len(layer.weight)
    ):
        return f"the first layer {first.name!r} does not embed patches one to one"
    numbers = state.to(torch.device("cpu")).to(torch.float64)
    params, own = dict(numbers.params), probes(data)[-1]
    read = _read(numbers, params, own)
    found = _positions(numbers, own, read)
    if found is None:
        return (
            "no learned positions are added directly before an attention (a layer normalisation "
            "between them?)"
        )
    positions, names = found
    grid = (own.shape[-2] // layer.kernel_size[0], own.shape[-1] // layer.kernel_size[1])
    weights = tuple(w for n in names for w in (f"{n}.in_proj_weight", f"{n}.weight") if w in params)
    whole = Attended(first, grid, positions, weights, params)
    tokens = read[names[0]]
    slopes, total = whole.identity(client.mean(numbers, Batch(own, torch.tensor([0]))).values)
    if (slopes.T @ tokens - total).norm() > _HOLDS * total.norm():
        return "something else than an attention reads the tokens (a residual connection?)"
    if not torch.allclose(whole.picture(tokens), own[0], rtol=0, atol=_HOLDS):
        return "the tokens are not the patches' embeddings plus positions"
    return whole


def _positions(
    state: ModelState, own: Tensor, read: Mapping[str, Tensor]
) -> tuple[str, list[str]] | None:
    """The parameter that shifts what some layers read by exactly its own shift; and these."""
    stream = torch.Generator().manual_seed(0)
    for name, value in state.params.items():
        if value.numel() not in {tokens.numel() for tokens in read.values()}:
            continue
        step = torch.randn(value.shape, generator=stream, dtype=torch.float64)
        moved = _read(state, {**state.params, name: value + step}, own)
        readers = [
            reader
            for reader, tokens in read.items()
            if tokens.numel() == step.numel()
            and torch.allclose(moved[reader] - tokens, step.view_as(tokens), rtol=0, atol=_HOLDS)
        ]
        if readers:
            return name, readers
    return None


def _read(state: ModelState, params: Mapping[str, Tensor], own: Tensor) -> dict[str, Tensor]:
    """Tokens (tokens, width) that enter every linear layer and every attention."""
    model = template(state.model, "eval").to(torch.float64)
    entered: dict[str, Tensor] = {}

    def note(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, given: tuple[Tensor, ...]) -> None:
            if given and given[0].ndim == 3:
                entered[name] = given[0].detach().flatten(0, 1)

        return hook

    handles = [
        layer.register_forward_pre_hook(note(name))
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear | nn.MultiheadAttention)
    ]
    try:
        with torch.no_grad():
            fixed = own_buffers(model, state)
            torch.func.functional_call(model, (dict(params), fixed), (own,))
    finally:
        for handle in handles:
            handle.remove()
    return entered
