"""Diff-MI on digits and clothes: what a classifier's weights tell of classes nobody published."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradleak import models, priors
from gradleak.attacks.inversion import Classifier, DiffMI, LatentSearch, PixelAscent
from gradleak.data import Dataset
from gradleak.errors import CorruptFile, InvalidInput
from gradleak.metrics import clustered_mean, clustered_rate, frechet_distance
from gradleak.metrics.model_inversion import named, nearest_distances
from gradleak.models.layers import Normalize
from gradleak.models.seeding import seeded
from gradleak.reproductions.reproduction import Cell, Estimate, Reproduction, Request, Row
from gradleak.reproductions.sources import available, current, divide, substituted
from gradleak.run.jobs import derive
from gradleak.types import DataSpec, ModelState

DATA = ("mnist", "fashion-mnist")
FOLDS = ((5, 6, 7, 8, 9), (0, 1, 2, 3, 4))
"""Private classes; the other five are public."""

ATTACK, UNTRAINED, PRIVATE = "Diff-MI", "control: untrained target", "private images"
UNTUNED, GAN = "Diff-MI, not tuned", "latents of a GAN"
PIXELS, SUREST = "pixel ascent", "surest public images"
_METRICS: Mapping[str, tuple[str, str]] = {
    "accuracy": ("accuracy at 1", "share"),
    "accuracy5": ("accuracy at 5", "share"),
    "distance": ("squared feature distance", "squared"),
    "frechet": ("Fréchet distance", "squared"),
}
"""Of a line: what a table is called, and the unit."""
_TOP = 5


@dataclass(frozen=True)
class _Size:
    """How much work a budget buys.

    Attributes:
        side: of the pictures, 28 or its half.
        seeds: of classifiers, per fold.
        images: claimed per class.
        training: steps of the classifier and of the evaluation network.
        pool: public images, at most.
        attack: settings.
        gan: steps of the generator whose latents are searched; 0 leaves it and the attack without
            tuning out.
    """

    side: int
    seeds: int
    images: int
    training: int
    pool: int
    attack: DiffMI
    gan: int


_SIZES = {
    "quick": _Size(14, 1, 16, 400, 3000, DiffMI(pretraining=300, tuning=0), gan=0),
    "full": _Size(
        28,
        3,
        32,
        1000,
        10_000,
        DiffMI(pretraining=4000, tuning=50, width=32, chosen=1000),
        gan=2000,
    ),
}


class DiffMITable(Reproduction):
    """Cells: one classifier of five private classes, every line judged by the same network."""

    id = "diff-mi"
    title = "Model inversion through a conditional diffusion model"
    paper = (
        "Li, Hao, Wang, Zhu, Wang, Zhang, Feng, Model Inversion Attacks Through Target-Specific "
        "Conditional Diffusion Models, 2024"
    )
    link = "https://arxiv.org/abs/2407.11424"
    method = (
        "A classifier learns five classes from private images. The attacker holds its weights and "
        "unlabelled public images of the other five classes, and draws images of every private "
        "class. An evaluation network of another architecture and seed, trained on private images "
        "of all ten classes, judges them: accuracy at 1 and 5 (an image of a public class is a "
        "miss), squared distance of its 32 features to the nearest training image of the class, "
        "and the Fréchet distance of those features to the class's training images. That is no "
        "FID: the features are this network's, and at so few images a class it is above zero even "
        "for private images that nobody trained on: the last line. The control is the same "
        "attack on an untrained classifier. The unit is the class: rates have Clopper–Pearson "
        "intervals over classes, other means and paired differences Student's t."
    )
    deviations = (
        "MNIST and Fashion-MNIST, five private classes, a convolutional network (published: 300 "
        "people's faces, VGG16, IR152 and FaceNet); the quick budget halves pictures to 14×14",
        "a U-Net without attention, trained on the pseudo-labelled images from scratch; every "
        "constant beside the published one in gradleak.attacks.inversion.DiffMI",
        "the quick budget leaves tuning out: ten steps of it changed nothing on other classes",
        "tuning samples by DDIM and does not follow gradients from step to step (published: "
        "DPM-Solver++; whether it does was not read)",
        "copies are shifted, brightened and blurred (published: mirrored too, which changes "
        "digits); gradients are clipped per image, so that images of a batch do not meet",
        "no final translation by a robust network",
    )

    def plan(self, request: Request) -> list[Cell]:
        size = _SIZES[request.budget]
        cells = []
        for wanted in DATA:
            try:
                name, dataset = available(wanted, request.data_dir)
            except CorruptFile:
                raise
            except (InvalidInput, KeyError):
                if request.data_dir is not None:
                    raise
                continue  # nothing embedded stands in for it
            for seed in range(size.seeds):
                for fold in FOLDS:
                    content = {
                        "reproduction": self.id,
                        "data": name,
                        "fingerprint": dataset.fingerprint,
                        "budget": request.budget,
                        "size": repr(size),
                        "private": list(fold),
                        "seed": request.seed,
                        "classifier": seed,
                    }
                    cells.append(Cell(content))
        return cells

    def run(
        self,
        cell: Mapping[str, Any],
        found: Sequence[Mapping[str, Any]],
        *,
        data_dir: str | None,
        progress: Callable[[float], None],
    ) -> dict[str, Any]:
        return inverted(cell, current(cell, data_dir), progress=progress)

    def rows(self, cells: Sequence[Cell], records: Mapping[str, Mapping[str, Any]]) -> list[Row]:
        gathered: dict[str, dict[str, dict[str, list[float]]]] = {}
        sure: dict[str, list[float]] = {}
        for cell in cells:
            record = records[cell.key]
            sure.setdefault(cell.content["data"], []).append(record["classifier"])
            for line, scores in record["lines"].items():
                for metric in _METRICS:
                    known = gathered.setdefault(cell.content["data"], {}).setdefault(metric, {})
                    known.setdefault(line, []).extend(scores[metric])
        rows = []
        for data, metrics in gathered.items():
            note = f"classifiers name {_shares(sure[data])} of new images" + substituted(data)
            for metric, lines in metrics.items():
                rows += _table(f"{data}, {_METRICS[metric][0]}", metric, lines, note)
        return rows


def _table(name: str, metric: str, lines: Mapping[str, Sequence[float]], note: str) -> list[Row]:
    """Every line, and what the attack has over the others, class by class."""

    def row(line: str, ours: Estimate, note: str) -> Row:
        unit = _METRICS[metric][1]
        return Row(row=f"{name} / {line}", metric=metric, unit=unit, ours=ours, note=note)

    rows = [row(line, _estimate(metric, values), note) for line, values in lines.items()]
    for other in (PIXELS, SUREST, GAN, UNTRAINED):
        if other in lines:
            apart = Estimate.difference(lines[ATTACK], lines[other])
            rows.append(row(f"{ATTACK} − {other}", apart, _word(apart)))
    return rows


def _estimate(metric: str, values: Sequence[float]) -> Estimate:
    clusters = [[value] for value in values]
    interval = (
        clustered_rate(clusters)
        if metric.startswith("accuracy")
        else clustered_mean(clusters, limits=(0.0, float("inf")))
    )
    mean = sum(values) / len(values)
    return Estimate(mean, interval.low, interval.high, interval.confidence, len(values))


def _word(apart: Estimate) -> str:
    assert apart.low is not None
    assert apart.high is not None
    if apart.low > 0:
        return "higher"
    return "lower" if apart.high < 0 else "not told apart"


def _shares(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.3f}" for value in values)


def inverted(
    cell: Mapping[str, Any], dataset: Dataset, *, progress: Callable[[float], None]
) -> dict[str, Any]:
    """Scores of every line by class, the classifier's accuracy, and a picture of each class."""
    size = _SIZES[cell["budget"]]
    small = _reduced(dataset, size.side)
    private = torch.tensor(cell["private"])
    halves = divide(dataset, cell["seed"])
    mine = torch.isin(small.labels, private)
    held, spare = halves.clients[mine[halves.clients]], halves.public[mine[halves.public]]
    public = small.batch(halves.public[~mine[halves.public]][: size.pool]).inputs
    seed = derive(cell["seed"], "classifier", cell["classifier"])
    own = _own(small, held, private)
    start = models.build("convnet", own.spec, seed=seed)
    everything = torch.arange(len(own))
    target = models.train(start, own, everything, steps=size.training, seed=seed)
    told = models.accuracy(
        target, new := _own(small, spare, private), torch.arange(min(len(new), 2000))
    )
    judge = Classifier(_judge(small, halves.clients, seed=derive(cell["seed"], "judge"), size=size))
    progress(0.1)
    claims = _claims(target, ModelState.of(start), public, own.spec, size, seed, progress)
    count = size.images
    spared = [new.batch(_of(new, c, count)).inputs for c in range(len(private))]
    claims[PRIVATE] = torch.stack(spared)
    _, features = judge.told(own.batch(everything[:2000]).inputs)
    lines = {
        line: _scores(judge, images, private, features, own.labels[:2000])
        for line, images in claims.items()
    }
    pictures = {line: _encoded(images[:, 0]) for line, images in claims.items()}
    return {"lines": lines, "classifier": told, "pictures": pictures, "side": size.side}


