"""The audit of a secure sum: against clients, with colluders, and in the report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import gradleak as gl
from gradleak.data import load
from gradleak.defenses import build
from gradleak.errors import InvalidInput
from gradleak.report.schema import validate_result
from gradleak.run.ceilings import ceiling
from gradleak.threat import ThreatModel


def run(out: Path, **changes: Any) -> gl.LeakageReport:
    return gl.audit(
        **{
            "data": "digits",
            "model": "mlp",
            "attacks": ["lone-rows", "inverting-gradients:steps=20"],
            "defenses": ["none"],
            "targets": 3,
            "workers": 0,
            "out": out,
            **changes,
        }
    )


def scores(finding: dict[str, Any]) -> list[Any]:
    return [(t["scores"], t["control"], t["objective_at_truth"]) for t in finding["targets"]]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> gl.LeakageReport:
    return run(tmp_path_factory.mktemp("alone"))


@pytest.fixture(scope="module")
def sums(tmp_path_factory: pytest.TempPathFactory) -> gl.LeakageReport:
    return run(tmp_path_factory.mktemp("sums"), view="aggregate", clients_in_sum=[1, 4])


def test_a_sum_of_one_client_is_no_aggregation(
    alone: gl.LeakageReport, sums: gl.LeakageReport
) -> None:
    """The same trials to the last bit, under another threat model."""
    for single, one in zip(alone.findings, sums.findings[:2], strict=True):
        assert one["scenario"]["clients"] == one["scenario"]["honest_clients"] == 1
        assert one["threat"]["view"] == "aggregate"
        assert single["threat"]["view"] == "client"
        assert scores(single) == scores(one)


def test_all_but_one_colluding_is_no_aggregation(alone: gl.LeakageReport, tmp_path: Path) -> None:
    """Images to 1e-3 of the range where the attack is exact: float32 rounds a mean and back."""
    known = run(
        tmp_path, view="aggregate", clients_in_sum=4, colluding=3, attacks="lone-rows"
    ).findings[0]
    assert known["scenario"] | {"clients": 4, "honest_clients": 1} == known["scenario"]
    assert known["threat"]["colluding"] == 3
    assert known["id"].endswith("/fedsgd-b1-n4-k3/none/lone-rows")
    for one, same in zip(known["targets"], alone.findings[0]["targets"], strict=True):
        assert one["scores"]["psnr_db"][0] > 60
        assert one["scores"]["identified"] == same["scores"]["identified"]


def test_the_report_draws_leakage_against_honest_clients(sums: gl.LeakageReport) -> None:
    validate_result(sums.result)
    page = sums.page.read_text()
    assert "Leakage by number of honest clients in a sum" in page
    assert "identified (%)" in page
    assert "It sees only the sum of the clients" in page
    assert "sum of 4 clients" in page
    four = sums.findings[2]
    assert (four["trials"]["run"], four["trials"]["images"]) == (3, 12)
    assert four["measurements"]["identified"]["chance"] == pytest.approx(4 / four["bank_size"])
    assert four["bank_size"] == sums.findings[0]["bank_size"]


def test_larger_sums_hold_the_clients_of_smaller_ones(sums: gl.LeakageReport) -> None:
    """The first image of every target is the same, so that the curve is paired."""
    first, fourth = (
        load_file(str(sums.directory / sums.findings[i]["tensors"][0]))["truth"] for i in (0, 2)
    )
    assert fourth.shape[1] == 4
    assert torch.equal(fourth[:, :1], first)


def test_a_sum_alone_is_never_called_protected(tmp_path: Path) -> None:
    """An attack that fails on sums leaves them open."""
    found = run(
        tmp_path, view="aggregate", clients_in_sum=2, targets=8, attacks="linear-layer"
    ).findings[0]
    assert found["verdict"] == "inconclusive"
    assert "nothing but the sum protects" in found["reason"]


@pytest.mark.parametrize("spec", ["clip:norm=1+gaussian-noise:std=0.5", "dp-sgd:norm=1"])
def test_a_proved_ceiling_falls_with_honest_clients(spec: str) -> None:
    """One of n changes the mean by C/n under noise of σ/√n: √n times the noise multiplier."""
    digits = load("digits")
    bank = digits.batch(torch.arange(50))
    found = [
        ceiling(
            build(spec)(gl.FedSGD()),
            ThreatModel(),
            bank,
            digits.spec,
            batch_size=1,
            guesses=1,
            clients=n,
        )
        for n in (1, 4)
    ]
    assert found[1]["noise_multiplier"] == pytest.approx(2 * found[0]["noise_multiplier"])
    assert found[1]["epsilon"] < found[0]["epsilon"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"clients_in_sum": 4}, "--clients-in-sum: expected --view aggregate"),
        ({"colluding": 1}, "--colluding: expected --view aggregate"),
        ({"view": "aggregate", "clients_in_sum": 2, "colluding": 2}, "fewer than the 2"),
        ({"view": "aggregate", "clients_in_sum": 0}, "--clients-in-sum 0"),
        ({"view": "aggregate", "clients": 2}, "--clients contradicts"),
        ({"view": "aggregate", "mechanism": "vertical"}, "fedsgd or fedavg"),
        ({"view": "aggregate", "knows": "bn_statistics"}, "bn_statistics contradicts"),
        ({"view": "aggregate", "clients_in_sum": 400, "targets": 8}, "of each of 400 clients"),
        ({"view": "sum"}, "--view 'sum'"),
    ],
)
def test_requests_that_make_no_sense(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=words):
        run(tmp_path, **changes)
