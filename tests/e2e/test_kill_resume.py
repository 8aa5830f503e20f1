"""SIGKILL at any time loses at most the jobs in flight; the same command ends as if undisturbed."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from gradleak import jsonsafe

WORKERS = 2
JOBS = 6
AUDIT = [
    sys.executable, "-m", "gradleak", "audit", "--data", "digits", "--model", "lenet-tiny",
    "--attack", "dlg:steps=60,restarts=1", "--attack", "inverting-gradients:steps=150",
    "--defense", "gaussian-noise:std=0.01", "--defense", "top-k:fraction=0.3",
    "--targets", "4", "--workers", str(WORKERS),
]  # fmt: skip

pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")


def start(out: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [*AUDIT, "--out", str(out)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


def stored(out: Path) -> dict[str, dict[str, Any]]:
    """Complete records on disk, by key."""
    path = out / "trials.jsonl"
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    records = [jsonsafe.loads(line) for line in lines]
    assert len({r["key"] for r in records}) == len(records)
    return {r["key"]: r for r in records}


def findings(out: Path) -> str:
    found = json.loads((out / "result.json").read_text())["findings"]
    for finding in found:
        del finding["cost"]["seconds"]
    return json.dumps(found)


def descendants(pid: int) -> list[int]:
    try:
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
        direct = [int(c) for t in tasks for c in (t / "children").read_text().split()]
    except OSError:
        return []
    return [*direct, *(d for c in direct for d in descendants(c))]


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_killed_at_random_times_and_resumed(tmp_path: Path) -> None:
    calm, stormy = tmp_path / "calm", tmp_path / "stormy"
    assert start(calm).wait(timeout=300) == 0
    # Which engine is fastest is measured once in a run, and may differ between two runs.
    stormy.mkdir()
    (stormy / "engines.json").write_bytes((calm / "engines.json").read_bytes())

    dice = random.Random(2)
    workers_seen = 0
    for records in sorted(dice.sample(range(JOBS - 1), 3)):
        before = stored(stormy)
        process = start(stormy)
        while len(stored(stormy)) < records and process.poll() is None:
            time.sleep(0.02)
        time.sleep(dice.uniform(0, 1))
        workers = descendants(process.pid)
        workers_seen += len(workers)
        process.send_signal(signal.SIGKILL)
        process.wait()
        deadline = time.monotonic() + 30
        while any(map(alive, workers)) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not any(map(alive, workers)), "workers outlive their parent"
        after = stored(stormy)
        assert before.items() <= after.items(), "a stored record was lost or changed"
    assert workers_seen > 0

    kept = stored(stormy)
    assert start(stormy).wait(timeout=300) == 0
    final = stored(stormy)
    assert kept.items() <= final.items()
    assert len(final) == JOBS
    assert findings(stormy) == findings(calm)
    assert not list((stormy / "tensors").glob("*.tmp"))


def test_an_interrupt_keeps_what_is_done(tmp_path: Path) -> None:
    process = start(tmp_path)
    deadline = time.monotonic() + 300
    while not stored(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.05)
    # It means the same as SIGINT, which a shell that runs the tests in the background ignores.
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 130
    assert 0 < len(stored(tmp_path)) <= JOBS
    assert not (tmp_path / "result.json").exists()
    assert start(tmp_path).wait(timeout=300) == 0
    assert len(stored(tmp_path)) == JOBS