def _claims(
    target: ModelState,
    untrained: ModelState,
    public: Tensor,
    data: DataSpec,
    size: _Size,
    seed: int,
    progress: Callable[[float], None],
) -> dict[str, Tensor]:
    """Line → images (classes, images, *shape); each from weights and public images alone."""
    attack, count = size.attack, size.images
    found: dict[str, Tensor] = {}
    prior = attack.prior(
        target, public, data, seed=seed, progress=lambda share: progress(0.1 + 0.4 * share)
    )
    found[ATTACK] = attack.search(target, prior, public, images=count, seed=seed)
    progress(0.55)
    found[UNTRAINED] = attack(
        untrained,
        public,
        data,
        images=count,
        seed=seed,
        progress=lambda share: progress(0.55 + 0.35 * share),
    )
    found[PIXELS] = PixelAscent(k=attack.k)(target, data, images=count, seed=seed)
    chosen = attack.pseudo_labelled(target, public)
    by_class = chosen.inputs.reshape(data.classes, -1, *data.shape)
    found[SUREST] = by_class[:, :count]
    found["mean of the pseudo-labelled"] = by_class.mean(1, keepdim=True).expand_as(found[SUREST])
    found["mean public image"] = public.mean(0).expand_as(found[SUREST])
    stream = torch.Generator().manual_seed(derive(seed, "samples"))
    labels = torch.arange(data.classes).repeat_interleave(count)
    for line, asked in (("prior, told the class", labels), ("prior, told nothing", len(labels))):
        drawn = prior.sample(asked, generator=stream).float()
        found[line] = drawn.reshape(data.classes, count, *data.shape)
    if size.gan:
        trained = attack.pretrained(target, public, data, seed=seed)
        found[UNTUNED] = attack.search(target, trained, public, images=count, seed=seed)
        generator = priors.train(priors.Gan(steps=size.gan), chosen, data, seed=seed)
        assert isinstance(generator, priors.Generator)
        found[GAN] = LatentSearch(k=attack.k)(target, generator, images=count, seed=seed)
    return found


