"""The table of federated diffusion models."""

from __future__ import annotations

import os

import pytest
import torch

from gradleak import priors
from gradleak.reproductions import gidm
from gradleak.reproductions.gidm import KNOWN, PRIVATE, Gidm
from gradleak.reproductions.reproduction import Estimate, Request
from gradleak.reproductions.sources import available


def records(cells: list[gidm.Cell]) -> dict[str, dict[str, object]]:
    """What cells would leave if victim number k had k dB."""
    found: dict[str, dict[str, object]] = {}
    for cell in cells:
        values = [float(k) for k in range(*cell.content["group"])]
        scores = dict.fromkeys(("psnr_db", "mse", "ssim", "mean_image"), values)
        found[cell.key] = {**scores, "claims": "data:,c", "truths": "data:,t", "cpu_seconds": 1.0}
    return found


def test_every_line_attacks_the_same_victims() -> None:
    cells = Gidm().plan(Request())
    groups: dict[tuple[object, ...], set[str]] = {}
    for cell in cells:
        content = cell.content
        where = tuple(content[k] for k in ("data", "known", "target", "time")) + tuple(
            content["group"]
        )
        groups.setdefault(where, set()).add(content["line"])
    assert groups
    for where, lines in groups.items():
        assert lines == {line.name for line in (KNOWN if where[1] else PRIVATE)}
    assert len({cell.key for cell in cells}) == len(cells)


def test_rows_hold_medians_pictures_and_the_guess() -> None:
    cells = Gidm().plan(Request())
    rows = Gidm().rows(cells, records(cells))
    assert all(row.picture and row.metric == "median_psnr_db" for row in rows)
    assert any(row.row.endswith("mean image") for row in rows)
    assert all(row.paper is None for row in rows)  # no figure of the paper could be read


def test_a_median_of_few_is_within_their_range() -> None:
    """Four independent values hold the median between them with 1 − 2 · 2⁻⁴."""
    few = Estimate.median([4.0, 1.0, 2.0, 9.0])
    assert (few.value, few.low, few.high, few.confidence) == (3.0, 1.0, 9.0, 0.875)
    many = Estimate.median([float(k) for k in range(16)])
    assert many.value == 7.5
    assert many.low is not None
    assert many.high is not None
    assert 0 < many.low < 7.5 < many.high < 15


def test_victims_were_seen_by_neither_network() -> None:
    _, dataset = available("mnist", None)
    victims = gidm._victims(dataset, "mnist", 0)
    assert len(victims) >= 64
    inputs = dataset.batch(victims).inputs
    for network in ("denoiser-mnist", "diffusion-mnist"):
        known = priors.load(priors.TRAINED[network])
        assert isinstance(known, priors.Denoiser)
        assert not known.seen(inputs).any()


def test_a_prior_that_does_not_come_along_is_trained_on_public_images(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(gidm._FITTED, "digits", "diffusion:steps=4,width=8,timesteps=20")
    name, dataset = available("digits", None)
    prior, target = gidm._networks(name, dataset)
    assert prior is target
    inputs = dataset.batch(gidm._victims(dataset, name, 0)).inputs
    assert len(inputs) >= 64
    assert not prior.seen(inputs).any()


def test_faces_are_attacked_where_they_lie() -> None:
    def names(data_dir: str | None) -> set[str]:
        plan = Gidm().plan(Request(budget="full", data_dir=data_dir))
        return {cell.content["data"] for cell in plan}

    assert "olivetti" not in names(None) or "GRADLEAK_DATA" in os.environ
    found = os.environ.get("GRADLEAK_DATA")
    if not found:
        pytest.skip("needs $GRADLEAK_DATA")
    assert names(found) >= {"mnist", "fashion-mnist", "cifar10", "olivetti"}


def test_targets_start_from_the_weights_that_their_name_says() -> None:
    _, dataset = available("mnist", None)
    trained = gidm._trained("denoiser-mnist")
    state = gidm._state("trained", trained, dataset, 3)
    for name, value in trained.network.items():
        assert torch.equal(state.params[name], value.double())
    first, second = (gidm._state("random", trained, dataset, seed) for seed in (3, 4))
    name = "first.weight"
    assert not torch.equal(first.params[name], second.params[name])


@pytest.mark.slow
def test_a_victim_of_the_quick_table_is_recovered() -> None:
    cell = next(
        c for c in Gidm().plan(Request()) if c.content["line"] == "GIDM" and c.content["known"]
    )
    content = {**cell.content, "group": [0, 1]}
    _, dataset = available("mnist", None)
    record = gidm.attacked(content, dataset, progress=lambda share: None)
    assert record["psnr_db"][0] > 45
    assert record["psnr_db"][0] > record["mean_image"][0] + 15
