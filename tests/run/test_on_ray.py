"""Trials on a Ray cluster: the same findings, and a lost node costs only what it had in hand."""

import importlib.machinery
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gradleak.auditing import run_audit
from gradleak.cli import run
from gradleak.run.jobs import JobSpec
from gradleak.run.settings import AuditSettings

AUDIT = {
    "data": "digits",
    "model": "lenet-tiny",
    "attack": ["linear-layer", "dlg:steps=20,restarts=1"],
    "defense": ["none", "gaussian-noise:std=0.01"],
    "targets": 2,
}
COMMAND = [
    "audit", "--data", "digits", "--model", "mlp", "--attack", "linear-layer", "--defense", "none",
    "--targets", "2", "--quiet",
]  # fmt: skip


def settings(out: Path, **more: Any) -> AuditSettings:
    return AuditSettings.of(AUDIT | {"out": str(out)} | more)


def findings(out: Path) -> str:
    found = json.loads((out / "result.json").read_text())["findings"]
    for finding in found:
        del finding["cost"]["seconds"]
    return json.dumps(found)


def same_engines(calm: Path, out: Path) -> Path:
    """Which engine is fastest is measured once in a run, and may differ between two runs."""
    out.mkdir()
    (out / "engines.json").write_bytes((calm / "engines.json").read_bytes())
    return out


class Watching:
    """Remembers how many trials were done."""

    def __init__(self) -> None:
        self.shares: list[float] = []

    def planned(self, plan: str) -> None:
        pass

    def preparing(self, what: str) -> None:
        pass

    def running(self, done: float, *, total: int, resumed: int) -> None:
        self.shares.append(done)


def test_without_ray_one_line_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = importlib.util.find_spec

    def lacking(name: str, package: str | None = None) -> importlib.machinery.ModuleSpec | None:
        return None if name == "ray" else find(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", lacking)
    assert run([*COMMAND, "--ray", "local", "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err == (
        "error: --ray 'local' needs Ray, which is not installed: pip install 'gradleak[ray]'\n"
    )


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("nonsense", "expected local, auto or HOST:PORT"),
        ("ray://here:10001", "expected local, auto or HOST:PORT"),
        ("127.0.0.1:1", "cannot connect, Connection refused"),
        ("127.0.0.1:99999", "cannot connect"),
    ],
)
def test_an_address_where_no_ray_is(
    address: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("ray", reason="Ray is not installed")
    out = tmp_path / "out"
    assert run([*COMMAND, "--ray", address, "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: --ray {address!r}: {message}")
    assert error.count("\n") == 1
    assert not out.exists()


def test_a_port_where_something_else_listens(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("ray", reason="Ray is not installed")
    with socket.create_server(("127.0.0.1", 0)) as server:

        def refuse() -> None:
            with server.accept()[0] as client:
                client.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        threading.Thread(target=refuse, daemon=True).start()
        address = f"127.0.0.1:{server.getsockname()[1]}"
        assert run([*COMMAND, "--ray", address, "--out", str(tmp_path / "out")]) == 2
    assert "no Ray head" in capsys.readouterr().err


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A cluster of one node without processors, on this machine; tests add others."""
    pytest.importorskip("ray", reason="Ray is not installed")
    # Its workers are other processes: they find the modules that the tests find.
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(p for p in sys.path if p))
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    from ray.cluster_utils import Cluster

    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    yield nodes
    nodes.shutdown()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning")
def test_a_node_killed_in_the_middle_loses_nothing(
    cluster: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from gradleak.run import on_ray

    submitted: list[str] = []
    submit = on_ray._Load.submit

    def counted(self: on_ray._Load, job: JobSpec) -> Any:
        submitted.append(job.key)
        return submit(self, job)

    monkeypatch.setattr(on_ray._Load, "submit", counted)
    calm, out = tmp_path / "calm", tmp_path / "out"
    work = {"attack": ["linear-layer", "dlg:steps=150,restarts=1"], "targets": 16}
    run_audit(settings(calm, workers=0, **work))
    same_engines(calm, out)
    cluster.add_node(num_cpus=1)
    doomed = cluster.add_node(num_cpus=1)

    class Saboteur(Watching):
        def running(self, done: float, *, total: int, resumed: int) -> None:
            super().running(done, total=total, resumed=resumed)
            if done >= total / 4 and doomed in cluster.worker_nodes:
                cluster.remove_node(doomed, allow_graceful=False)

    report = run_audit(settings(out, ray=cluster.address, **work), watcher=Saboteur())
    assert doomed not in cluster.worker_nodes
    assert report.failed == []
    assert findings(out) == findings(calm)
    keys = [json.loads(line)["key"] for line in (out / "trials.jsonl").read_text().splitlines()]
    assert len(keys) == len(set(keys)) == 8
    assert len(submitted) > len(set(submitted)) == 8  # what the node had in hand ran again
    assert capsys.readouterr().out == ""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning")
def test_a_finished_run_needs_no_cluster(cluster: Any, tmp_path: Path) -> None:
    work = {"attack": "linear-layer", "defense": "none"}
    address = cluster.address
    cluster.add_node(num_cpus=1)
    run_audit(settings(tmp_path / "out", ray=address, **work))
    first = findings(tmp_path / "out")
    cluster.shutdown()
    run_audit(settings(tmp_path / "out", ray=address, **work))
    assert findings(tmp_path / "out") == first


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning")
def test_a_job_that_always_kills_its_worker_is_an_error(
    cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Path("deadly.py").write_text(
        textwrap.dedent(f"""
            import os, signal, torch

            def net():
                if os.getpid() != {os.getpid()}:
                    os.kill(os.getpid(), signal.SIGKILL)
                return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
        """)
    )
    cluster.add_node(num_cpus=1)
    work = {"model": "deadly:net", "attack": "linear-layer", "defense": "none"}
    report = run_audit(settings(tmp_path / "out", ray=cluster.address, **work))
    (finding,) = report.failed
    assert "its Ray worker died 3 times" in finding["reason"]


@pytest.mark.slow
def test_a_local_ray_finds_what_one_process_finds(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="Ray is not installed")
    calm = tmp_path / "calm"
    run_audit(settings(calm, workers=0))
    out = same_engines(calm, tmp_path / "out")
    command = [sys.executable, "-m", "gradleak", "audit", "--ray", "local", "--workers", "2"]
    for name, value in AUDIT.items():
        for each in value if isinstance(value, list) else [value]:
            command += [f"--{name}", str(each)]
    done = subprocess.run(
        [*command, "--out", str(out)], capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr
    assert findings(out) == findings(calm)
    assert {line.split()[0] for line in done.stderr.splitlines()} <= {
        "loading", "plan:", "connecting", "attacking:", "measuring", "writing",
    }  # fmt: skip


@pytest.mark.slow
def test_a_termination_keeps_what_is_done(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="Ray is not installed")
    command = [
        sys.executable, "-m", "gradleak", "audit", "--ray", "local", "--workers", "1",
        "--data", "digits", "--model", "lenet-tiny", "--attack", "dlg:steps=100000,restarts=1",
        "--targets", "2", "--out", str(tmp_path),
    ]  # fmt: skip
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith(b"attacking"):
                break
        process.send_signal(signal.SIGTERM)
        assert b"interrupted: what was done is kept" in process.stderr.read()
        assert process.wait(timeout=60) == 130
