"""What clients draw and keep leaves misses unexplained; an order that they keep does not."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

import gradleak as gl
from gradleak.mechanisms import Denoising, DenoisingAvg, FedAvg, FedSGD
from tests.laws.small import batch_of, stream

SHORT: dict[str, Any] = {"data": "digits", "targets": 8, "workers": 0}
GENERIC = "inverting-gradients:steps=1,restarts=1"


@pytest.mark.parametrize(
    ("client", "determined"),
    [
        (FedSGD(), True),
        (FedAvg(steps=3), True),
        (FedAvg(minibatch_size=1, order="shuffled"), True),
        (FedAvg(minibatch_size=1, order="shuffled", epochs=2), False),
        (Denoising(), False),
        (Denoising(timestep=5), False),
        (DenoisingAvg(steps=2), False),
    ],
)
def test_a_client_says_what_a_batch_determines(client: FedSGD | FedAvg, determined: bool) -> None:
    assert client.determined(3) is determined


def test_draws_that_are_known_determine_a_denoiser() -> None:
    draws = Denoising().draw(batch_of(3), generator=stream(0))
    assert Denoising(draws=draws).determined(3)
    assert DenoisingAvg(draws=draws, steps=1).determined(3)
    assert not DenoisingAvg(draws=draws, minibatch_size=1, order="shuffled").determined(3)


def test_no_protection_is_praised_for_noise_that_the_client_kept(tmp_path: Path) -> None:
    """A search that takes the noise for zero ends below the truth's objective, and misses."""
    found = gl.audit(
        **SHORT, model="unet", mechanism="denoising", attacks=[GENERIC],
        defenses=["gaussian-noise:std=0.001"], out=tmp_path / "out",
    )  # fmt: skip
    for finding in found.findings:
        assert finding["missed"]["unattributed"] == 8
        assert finding["missed"]["information_limited"] == 0
        assert finding["verdict"] == "inconclusive"
        assert all(math.isnan(t["objective_at_truth"] or math.nan) for t in finding["targets"])


def test_the_truth_lies_as_the_client_visited_it(tmp_path: Path) -> None:
    found = gl.audit(
        **SHORT | {"targets": 2}, model="lenet-tiny", batch_size=4, attacks=["dlg:steps=1"],
        mechanism="fedavg:minibatch_size=1,order=shuffled", knows="batch_size,labels,mechanism",
        out=tmp_path / "out",
    )  # fmt: skip
    for target in found.findings[0]["targets"]:
        assert math.isclose(target["objective_at_truth"], 0, abs_tol=1e-6)
