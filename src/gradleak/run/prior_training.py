"""`gradleak prior train`: weights, a card and a sheet of samples, from public data alone."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch
from PIL import Image
from torch import Tensor

from gradleak import priors, registry
from gradleak.data import Dataset
from gradleak.errors import InvalidInput, nearest
from gradleak.run.jobs import chosen_device, derive
from gradleak.run.sample_quality import SampleQuality, sample_quality
from gradleak.run.store import write_whole
from gradleak.run.trial import divide, load_data
from gradleak.seeding import child
from gradleak.types import Batch

TRAINABLE = tuple(
    name for name, family in priors.PRIORS.items() if issubclass(family.fitted, priors.Network)
)
SAMPLES = 256
"""Pictures that a generator is judged by."""
_SHEET = (6, 12)
"""Rows and columns of the sheet."""
_SCALE = 2


class Progress(Protocol):
    """Told the steps done, all steps, and those that an earlier run had done."""

    def __call__(self, done: float, *, total: int, resumed: int) -> None: ...


def train_prior(
    spec: str,
    *,
    data: str,
    data_dir: str | None,
    seed: int,
    out: Path,
    progress: Progress | None = None,
    device: str = "cpu",
    samples: int = SAMPLES,
) -> None:
    """Train a prior on the half of a data set that audits with the same seed hold public.

    Args:
        spec: "id:field=value,..." of a prior that is a network.
        data: name or path of the data.
        data_dir: where named data lie.
        seed: divides the data and starts the training.
        out: safetensors file; beside it come a card, .md, and samples, .png. While the training
            lasts, `out` with the suffix .training holds what is done.
        progress: told of every step.
        device: "auto", "cpu" or "cuda".
        samples: pictures of a generator that its score is measured with; 0 for no score.

    Raises:
        InvalidInput: a prior that is not trained, or a file that exists or cannot be written.
    """
    family = priors.build(spec)
    if family.id not in TRAINABLE:
        raise InvalidInput(
            f"prior {family.id!r} is fitted by the run that needs it: {nearest('', TRAINABLE)}"
        )
    if out.suffix != ".safetensors" or not out.parent.is_dir():
        raise InvalidInput(f"--out {str(out)!r}: expected a .safetensors file in a folder there is")
    if out.exists():
        raise InvalidInput(f"--out {str(out)!r} exists: expected a new file")
    where = chosen_device(device)
    _check_samples(samples)
    dataset = load_data(data, data_dir)
    public = dataset.batch(divide(dataset, seed).public)
    begun: list[int] = []

    def told(done: int, total: int) -> None:
        if not begun:
            begun.append(done - 1)
        if progress is not None:
            progress(done, total=total, resumed=begun[0])

    checkpoint = out.with_suffix(".training")
    prior = priors.train(
        family,  # type: ignore[arg-type]
        priors.prepared(public, dataset.spec),
        dataset.spec,
        seed=derive(seed, "prior"),
        checkpoint=checkpoint,
        progress=told,
        device=where,
    )
    priors.save(prior, out)
    _draw(_samples(prior, public), out.with_suffix(".png"))
    write_card(prior, dataset, data=data, seed=seed, out=out, samples=samples)
    checkpoint.unlink(missing_ok=True)


def score_prior(
    out: Path, *, data: str, data_dir: str | None, seed: int, samples: int = SAMPLES
) -> SampleQuality:
    """Score a trained generator that lies at `out`, and write its card anew.

    Args:
        out: safetensors file that `train_prior` wrote.
        data: name or path of the data it was trained on.
        data_dir: where named data lie.
        seed: it was trained with.
        samples: pictures that the score is measured with.

    Raises:
        InvalidInput: no generator, other data or another seed, or too few pictures.
    """
    _check_samples(samples)
    prior = priors.load(out)
    if not isinstance(prior, priors.Denoiser | priors.Generator) or not samples:
        raise InvalidInput(f"{str(out)!r} with {samples} samples: expected a generator, and some")
    dataset = load_data(data, data_dir)
    public = dataset.batch(divide(dataset, seed).public)
    if len(public) != len(prior.examples) or not bool(prior.seen(public.inputs).all()):
        raise InvalidInput(
            f"{str(out)!r} was not trained on the public half of {data} with --seed {seed}"
        )
    score = write_card(prior, dataset, data=data, seed=seed, out=out, samples=samples)
    if score is None:
        raise InvalidInput(f"data {data!r}: too few pictures for a score from {samples} samples")
    return score


def write_card(
    prior: priors.Network, dataset: Dataset, *, data: str, seed: int, out: Path, samples: int
) -> SampleQuality | None:
    """Write the card beside `out`, with the score where there is one; return that."""
    score = _score(prior, dataset, seed=seed, samples=samples)
    count = len(divide(dataset, seed).public)
    write_whole(out.with_suffix(".md"), _card(prior, dataset, count, data, seed, out, score))
    return score


def _score(
    prior: priors.Network, dataset: Dataset, *, seed: int, samples: int
) -> SampleQuality | None:
    """A generator's samples against pictures that it was not trained on."""
    if not isinstance(prior, priors.Denoiser | priors.Generator) or not samples:
        return None
    halves = divide(dataset, seed)
    stream = child(torch.Generator().manual_seed(seed), "score")
    parts = torch.split(torch.arange(samples) % prior.data.classes, 64)
    drawn = torch.cat(
        [prior.sample(part, generator=child(stream, f"{i}")) for i, part in enumerate(parts)]
    )
    try:
        return sample_quality(drawn, dataset, halves.public, seed=seed, half=halves.clients)
    except InvalidInput:
        return None


