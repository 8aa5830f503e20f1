"""DP-SGD: clipping, of examples or of the whole update, and Gaussian noise in proportion to it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from gradleak.defenses.clip import Clip
from gradleak.defenses.noise import GaussianNoise
from gradleak.defenses.sheet import Sheet
from gradleak.defenses.wrapped import Unbiased, difference, noised, norm
from gradleak.errors import InvalidInput
from gradleak.mechanisms import FedSGD, summed
from gradleak.mechanisms.client import check_positive
from gradleak.types import Batch, Likelihood, Mechanism, ModelState, Update


@dataclass(frozen=True)
class DPSGD:
    """ũ = (1/b) (Σ_i clip(g_i) + N(0, z² C²)) by example; clip(u) + N(0, z² C²) by user.

    clip(g) = g · min(1, C / ‖g‖₂), over all tensors together. By example nobody can tell whether
    one example was in the batch (Abadi et al., CCS 2016, Alg. 1; b is the expected batch). By user
    nobody can tell whether the client sent anything of its own (McMahan et al., ICLR 2018, with
    the noise added by the client), whatever its local training.

    The last three fields change no update. They say what ε is accounted for: the rounds of a
    deployment in which every private unit takes part with probability `sample_rate`.

    Args:
        norm: C.
        noise_multiplier: z.
        scope: what one guarantee covers, a "user" or an "example"; the latter only directly
            around fedsgd.
        rounds: T.
        sample_rate: q, by Poisson sampling, unknown to the attacker.
        delta: δ, the share of the probability that ε says nothing of.
    """

    norm: float = 1.0
    noise_multiplier: float = 1.0
    scope: Literal["user", "example"] = "user"
    rounds: int = 1
    sample_rate: float = 1.0
    delta: float = 1e-5

    id: ClassVar[str] = "dp-sgd"
    title: ClassVar[str] = "DP-SGD"
    sheet: ClassVar[Sheet] = Sheet(
        paper="Abadi et al., Deep Learning with Differential Privacy, CCS 2016; by user: "
        "McMahan et al., Learning Differentially Private Recurrent Language Models, ICLR 2018",
        link="https://arxiv.org/abs/1607.00133",
        promises="(ε, δ)-differential privacy of one example or one user: a ceiling over what any "
        "attack identifies, whatever it knows",
        broken_by="none known below the ceiling; at an ε for which the ceiling is near 1 nothing "
        "is promised, and the likelihood with its clipping simulated recovers images",
        cost="accuracy, more of it the smaller ε and the fewer the clients; by example one "
        "gradient per example; no bytes",
    )

    def __post_init__(self) -> None:
        check_positive(norm=self.norm, noise_multiplier=self.noise_multiplier)
        for name, value in (("sample_rate", self.sample_rate), ("delta", self.delta)):
            if not 0 < value <= 1:
                raise InvalidInput(f"{name}={value}: expected a share in (0, 1]")
        if self.rounds < 1:
            raise InvalidInput(f"rounds={self.rounds}: expected at least 1")

    def __call__(self, mechanism: Mechanism) -> Mechanism:
        if self.scope == "example" and not isinstance(mechanism, FedSGD):
            raise InvalidInput("dp-sgd:scope=example: expected it first, and fedsgd as training")
        clip = Clip(self.norm, "example" if self.scope == "example" else "update")
        return _Private(clip(mechanism), self)

    def noise(self, batch_size: int) -> GaussianNoise:
        """Noise on the update of a client with a batch of this size."""
        parts = batch_size if self.scope == "example" else 1
        return GaussianNoise(self.noise_multiplier * self.norm / parts)

    def doubt(self, before: Update, after: Update) -> tuple[str, float] | None:
        n = sum(v.numel() for v in after.values.values())
        measured = norm(difference(after, before)) / math.sqrt(n)
        # By example as over the nearest number of examples.
        nearest = round(self.noise(1).std / measured) if measured else 1
        return self.noise(max(1, nearest)).doubt(before, after)


@dataclass(frozen=True)
class _Private(Unbiased):
    """What lies inside is clipped already."""

    rule: DPSGD

    def sample(self, state: ModelState, batch: Batch, *, generator: torch.Generator) -> Update:
        clean = self.inner.sample(state, batch, generator=generator)
        noise = self.rule.noise(len(batch) if self.rule.scope == "example" else 1)
        return Update({k: v + noise.draw(v, generator) for k, v in clean.values.items()}, self.kind)

    def likelihood(self, *, batch_size: int) -> Likelihood:
        return noised(self.inner, self.rule.noise(batch_size))

    def pooled(self, clients: int) -> Mechanism | None:
        """Noise on every update averages to std/√n."""
        if self.rule.scope == "example":
            return None
        return self.rule.noise(1).averaged(clients)(summed(self.inner, clients))
