"""Memory of a run: foretold, divided and refused before the work starts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from gradleak import models
from gradleak.attacks import DLG, InvertingGradients, LinearLayer
from gradleak.attacks.parts.gauss_newton import model_bytes
from gradleak.attacks.recipes.gidm_plus import GIDMPlus
from gradleak.cli import run
from gradleak.defenses import TopK
from gradleak.errors import InvalidInput
from gradleak.mechanisms import Denoising, FedAvg, FedSGD
from gradleak.run import memory
from gradleak.run.memory import Need, arranged, needed
from gradleak.types import Attack, DataSpec, Mechanism, ModelState
from tests.laws.small import SPEC

CIFAR = DataSpec.image((3, 32, 32), 10)


def need(
    attack: Attack, client: Mechanism, *, batch_size: int = 1, targets: int = 1, data: int = 0
) -> Need:
    state = ModelState.of(models.build("lenet", CIFAR, seed=0))
    return needed(attack, client, state, CIFAR, batch_size=batch_size, targets=targets, data=data)


def test_more_of_anything_needs_more() -> None:
    least = need(DLG(restarts=1), FedSGD())
    assert need(DLG(restarts=1), FedSGD(), data=7).fixed == least.fixed + 7
    assert need(DLG(restarts=3), FedSGD(), targets=2).trials == 6
    for more in (
        need(DLG(restarts=1), FedSGD(), batch_size=8),
        need(DLG(restarts=1), FedAvg(steps=4)),
    ):
        assert more.at(1) > least.at(1)
        assert more.step is not None
        assert least.step is not None
        assert more.step > least.step
    assert need(DLG(restarts=1), TopK(0.1)(FedSGD())) == least
    single = need(InvertingGradients(), FedSGD())
    assert single.step == (least.step or 0) // 2  # float32 against float64
    assert need(LinearLayer(), FedSGD()).at(1) < single.at(1)


def test_what_a_search_holds_beside_its_steps_counts() -> None:
    """A Gauss–Newton model of image and noise, where it is small enough to be made."""
    small = DataSpec.image((1, 28, 28), 10)

    def fixed(attack: GIDMPlus, spec: DataSpec) -> int:
        state = ModelState.of(models.build("unet", spec, seed=0))
        return needed(attack, Denoising(), state, spec, batch_size=1, targets=1).fixed

    model = model_bytes(2 * 784)
    assert fixed(GIDMPlus(), small) - fixed(GIDMPlus(models=0), small) == model > 2e8
    assert fixed(GIDMPlus(), CIFAR) > fixed(GIDMPlus(models=0), CIFAR)  # of granted noise
    assert model_bytes(2 * 3 * 32 * 32) == 0


def test_a_network_that_looks_at_its_numbers_is_not_foretold() -> None:
    class Fussy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(16, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(x.flatten(1)) * x.detach().numpy().max()

    found = needed(DLG(), FedSGD(), ModelState.of(Fussy()), SPEC, batch_size=1, targets=1)
    assert found.step is None
    line = str(arranged([found], workers=1, most_workers=1, free=memory.GB))
    assert "cannot follow" in line


def test_workers_come_first_and_trials_together_second() -> None:
    job = Need(fixed=100, step=100, trials=9)
    assert job.at(1) == 225
    assert job.at(9) == 100 + 2700
    small = Need(fixed=100, step=1, trials=9)

    def divided(free: int | None, workers: int | None = None) -> tuple[int | None, tuple[int, ...]]:
        found = arranged([job, small], workers=workers, most_workers=4, free=free)
        assert found.free is None or found.peak * max(found.workers or 1, 1) <= found.free
        return found.workers, found.together

    assert divided(10**6) == (4, (9, 9))
    assert divided(None) == (None, (9, 9))
    assert divided(4 * 700) == (4, (2, 9))
    assert divided(4 * 225) == (4, (1, 9))
    assert divided(3 * 225 + 1) == (3, (1, 9))
    assert divided(225, workers=0) == (0, (1, 9))
    assert divided(700, workers=1) == (1, (2, 9))


@pytest.mark.parametrize(
    ("free", "workers", "message"),
    [
        (224, None, "one trial at a time needs about"),
        (224, 0, "one trial at a time needs about"),
        (900, 5, "--workers 5 need about .* expected at most --workers 4"),
    ],
)
def test_what_does_not_fit_is_refused(free: int, workers: int | None, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        arranged([Need(100, 100, 9)], workers=workers, most_workers=4, free=free)


def cgroups(tmp_path: Path, own: str, files: dict[str, str]) -> list[tuple[int, int]]:
    for name, text in files.items():
        (tmp_path / "fs" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "fs" / name).write_text(text)
    tmp_path.mkdir(exist_ok=True)
    (tmp_path / "own").write_text(own)
    return list(memory._cgroups(tmp_path / "fs", tmp_path / "own"))


def test_limits_of_control_groups_count(tmp_path: Path) -> None:
    second = {
        "a/b/memory.max": "max\n",
        "a/memory.max": "5000\n",
        "a/memory.current": "3000\n",
        "a/memory.stat": "anon 1\ninactive_file 500\n",
    }
    assert cgroups(tmp_path / "v2", "0::/a/b\n", second) == [(5000, 2500)]
    first = {
        "memory/x/memory.limit_in_bytes": "700\n",
        "memory/x/memory.usage_in_bytes": "300\n",
        "memory/x/memory.stat": "total_inactive_file 100\n",
    }
    own = "9:name=systemd:/\n4:memory:/x\n0::/\n"
    assert cgroups(tmp_path / "v1", own, first) == [(700, 200)]
    assert cgroups(tmp_path / "none", "0::/elsewhere\n", {}) == []
    assert list(memory._cgroups(tmp_path, tmp_path / "missing")) == []


def test_a_user_who_knows_better_is_believed() -> None:
    assert memory.free_memory(2.5, device="cpu") == 2_500_000_000
    assert (memory.free_memory(None, device="cpu") or 1) > 0


def test_an_audit_shows_its_plan_and_refuses_what_does_not_fit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [
        "audit", "--data", "digits", "--model", "lenet-tiny", "--attack", "linear-layer",
        "--defense", "none", "--targets", "2", "--workers", "0",
    ]  # fmt: skip
    refused, out = tmp_path / "refused", tmp_path / "out"
    assert run([*command, "--memory", "0.1", "--out", str(refused)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: memory: one trial at a time needs about 0.4")
    assert not refused.exists()
    assert run([*command, "--memory", "2", "--out", str(out)]) == 0
    assert "plan: 1 jobs in this process, about 0.4" in capsys.readouterr().err
    assert run([*command, "--memory", "0.1", "--out", str(out)]) == 0  # nothing is left to run
    assert "plan" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--memory", "0"], "--memory 0.0: expected a positive number of GB"),
        (["--memory", "4", "--ray", "auto"], "--memory contradicts --ray"),
    ],
)
def test_bad_memory(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["audit", *options]) == 2
    assert message in capsys.readouterr().err
