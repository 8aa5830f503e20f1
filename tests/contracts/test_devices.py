"""Every attack runs where the network is, on a device that only claims not to be the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import gradleak as gl
from gradleak import auditing
from gradleak.attacks import ATTACKS, attack_all
from gradleak.attacks.parts.objective import Engine
from gradleak.run import jobs
from tests.contracts.test_attacks import ONE_EXAMPLE, attack_of, digit
from tests.laws.elsewhere import ELSEWHERE, Elsewhere, moved
from tests.laws.small import stream

FEW = {"steps": 2, "restarts": 1, "target": 5, "latent_steps": 1, "candidates": 2, "lifting": 2}


def test_what_is_left_behind_is_noticed() -> None:
    with Elsewhere():
        there = torch.ones(3).to(ELSEWHERE)
        assert there.device == (there * 2).device == ELSEWHERE
        assert float((there + 1).sum()) == 6
        assert (there.cpu() + torch.ones(3)).device.type == "cpu"
        with pytest.raises(RuntimeError, match="left on the CPU"):
            there + torch.ones(3)
        with pytest.raises(RuntimeError, match="to draw elsewhere"):
            there.normal_(generator=stream(0))


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("identifier", ATTACKS)
def test_it_runs_where_the_network_is(identifier: str, size: int) -> None:
    if size > 1 and identifier in ONE_EXAMPLE:
        pytest.skip("its theory is about one example")
    seen, _ = digit(identifier, 0, size=size)
    with Elsewhere():
        there = moved(seen)
        claim = attack_of(identifier, FEW)(there, generator=stream(1))
        found = claim.batch.inputs.cpu()
    here = attack_of(identifier, FEW)(seen, generator=stream(1)).batch.inputs
    assert torch.allclose(found, here)


@pytest.mark.parametrize("engine", ["loop", "vmap", "fast"])
def test_every_engine_runs_where_the_network_is(engine: Engine) -> None:
    seen, _ = digit("inverting-gradients", 0, size=2)
    attack = attack_of("inverting-gradients", FEW | {"restarts": 2})
    with Elsewhere():
        (there,) = attack_all(attack, [moved(seen)], seed=0, engine=engine)
        found = there.batch.inputs.cpu()
    (here,) = attack_all(attack, [seen], seed=0, engine=engine)
    assert there.engine == here.engine == engine
    assert torch.allclose(found, here.batch.inputs, atol=1e-5)


@pytest.mark.parametrize(
    "asked",
    [
        {"model": "lenet-tiny", "attacks": ["posterior:steps=5"], "prior": "gaussian",
         "defenses": ["gaussian-noise:std=0.01"], "bounds": True},
        {"model": "lenet-tiny", "attacks": ["fedavg-leakage:steps=2"], "batch_size": 2,
         "mechanism": "fedavg:steps=2"},
        {"model": "mlp", "attacks": ["trap-weights"], "server": "malicious", "batch_size": 2},
    ],
    ids=["bounds", "fedavg", "malicious"],
)  # fmt: skip
def test_an_audit_runs_on_the_device_it_is_given(
    asked: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (jobs, auditing):
        monkeypatch.setattr(module, "device_of", lambda _: str(ELSEWHERE))
    with Elsewhere():
        found = gl.audit(data="digits", targets=2, workers=0, out=tmp_path / "out", **asked)
    assert {f["state"] for f in found.findings} == {"measured"}
    assert "Error" not in (tmp_path / "out" / "trials.jsonl").read_text()
