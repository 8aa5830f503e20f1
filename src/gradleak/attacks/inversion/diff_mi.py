"""Diff-MI: a diffusion model that is told what a classifier calls public pictures, then searched.

Li et al., "Model Inversion Attacks Through Target-Specific Conditional Diffusion Models", 2024.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gradleak import priors
from gradleak.attacks.inversion.classifier import (
    Classifier,
    augmented,
    most_confident,
    top_k_margin,
)
from gradleak.denoising import ddim, grid
from gradleak.errors import InvalidInput
from gradleak.priors.diffusion import Precision
from gradleak.seeding import child, normal
from gradleak.types import Batch, DataSpec, ModelState

Progress = Callable[[float], None]

_TUNED = ("class_embedding.", "middle.")
"""Weights of the U-Net that tuning changes, by how their names begin."""
_LATEST, _RANGE = 200, 800
"""Of the times of the search: about the last one, and how far above it the first one is."""
_TOLD = 0.05
"""Share of the work that a search is, told from trainings'."""


def search_time(step: int, steps: int) -> float:
    """Time of a diffusion of 1000 steps at which a search denoises, before its jitter.

    200 + 800/n · [(n − i)/1.5 + (n − i)/3 · cos(3 i / 10π)]
    """
    left = steps - step
    wave = math.cos(3 * step / (10 * math.pi))
    return _LATEST + _RANGE / steps * (left / 1.5 + left / 3 * wave)