def _check_samples(samples: int) -> None:
    if samples < 0 or samples == 1:
        raise InvalidInput(f"--samples {samples}: expected at least 2 pictures, or 0")


def _samples(prior: priors.Network, public: Batch) -> Tensor:
    """Draws of a generator; of an autoencoder, public pictures above what it makes of them."""
    rows, columns = _SHEET
    if isinstance(prior, priors.Generator):
        return prior.sample(rows * columns, generator=torch.Generator().manual_seed(0))
    if isinstance(prior, priors.Denoiser):
        classes = torch.arange(rows * columns) % prior.data.classes
        return prior.sample(classes, generator=torch.Generator().manual_seed(0))
    assert isinstance(prior, priors.Manifold)
    pictures = public.inputs[: rows * columns // 2]
    both = (torch.split(each, columns) for each in (pictures, prior.reproduced(pictures)))
    pairs = zip(*both, strict=True)
    return torch.cat([each for pair in pairs for each in pair])


def _draw(pictures: Tensor, path: Path) -> None:
    """A sheet of pictures (n, channels, height, width) in [0, 1]."""
    columns = _SHEET[1]
    levels = (pictures.float().clamp(0, 1) * 255).round().byte()
    sheet = torch.cat([torch.cat(list(row), -1) for row in torch.split(levels, columns)], -2)
    array = sheet[0].numpy() if len(sheet) == 1 else sheet.permute(1, 2, 0).numpy()
    image = Image.fromarray(array)
    image.resize((image.width * _SCALE, image.height * _SCALE), Image.Resampling.NEAREST).save(path)


def _card(
    prior: priors.Network,
    dataset: Dataset,
    count: int,
    data: str,
    seed: int,
    out: Path,
    score: SampleQuality | None,
) -> str:
    """What a reader needs to know before relying on the weights."""
    numbers = sum(v.numel() for v in prior.weights.values())
    notation = registry.describe(prior.family)
    told = ""
    if score is not None:
        told = f"""
* **Samples:** Fréchet distance {score.frechet:.3g} of {score.samples} samples from {score.real:,}
  pictures that it was not trained on; as many other pictures lie {score.floor:.2g} from those.
  Features: {score.extractor}; it names {score.extractor_accuracy:.1%} of those pictures. No
  Inception features: the number compares with those of the same features alone."""
    return f"""# {out.stem}

{prior.title}, {numbers:,} weights, {out.stat().st_size / 1e6:.1f} MB, written by

    gradleak prior train {notation} --data {data} --seed {seed} --out {out.name}

* **Data:** {count:,} examples of {dataset.name} ({dataset.licence or "licence unknown"}), the
  public half of audits with `--seed {seed}`. Clients of those audits hold the other half; audits
  refuse a prior that was trained on what is private in them.
* **Use:** `--knows prior --prior {out.name}`, for pictures of {dataset.spec.shape} in
  {dataset.spec.bounds}.
* **Limits:** small, and trained briefly; the sheet {out.stem}.png shows what it knows. It makes an
  attack look for such pictures and for no others.{told}
* **Digest:** {priors.digest(prior)}
"""
