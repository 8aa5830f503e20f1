"""Worker processes: one that dies costs only the job in hand."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gradleak.auditing import run_audit
from gradleak.run import executor
from gradleak.run.settings import AuditSettings

# The parent builds the network too; only other processes may misbehave.
NETWORK = """
import os, signal, sys, torch
from pathlib import Path

def net():
    print("networks may print")
    if os.getpid() != {here}:
        {misbehave}
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
"""


@pytest.fixture
def network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Write a module with a network whose workers do what the text says."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    name = f"net_{tmp_path.name}".replace("-", "_")

    def write(misbehave: str) -> str:
        (tmp_path / f"{name}.py").write_text(NETWORK.format(misbehave=misbehave, here=os.getpid()))
        return f"{name}:net"

    return write


def settings(model: str, **more: Any) -> AuditSettings:
    return AuditSettings.of(
        {
            "data": "digits",
            "model": model,
            "attack": "linear-layer",
            "defense": ["none", "clip:norm=0.1"],
            "targets": 2,
            "workers": 1,
            "out": "out",
        }
        | more
    )


def test_a_killed_worker_costs_one_rerun(network: Callable[[str], str], tmp_path: Path) -> None:
    died = tmp_path / "died"
    model = network(
        f"p = Path({str(died)!r})\n"
        "        if not p.exists(): p.touch(); os.kill(os.getpid(), signal.SIGKILL)"
    )
    report = run_audit(settings(model))
    assert died.exists()
    assert [f["state"] for f in report.findings] == ["measured", "measured"]
    assert report.failed == []
    lines = (tmp_path / "out" / "trials.jsonl").read_text().splitlines()
    assert len(lines) == len({json.loads(line)["key"] for line in lines}) == 2


def test_a_job_that_always_kills_is_an_error(network: Callable[[str], str]) -> None:
    model = network("os.kill(os.getpid(), signal.SIGKILL)")
    report = run_audit(settings(model, defense="none"))
    (finding,) = report.failed
    assert finding["state"] == "error"
    assert "died 3 times: killed by signal 9" in finding["reason"]
    # What failed gets another chance with the next run.
    repaired = run_audit(settings(network("pass"), defense="none"))
    assert repaired.failed == []


def test_workers_that_do_not_start(
    network: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(executor, "_START_WORKER", "raise SystemExit('no luck')")
    with pytest.raises(executor.WorkersFailed, match="do not start: exit status 1, no luck"):
        run_audit(settings(network("pass")))


def test_workers_and_this_process_agree(network: Callable[[str], str]) -> None:
    model = network("pass")
    here = run_audit(settings(model, workers=0, out="here"))
    there = run_audit(settings(model, workers=2, out="there"))
    for a, b in zip(here.findings, there.findings, strict=True):
        a["cost"].pop("seconds")
        b["cost"].pop("seconds")
    assert json.dumps(here.findings) == json.dumps(there.findings)


def test_an_interrupt_ends_the_workers(network: Callable[[str], str]) -> None:
    class Impatient:
        def planned(self, plan: str) -> None:
            pass

        def preparing(self, what: str) -> None:
            pass

        def running(self, done: float, *, total: int, resumed: int) -> None:
            if children():
                raise KeyboardInterrupt

    model = network("__import__('time').sleep(600)")
    with pytest.raises(KeyboardInterrupt):
        run_audit(settings(model), watcher=Impatient())
    deadline = time.monotonic() + 30
    while children() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert children() == []


def children() -> list[str]:
    return Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
