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
from gradleak.run.jobs import derive
from gradleak.run.store import write_whole
from gradleak.run.trial import divide, load_data
from gradleak.types import Batch

TRAINABLE = tuple(
    name for name, family in priors.PRIORS.items() if issubclass(family.fitted, priors.Network)
)
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
    )
    priors.save(prior, out)
    _draw(_samples(prior, public), out.with_suffix(".png"))
    write_whole(out.with_suffix(".md"), _card(prior, dataset, len(public), data, seed, out))
    checkpoint.unlink(missing_ok=True)


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
    prior: priors.Network, dataset: Dataset, count: int, data: str, seed: int, out: Path
) -> str:
    """What a reader needs to know before relying on the weights."""
    numbers = sum(v.numel() for v in prior.weights.values())
    notation = registry.describe(prior.family)
    return f"""# {out.stem}

{prior.title}, {numbers:,} weights, {out.stat().st_size / 1e6:.1f} MB, written by

    gradleak prior train {notation} --data {data} --seed {seed} --out {out.name}

* **Data:** {count:,} examples of {dataset.name} ({dataset.licence or "licence unknown"}), the
  public half of audits with `--seed {seed}`. Clients of those audits hold the other half; audits
  refuse a prior that was trained on what is private in them.
* **Use:** `--knows prior --prior {out.name}`, for pictures of {dataset.spec.shape} in
  {dataset.spec.bounds}.
* **Limits:** small, and trained briefly; the sheet {out.stem}.png shows what it knows. It makes an
  attack look for such pictures and for no others.
* **Digest:** {priors.digest(prior)}
"""