@dataclass(frozen=True, kw_only=True)
class DiffMI:
    """Weights of a classifier and public images → images of what it was trained on, per class.

    1. Pseudo-labels: of every class, the `chosen` public images that the classifier is surest of.
    2. A conditional diffusion model is trained on them, one image of ten without its class, then
       tuned: of samples with guidance, every estimate of x_0 along the way should be classified
       as told, by the loss below.
    3. Per image, from noise: a step on ‖ε̂_w(x_t, t, y) − ε‖² at falling t, and one on the loss

           −logit_y + mean of the k largest others + α ‖f(x) − f̄_y‖² / d

       over augmented copies, its gradient no longer than `allowed` times the running mean of the
       former's. f are the features that the classifier's head reads, f̄_y their mean over the
       pseudo-labelled images of class y.
    4. The image is noised to t = `last` and denoised.

    The published constants are those in brackets, where ours differ: for 28×28 pictures of five
    classes and minutes of a processor instead of 64×64 faces of 300 people. `rate` and `allowed`
    were chosen on MNIST's odd digits (even ones public), another seed than any table's.

    Args:
        chosen: public images per class (30 of each of 1000 classes, 30,000 images in all).
        width: channels of the U-Net's first level (128).
        pretraining: steps of training (50,000 of 150 images).
        batch_size: images of a step (150).
        learning_rate: of the training, at its largest (1e-4 throughout).
        averaging: decay of the moving average of the weights (0.9999).
        precision: of the network's passes in training.
        tuning: steps of tuning, at most; 0 leaves the model as trained (100 epochs).
        tuned_at_once: samples of a tuning step (4).
        tuning_rate: AdamW's; class embeddings and the middle block learn.
        tuning_times: steps of the sampler while tuning (10, of DPM-Solver++).
        tuning_copies: augmented copies of every estimate.
        enough: accuracy on its own samples at which tuning stops.
        guidance: w of (1 + w) · conditional − w · free (3; how it is counted there was not read).
        k: other classes in the margin (20 of 300).
        alpha: weight of the features.
        steps: of the search.
        rate: Adamax's, for pictures in [−1, 1] (1.0).
        jitter: of the search's times, in steps of the diffusion.
        copies: augmented copies of an image in a step of the search.
        allowed: length of the classifier's gradient, over the running mean of the prior's (1.25).
        memory: of that running mean.
        last: time from which the result is denoised once more.
        sampler: steps of a sampler over all times whose last ones do so, with η = 1.
        blur: of augmented copies in the search, in pixels (3 of 64×64).
    """

    chosen: int = 600
    width: int = 16
    pretraining: int = 1000
    batch_size: int = 64
    learning_rate: float = 2e-3
    averaging: float = 0.995
    precision: Precision = "bfloat16"
    tuning: int = 20
    tuned_at_once: int = 10
    tuning_rate: float = 2e-4
    tuning_times: int = 10
    tuning_copies: int = 2
    enough: float = 0.99
    guidance: float = 3.0
    k: int = 3
    alpha: float = 1.0
    steps: int = 30
    rate: float = 0.3
    jitter: int = 50
    copies: int = 4
    allowed: float = 4.0
    memory: float = 0.5
    last: int = 100
    sampler: int = 100
    blur: float = 0.8

    def __post_init__(self) -> None:
        counts = ("chosen", "tuned_at_once", "tuning_copies", "tuning_times", "steps", "copies")
        for name in counts:
            if getattr(self, name) < 1:
                raise InvalidInput(f"diff-mi {name}={getattr(self, name)}: expected at least 1")
        for name in ("tuning", "k", "alpha", "guidance", "jitter", "blur"):
            if not getattr(self, name) >= 0:
                raise InvalidInput(f"diff-mi {name}={getattr(self, name)}: expected at least 0")
        for name in ("rate", "tuning_rate", "allowed"):
            if not 0 < getattr(self, name) < math.inf:
                raise InvalidInput(f"diff-mi {name}={getattr(self, name)}: expected more than 0")
        if not 0 <= self.memory < 1:
            raise InvalidInput(f"diff-mi memory={self.memory}: expected a share in [0, 1)")
        timesteps = self._family.timesteps
        if not 1 <= self.last <= timesteps or not 1 <= self.sampler <= timesteps:
            raise InvalidInput(
                f"diff-mi last={self.last}, sampler={self.sampler}: expected 1 to {timesteps}"
            )

    @property
    def _family(self) -> priors.Diffusion:
        return priors.Diffusion(
            steps=self.pretraining,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            width=self.width,
            averaging=self.averaging,
            precision=self.precision,
        )

    def __call__(
        self,
        target: ModelState,
        public: Tensor,
        data: DataSpec,
        *,
        images: int,
        seed: int,
        progress: Progress = lambda share: None,
    ) -> Tensor:
        """Images (classes, images, *shape) in the data's bounds.

        Args:
            target: the classifier, weights and all.
            public: (n, *shape) in the data's bounds, of whatever classes.
            data: form of the classifier's inputs, and its classes.
            images: per class.
            seed: of every draw.
            progress: told the share done.
        """
        prior = self.prior(target, public, data, seed=seed, progress=progress)
        return self.search(target, prior, public, images=images, seed=seed)

    def pseudo_labelled(self, target: ModelState, public: Tensor) -> Batch:
        """The public images that the classifier is surest of, class by class (step 1)."""
        logits, _ = Classifier(target).told(public)
        chosen = most_confident(logits, self.chosen)
        labels = torch.arange(len(chosen)).repeat_interleave(self.chosen)
        return Batch(public[chosen.flatten()], labels)

    def prior(
        self,
        target: ModelState,
        public: Tensor,
        data: DataSpec,
        *,
        seed: int,
        progress: Progress = lambda share: None,
    ) -> priors.Denoiser:
        """The diffusion model for this classifier (steps 1 and 2)."""
        trained = self.pretrained(
            target, public, data, seed=seed, progress=lambda share: progress((1 - _TOLD) * share)
        )
        tuned = self.tuned(trained, target, public, seed=seed)
        progress(1.0)
        return tuned

    def pretrained(
        self,
        target: ModelState,
        public: Tensor,
        data: DataSpec,
        *,
        seed: int,
        progress: Progress = lambda share: None,
    ) -> priors.Denoiser:
        """The diffusion model of the pseudo-labelled images."""
        trained = priors.train(
            self._family,
            self.pseudo_labelled(target, public),
            data,
            seed=seed,
            progress=lambda done, total: progress(done / total),
        )
        assert isinstance(trained, priors.Denoiser)
        return trained

    def tuned(
        self, prior: priors.Denoiser, target: ModelState, public: Tensor, *, seed: int
    ) -> priors.Denoiser:
        """The model after tuning on its own samples; the path from step to step is no variable."""
        stream = child(torch.Generator().manual_seed(seed), "tuning")
        loss_of = self._loss(target, public)
        kept = {k: v for k, v in prior.network.items() if not k.startswith(_TUNED)}
        free = {
            k: v.clone().requires_grad_() for k, v in prior.network.items() if k.startswith(_TUNED)
        }
        adam = torch.optim.AdamW(free.values(), lr=self.tuning_rate)
        schedule, times = prior.schedule, grid(prior.schedule, self.tuning_times)
        labels = torch.arange(self.tuned_at_once) % prior.data.classes
        for _ in range(self.tuning):
            x = normal((len(labels), *prior.data.shape), generator=stream, dtype=torch.float32)
            right: list[float] = []
            adam.zero_grad()
            for time, after in zip(times, [*times[1:], None], strict=True):
                at = torch.full((len(x),), time)
                with torch.enable_grad():
                    output = prior.output(
                        x, at, labels, guidance=self.guidance, weights={**kept, **free}
                    )
                    clean = schedule.clean(x, output, at).clamp(-1, 1)
                    copies = torch.cat(
                        [
                            augmented(
                                clean,
                                generator=stream,
                                shift=1.0,
                                degrees=5.0,
                                scale=0.1,
                                jitter=0.2,
                                blur=0.0,
                            )
                            for _ in range(self.tuning_copies)
                        ]
                    )
                    loss, hits = loss_of(prior, copies, labels.repeat(self.tuning_copies))
                    (loss.mean() / len(times)).backward()  # type: ignore[no-untyped-call]
                right.append(float(hits.float().mean()))
                if after is not None:
                    now, following = schedule.alphas[time], schedule.alphas[after]
                    x0 = clean.detach()
                    noise = (x - now.sqrt().item() * x0) / (1 - now).sqrt().item()
                    x = following.sqrt().item() * x0 + (1 - following).sqrt().item() * noise
            adam.step()
            if right[-1] >= self.enough and sum(right) / len(right) >= self.enough:
                break
        weights = {**prior.weights, **{f"network.{k}": v.detach() for k, v in free.items()}}
        return dataclasses.replace(prior, weights=weights)

    def search(
        self,
        target: ModelState,
        prior: priors.Denoiser,
        public: Tensor,
        *,
        images: int,
        seed: int,
    ) -> Tensor:
        """Images (classes, images, *shape) of a classifier under a model (steps 3 and 4)."""
        stream = child(torch.Generator().manual_seed(seed), "search")
        loss_of = self._loss(target, public)
        classes, shape = prior.data.classes, prior.data.shape
        labels = torch.arange(classes).repeat_interleave(images)
        schedule = prior.schedule
        last = schedule.timesteps - 1

        def denoise(x: Tensor, times: Tensor) -> Tensor:
            return prior.output(x, times, labels, guidance=self.guidance)

        x = normal((len(labels), *shape), generator=stream, dtype=torch.float32).requires_grad_()
        adamax = torch.optim.Adamax([x], lr=self.rate)
        mean_length: Tensor | None = None
        for step in range(self.steps):
            moved = torch.randint(-self.jitter, self.jitter + 1, (), generator=stream)
            time = search_time(step, self.steps) * schedule.timesteps / 1000 + float(moved) - 1
            times = torch.full((len(x),), min(max(round(time), 0), last))
            noise = normal(x.shape, generator=stream, dtype=x.dtype)
            with torch.enable_grad():
                found = schedule.noise(
                    noised := schedule.noised(x, noise, times), denoise(noised, times), times
                )
                apart = (found - noise).square().flatten(1).mean(1).sum()
            (x.grad,) = torch.autograd.grad(apart, x)
            length = _lengths(x.grad)
            share = self.memory
            mean_length = (
                length if mean_length is None else share * mean_length + (1 - share) * length
            )
            adamax.step()
            with torch.enable_grad():
                copies = torch.cat(
                    [
                        augmented(
                            x,
                            generator=stream,
                            shift=2.0,
                            degrees=0.0,
                            scale=0.0,
                            jitter=0.2,
                            blur=self.blur,
                        )
                        for _ in range(self.copies)
                    ]
                )
                loss, _ = loss_of(prior, copies, labels.repeat(self.copies))
            (gradient,) = torch.autograd.grad(loss.sum() / self.copies, x)
            bound = self.allowed * mean_length / _lengths(gradient).clamp(min=1e-12)
            x.grad = gradient * bound.clamp(max=1)
            adamax.step()
        with torch.no_grad():
            clean = x.clamp(-1, 1)
            start = self.last - 1
            noise = normal(x.shape, generator=stream, dtype=x.dtype)
            latents = schedule.noised(clean, noise, torch.full((len(x),), start))
            drawn = ddim(
                schedule,
                denoise,
                latents,
                steps=max(1, round(self.last * self.sampler / schedule.timesteps)),
                eta=1.0,
                start=start,
                generator=stream,
            )
        return prior.unscaled(drawn).reshape(classes, images, *shape)

    def _loss(
        self, target: ModelState, public: Tensor
    ) -> Callable[[priors.Denoiser, Tensor, Tensor], tuple[Tensor, Tensor]]:
        """(model, images in [−1, 1], classes) → loss (n,), whether they are classified so (n,)."""
        classifier = Classifier(target)
        logits, features = classifier.told(public)
        wanted = features[most_confident(logits, self.chosen)].mean(1)

        def loss(prior: priors.Denoiser, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
            logits, features = classifier(prior.unscaled(x.clamp(-1, 1)))
            apart: Tensor = (features - wanted[labels]).square().mean(1)
            margin = top_k_margin(logits, labels, self.k)
            return margin + self.alpha * apart, logits.argmax(1) == labels

        return loss


def _lengths(gradients: Tensor) -> Tensor:
    """Norm of every image's gradient, (n, 1, 1, 1)."""
    found: Tensor = torch.linalg.vector_norm(gradients, dim=(1, 2, 3), keepdim=True)
    return found