def _scores(
    judge: Classifier, images: Tensor, private: Tensor, features: Tensor, labels: Tensor
) -> dict[str, list[float]]:
    """Every metric, one number per class.

    Args:
        judge: of all classes of the data.
        images: (classes, images, *shape).
        private: what the data call these classes.
        features: of training images.
        labels: of those, as the classifier calls them.
    """
    classes, count = images.shape[:2]
    logits, own = judge.told(images.flatten(0, 1).float())
    meant = torch.arange(classes).repeat_interleave(count)
    distance = nearest_distances(own, meant, features, labels).reshape(classes, count)
    hit, near = (named(logits, private[meant], k=k).double() for k in (1, _TOP))
    return {
        "accuracy": hit.reshape(classes, count).mean(1).tolist(),
        "accuracy5": near.reshape(classes, count).mean(1).tolist(),
        "distance": distance.mean(1).tolist(),
        "frechet": [
            frechet_distance(own[meant == c], features[labels == c]) for c in range(classes)
        ],
    }


@lru_cache(maxsize=2)
def _reduced(dataset: Dataset, side: int) -> Dataset:
    """The data with pictures of this side, a whole fraction of their own."""
    times = dataset.spec.shape[-1] // side
    if times <= 1:
        return dataset
    whole = torch.arange(len(dataset))
    small = [F.avg_pool2d(dataset.batch(part).inputs, times) for part in torch.split(whole, 5000)]
    return Dataset.of(
        dataset.name, torch.cat(small).clamp(0, 1), dataset.labels, classes=dataset.spec.classes
    )


def _own(dataset: Dataset, indices: Tensor, private: Tensor) -> Dataset:
    """Examples of the private classes, called 0 to k − 1."""
    called = torch.full((dataset.spec.classes,), -1).scatter(0, private, torch.arange(len(private)))
    labels = called[dataset.labels[indices]]
    return Dataset.of(dataset.name, dataset.images[indices], labels, classes=len(private))


def _of(dataset: Dataset, c: int, count: int) -> Tensor:
    return torch.nonzero(dataset.labels == c)[:count, 0]


@lru_cache(maxsize=2)
def _judge(dataset: Dataset, indices: Tensor, *, seed: int, size: _Size) -> ModelState:
    """The evaluation network, of all classes."""
    channels, height, width = dataset.spec.shape
    with seeded(seed):
        network = nn.Sequential(
            Normalize(),
            nn.Conv2d(channels, 16, 5, padding=2),
            nn.LeakyReLU(0.1),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 5, padding=2),
            nn.LeakyReLU(0.1),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(32 * (height // 4) * (width // 4), 32),
            nn.LeakyReLU(0.1),
            nn.Linear(32, dataset.spec.classes),
        )
    return models.train(network, dataset, indices, steps=size.training, seed=seed)


def _encoded(images: Tensor) -> str:
    """Pictures as base64 of their bytes, for docs/assets/model_inversion.py."""
    levels = (images.float().clamp(0, 1) * 255).round().byte().contiguous()
    return base64.b64encode(levels.numpy().tobytes()).decode()
