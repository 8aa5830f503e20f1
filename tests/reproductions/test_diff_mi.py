"""The table of Diff-MI on tiny pictures."""

from __future__ import annotations

import base64
from functools import partial
from pathlib import Path

import pytest
import torch

from gradleak import data
from gradleak.attacks.inversion import DiffMI, LatentSearch, PixelAscent
from gradleak.priors import diffusion
from gradleak.reproductions import diff_mi
from gradleak.reproductions.diff_mi import (
    ATTACK,
    GAN,
    PIXELS,
    PRIVATE,
    UNTRAINED,
    UNTUNED,
    DiffMITable,
    _Size,
)
from gradleak.reproductions.reproduction import Request
from gradleak.reproductions.running import reproduce

_TINY = DiffMI(pretraining=2, tuning=0, steps=2, chosen=20, width=8, copies=1, batch_size=8)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    digits = data.load("digits")
    monkeypatch.setattr(diff_mi, "DATA", ("mnist",))
    monkeypatch.setattr(diff_mi, "FOLDS", ((5, 6, 7, 8, 9),))
    monkeypatch.setattr(diff_mi, "available", lambda name, data_dir: ("digits", digits))
    size = _Size(8, 1, 3, 30, 100, _TINY, gan=1)
    monkeypatch.setitem(diff_mi._SIZES, "quick", size)
    monkeypatch.setattr(diff_mi, "PixelAscent", partial(PixelAscent, steps=3))
    monkeypatch.setattr(diff_mi, "LatentSearch", partial(LatentSearch, steps=3))
    monkeypatch.setattr(diffusion, "_SAMPLING", 3)


def test_every_line_is_judged_by_class_and_the_report_is_written(
    tiny: None, tmp_path: Path
) -> None:
    table = DiffMITable()
    done = reproduce(table, Request(), out=tmp_path / "r", workers=0)
    rows = {row["row"]: row for row in done.result["rows"]}
    for line in (ATTACK, UNTUNED, UNTRAINED, PIXELS, GAN, PRIVATE, "mean public image"):
        for metric in ("accuracy at 1", "accuracy at 5", "Fréchet distance"):
            assert rows[f"digits, {metric} / {line}"]["ours"]["n"] == 5, line
    accuracy = rows[f"digits, accuracy at 1 / {ATTACK}"]["ours"]
    assert 0 <= accuracy["low"] <= accuracy["value"] <= accuracy["high"] <= 1
    apart = rows[f"digits, accuracy at 1 / {ATTACK} − {PIXELS}"]["ours"]["value"]
    pixels = rows[f"digits, accuracy at 1 / {PIXELS}"]["ours"]["value"]
    assert apart == pytest.approx(accuracy["value"] - pixels)
    # The reference is nearer to the private images than a mean of other classes.
    name = "digits, squared feature distance"
    private, mean = (rows[f"{name} / {x}"]["ours"]["value"] for x in (PRIVATE, "mean public image"))
    assert private < mean
    assert "control: untrained target" in (tmp_path / "r" / "report.html").read_text()


def test_private_classes_are_never_public(tiny: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the attack is given: pictures of other classes, from the half that trained nothing."""
    given: list[torch.Tensor] = []

    class Stop(Exception):
        pass

    def claims(target: object, untrained: object, public: torch.Tensor, *rest: object) -> None:
        given.append(public)
        raise Stop

    monkeypatch.setattr(diff_mi, "_claims", claims)
    cell = DiffMITable().plan(Request())[0].content
    digits = data.load("digits")
    with pytest.raises(Stop):
        diff_mi.inverted(cell, digits, progress=lambda share: None)
    everything = digits.batch(torch.arange(len(digits)))
    same = (given[0].flatten(1)[:, None] == everything.inputs.flatten(1)[None]).all(2)
    assert bool(same.any(1).all())
    # A few digits occur twice: an image may serve under its own class alone.
    assert set(everything.labels[same.any(0)].tolist()) == {0, 1, 2, 3, 4}


def test_pictures_are_kept_as_bytes() -> None:
    kept = diff_mi._encoded(torch.tensor([[[[0.0, 1.0], [0.5, 2.0]]]]))
    assert list(base64.b64decode(kept)) == [0, 255, 128, 255]
