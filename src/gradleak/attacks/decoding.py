"""Private images from many blends of them: what undoes MixUp and InstaHide.

    encodings --signs off--> similarity --cluster--> who is in which --solve--> images

An attack on updates gives encodings; `decode` takes those of many rounds and the public images that
anybody has. After Carlini et al., "Is Private Learning Possible with Instance Encoding?", S&P 2021.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
from scipy.optimize import linprog
from scipy.sparse import coo_array
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from gradleak.defenses.encoded import soft_labels
from gradleak.defenses.instahide import MIDDLE, InstaHide
from gradleak.defenses.mixup import MixUp
from gradleak.errors import InvalidInput
from gradleak.seeding import child, normal
from gradleak.types import Batch, ModelState

_BATCH, _LEARNING = 64, 300
_FACTOR_STEPS, _FACTOR_STARTS = 300, 8
_SHARES, _TURNS = 6, 5
_RIDGE, _FLOOR = 1e-6, 1e-2
_VALUES = [k / 12 - 1 for k in range(25)]
_SCALES = [0.05 * k for k in range(6, 20)]
_HELD = 0.02
"""Share of a label from which an encoding is said to hold an image of that class."""


@dataclass(frozen=True)
class Decoded:
    """Images found in many encodings.

    Attributes:
        images: (count, *shape) in [0, 1]; of signed encodings up to one sign for all, which the
            public mean image chooses.
        members: (m, own) int64: which images every encoding is said to hold.
        objective: mean squared difference between encodings and what these images would give.
    """

    images: Tensor
    members: Tensor
    objective: float


def decode(
    encodings: Batch,
    *,
    rule: MixUp | InstaHide,
    state: ModelState,
    count: int,
    batch_size: int,
    public: Tensor,
    generator: torch.Generator,
    rounds: int = 4,
) -> Decoded:
    """Find the images behind encodings.

        s_ij: how surely i and j share an image, by a network that learnt it on public images;
              zero where their labels share no class
        S ≈ A Aᵀ with A ≥ 0; every encoding gets `own` columns, every column as many encodings
        repeat: min over x in [−1, 1], λ of Σ_i (|Σ_j λ_ij x_j + rest · public mean| − |e_i|)²
                every encoding gets the images that explain it best

    Labels tell the weights of images of different classes. Without signs (MixUp) the bars fall
    away.

    Args:
        encodings: (m, *shape) in [0, 1] with labels, from any number of rounds.
        rule: the protection, as far as everybody knows it.
        state: a state broadcast; only the protection looks at it.
        count: private images that the client has.
        batch_size: of them in a round, which bounds how many an encoding can hold.
        public: (n, *shape) images that anybody has, at least 64.
        generator: the attacker's randomness.
        rounds: of solving and assigning.

    Raises:
        InvalidInput: too few encodings or public images.
    """
    own = min(batch_size, rule.private if isinstance(rule, InstaHide) else rule.images)
    if not own <= count or len(encodings) * own < 2 * count or len(public) < _BATCH:
        raise InvalidInput(
            f"{len(encodings)} encodings of {own} of {count} images, {len(public)} public ones: "
            f"expected two encodings of every image, and {_BATCH} public ones"
        )
    signed = isinstance(rule, InstaHide)
    if isinstance(rule, InstaHide):
        rule = replace(rule, private=own)
    rule = rule.informed(Batch(public, torch.zeros(len(public), dtype=torch.int64)))
    seen, labels = _signless(encodings.inputs, rule), soft_labels(state, encodings).float()
    likely = _sharing(seen, rule, state, public, generator=child(generator, "similarity"))
    held = (labels > _HELD).float()
    likely = likely * (held @ held.T > 0)
    members = _assigned(_factors(likely, count, child(generator, "clusters")), own)
    rest = (2 * public.float() - 1).mean(0)
    noise = (2 * public.float() - 1).var(0)
    solution = _Solution(seen, labels, rest, noise, rule.images, signed)
    images, objective = solution.images(members, count)
    for _ in range(rounds - 1):
        members = solution.members(images, solution.classes(members, count), own)
        images, objective = solution.images(members, count)
    if signed and ((images - rest) ** 2).sum() > ((images + rest) ** 2).sum():
        images = -images
    return Decoded((images + 1) / 2, members, objective)


def _signless(encodings: Tensor, rule: MixUp | InstaHide) -> Tensor:
    """What signs leave, about the middle and in units of half the box."""
    centred = (encodings.detach().float() - MIDDLE) / MIDDLE
    return centred.abs() if isinstance(rule, InstaHide) else centred


def _sharing(
    seen: Tensor,
    rule: MixUp | InstaHide,
    state: ModelState,
    public: Tensor,
    *,
    generator: torch.Generator,
) -> Tensor:
    """P(encodings i and j share an image) (m, m), learnt on encodings of public images.

    Every public image is a class of its own there, so that mixed labels say who is in which.
    """
    network = _Embedding(seen.shape[1:], generator)
    optimiser = torch.optim.Adam(network.parameters(), lr=2e-3)
    own = torch.eye(_BATCH // 2)
    off = ~torch.eye(_BATCH, dtype=torch.bool)
    for _ in range(_LEARNING):
        chosen = public[torch.randperm(len(public), generator=generator)[: _BATCH // 2]].float()
        made = [rule.encode(state, Batch(chosen, own), generator) for _ in range(2)]
        held = torch.cat([b.labels for b in made]) > 0
        shares = (held.float() @ held.float().T > 0).float()
        logits = network(_signless(torch.cat([b.inputs for b in made]), rule))
        loss = binary_cross_entropy_with_logits(logits[off], shares[off])
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    with torch.no_grad():
        likely: Tensor = network(seen).sigmoid()
    return likely


class _Embedding(nn.Module):
    """Logits of sharing (b, b): scaled scalar products of what three convolutions see."""

    def __init__(self, shape: torch.Size, generator: torch.Generator) -> None:
        super().__init__()
        widths = (shape[0], 32, 64, 64)
        self.layers = nn.ModuleList(
            nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in pairwise(widths)
        )
        side = [(n + 7) // 8 for n in shape[1:]]
        self.head = nn.Linear(widths[-1] * side[0] * side[1], 128)
        self.scale = nn.Parameter(torch.tensor([8.0, -2.0]))
        with torch.no_grad():
            for layer in (*self.layers, self.head):
                spread = (2 / layer.weight[0].numel()) ** 0.5
                drawn = normal(layer.weight.shape, generator=generator, dtype=torch.float32)
                layer.weight.copy_(spread * drawn)
                layer.bias.zero_()

    def forward(self, seen: Tensor) -> Tensor:
        h = seen
        for layer in self.layers:
            h = layer(h).relu()
        h = nn.functional.normalize(self.head(h.flatten(1)), dim=1)
        return self.scale[0] * (h @ h.T) + self.scale[1]


def _factors(likely: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """A (m, count) ≥ 0 with A Aᵀ ≈ S beside the diagonal: the best of several starts."""
    m = len(likely)
    off = 1 - torch.eye(m)
    wanted = likely * off
    best, least = torch.empty(0), float("inf")
    for _ in range(_FACTOR_STARTS):
        a = torch.rand((m, count), generator=generator) / count**0.5
        for _ in range(_FACTOR_STEPS):
            a = a * (0.5 + 0.5 * (wanted @ a) / ((a @ a.T * off) @ a + 1e-9))
        error = float(((wanted - a @ a.T * off) ** 2).sum())
        if error < least:
            best, least = a, error
    return best


def _assigned(scores: Tensor, own: int) -> Tensor:
    """(m, own) columns of every row, all columns used as often: a linear programme's optimum.

    Its constraints are those of a flow, so that a vertex is a solution in whole numbers.
    """
    m, n = scores.shape
    place = np.arange(m * n)
    rows = np.concatenate([place // n, m + place % n])
    columns = np.concatenate([place, place])
    constraints = coo_array((np.ones(2 * m * n), (rows, columns)), shape=(m + n, m * n)).tocsr()
    each = m * own / n
    found = linprog(
        -scores.flatten().double().numpy(),
        A_eq=constraints[:m],
        b_eq=np.full(m, own),
        A_ub=constraints[m:],
        b_ub=np.full(n, np.ceil(each)),
        bounds=(0, 1),
        method="highs-ds",
    )
    return torch.from_numpy(found.x).reshape(m, n).topk(own, 1).indices


@dataclass(frozen=True)
class _Solution:
    """Images and memberships of some encodings, by turns.

    Attributes:
        seen: (m, *shape) encodings about zero, without signs.
        labels: (m, classes) of the encodings.
        rest: public mean image about zero, for what is not private.
        noise: variance of public images about it, pixel by pixel.
        images_mixed: in every encoding.
        signed: whether encodings have lost signs.
    """

    seen: Tensor
    labels: Tensor
    rest: Tensor
    noise: Tensor
    images_mixed: int
    signed: bool

    @property
    def share(self) -> float:
        """Mean weight of an image."""
        return 1 / self.images_mixed

    def images(self, members: Tensor, count: int) -> tuple[Tensor, float]:
        """Images (count, *shape) of known members, and the objective.

        Least squares, with every sign taken for the public mean's. Where signs are lost, from there
        pixel by pixel and weight by weight to the most likely of a grid, for what they fold has
        more than one minimum.
        """
        m, own = members.shape
        rest, noise = self.rest.flatten(), self.noise.flatten()
        ratios = self._ratios(members, count)
        scale = torch.full((m, 1), own * self.share)
        given = self.seen.flatten(1)
        if self.signed:
            given = torch.where(rest < 0, -given, given)
        weights = torch.zeros((m, count)).scatter_(1, members, scale * ratios)
        normal = weights.T @ weights + _RIDGE * torch.eye(count)
        x = (rest + torch.linalg.solve(normal, weights.T @ (given - rest))).clamp(-1, 1)
        spare = max(1, self.images_mixed - own)
        for _ in range(_TURNS if self.signed else 0):
            spread = (1 - scale) ** 2 / spare * noise + _FLOOR
            for j in range(count):
                i, place = (members == j).nonzero(as_tuple=True)
                if not len(i):
                    continue
                share = scale[i] * ratios[i, place][:, None]
                others = self._blends(x, rest, members[i], ratios[i], scale[i])
                others = others - share * (x[j] - rest)
                costs = [
                    self._costs(others + share * (value - rest), i, spread[i]).sum(0)
                    for value in _VALUES
                ]
                x[j] = torch.tensor(_VALUES)[torch.stack(costs).argmin(0)]
            if own < self.images_mixed:
                scale = self._scales(x, members, ratios, spare)
        blends = self._blends(x, rest, members, ratios, scale)
        objective = float(self._errors(blends).mean())
        return x.reshape(count, *self.seen.shape[1:]), objective

    def _scales(self, x: Tensor, members: Tensor, ratios: Tensor, spare: int) -> Tensor:
        """(m, 1) the most likely weights of all private images together."""
        rest, noise, m = self.rest.flatten(), self.noise.flatten(), len(members)
        costs = []
        for each in _SCALES:
            blends = self._blends(x, rest, members, ratios, torch.full((m, 1), each))
            variance = (1 - each) ** 2 / spare * noise + _FLOOR
            costs.append(self._costs(blends, torch.arange(m), variance.expand(m, -1)).sum(1))
        return torch.tensor(_SCALES)[torch.stack(costs).argmin(0)][:, None]

    def _blends(
        self, x: Tensor, rest: Tensor, members: Tensor, ratios: Tensor, scale: Tensor
    ) -> Tensor:
        """What encodings would be without signs (m, pixels), public images at their mean."""
        return rest + scale * torch.einsum("mk,mkd->md", ratios, x[members] - rest)

    def _costs(self, blends: Tensor, rows: Tensor, variance: Tensor) -> Tensor:
        """−log p of encodings around blends (m, pixels): normal, folded where signs are lost."""
        a = self.seen.flatten(1)[rows]
        near = -((a - blends) ** 2) / (2 * variance)
        if self.signed:
            near = torch.logaddexp(near, -((a + blends) ** 2) / (2 * variance))
        return variance.log() / 2 - near

    def members(self, images: Tensor, classes: Tensor, own: int) -> Tensor:
        """(m, own) the images that explain every encoding best, one added at a time."""
        m = len(self.seen)
        found = torch.empty((m, 0), dtype=torch.int64)
        blends, rest = self.rest.flatten().expand(m, -1), self.rest.flatten()
        held = self.labels[:, classes] > _HELD
        for _ in range(own):
            errors = torch.full((m, len(images)), float("inf"))
            best = torch.zeros((m, len(images)))
            for j, image in enumerate(images.flatten(1)):
                for share in torch.linspace(0.1, 0.6, _SHARES):
                    error = self._errors(blends + share * (image - rest))
                    better = error < errors[:, j]
                    errors[better, j], best[better, j] = error[better], share
            errors = errors + (~held) * errors.max()
            errors.scatter_(1, found, float("inf"))
            chosen = errors.argmin(1)
            share = best.gather(1, chosen[:, None])
            blends = blends + share * (images.flatten(1)[chosen] - rest)
            found = torch.cat([found, chosen[:, None]], 1)
        return found

    def classes(self, members: Tensor, count: int) -> Tensor:
        """(count,) the class that the encodings of every image have most in common."""
        holds = torch.zeros((len(members), count)).scatter_(1, members, 1.0)
        return (holds.T @ (self.labels > _HELD).float()).argmax(1)

    def _ratios(self, members: Tensor, count: int) -> Tensor:
        """(m, own) weights among the private images, as far as labels tell them apart."""
        classes = self.classes(members, count)[members]
        share = self.labels.gather(1, classes)
        alike = (classes[:, :, None] == classes[:, None, :]).sum(2)
        ratios = (share / alike).clamp(min=1e-3)
        return ratios / ratios.sum(1, keepdim=True)

    def _errors(self, blends: Tensor) -> Tensor:
        given = blends.abs() if self.signed else blends
        return ((given - self.seen.flatten(1)) ** 2).mean(1)
