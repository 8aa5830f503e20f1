"""A stock Flower app gains a protection and a recorder by two lines, and its audit is honest."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

pytest.importorskip("flwr")

import gradleak as gl
from gradleak.cli.app import run as command
from gradleak.report.findings import as_given
from gradleak.run.jobs import derive
from tests.federate.quickstart import EXAMPLE, imported, run_app, tell_truth

DEFENSE = "clip:norm=1+gaussian-noise:std=0.001"
ALPHA = 1e-6
NODES = 12
CLIENT: dict[str, Any] = {
    "data": "mnist-5k",
    "model": "quickstart.task:Net",
    "mechanism": "fedavg",
    "local_steps": 1,
    "local_learning_rate": 0.1,
    "attacks": "linear-layer",
    "workers": 0,
}


def psnr(report: gl.LeakageReport, *, defense: str, adaptive: bool = True) -> list[float]:
    (found,) = [f for f in report.findings if as_given(f) == defense and f["adaptive"] == adaptive]
    return [t["scores"]["psnr_db"][0] for t in found["targets"]]


def test_two_lines_are_all_that_an_app_gains(tmp_path: Path) -> None:
    shutil.copytree(EXAMPLE, tmp_path / "stock")
    changed = 0
    for name, lines in {
        "client_app": {"app = ClientApp(mods=[protect(": "app = ClientApp()"},
        "server_app": {"    strategy = record(": ""},
    }.items():
        path = tmp_path / "stock/quickstart" / f"{name}.py"
        text = path.read_text().splitlines()
        for start, stock in lines.items():
            (place,) = [i for i, line in enumerate(text) if line.startswith(start)]
            text[place], changed = stock, changed + 1
        stock_lines = [line for line in text if "gradleak.federate" not in line]
        assert len(text) - len(stock_lines) == 1
        path.write_text("\n".join(stock_lines))
    assert changed == 2
    with imported(tmp_path / "stock") as app:
        assert run_app(app, nodes=2, recording=str(tmp_path / "none")) == []
    assert not (tmp_path / "none").exists()


def test_recorded_and_simulated_audits_agree(tmp_path: Path) -> None:
    """n = 12 clients, one image each, the same network: equal mean PSNR by a Welch test at 1e-6.

    With noise ten times smaller in the simulation the same test finds the difference.
    """
    seed = derive(0, "split")  # the app's clients are the ones that an audit simulates
    with imported(EXAMPLE) as app:
        app["server_app"].initial_net = lambda _: app["task"].Net()
        real = app["server_app"].record
        app["server_app"].record = lambda directory: real(directory, clients=None)
        entries = run_app(app, nodes=NODES, seed=seed, recording=str(tmp_path / "seen"))
        assert len(entries) == NODES
        truth = tell_truth(app["task"], entries, tmp_path / "truth.safetensors", seed=seed)
        seen = gl.audit(
            recorded=tmp_path / "seen",
            truth=truth,
            defenses=DEFENSE,
            out=tmp_path / "recorded",
            **CLIENT,
        )
        weaker = DEFENSE.replace("0.001", "0.0001")
        simulated = gl.audit(
            weights=tmp_path / "seen" / entries[0].broadcast,
            defenses=[DEFENSE, weaker],
            targets=NODES,
            out=tmp_path / "simulated",
            **CLIENT,
        )
    ours, theirs = psnr(seen, defense=DEFENSE), psnr(simulated, defense=DEFENSE)
    assert len(ours) == len(theirs) == NODES
    assert psnr(seen, defense=DEFENSE, adaptive=False) == pytest.approx(ours)
    assert stats.ttest_ind(ours, theirs, equal_var=False).pvalue > ALPHA
    planted = psnr(simulated, defense=weaker)
    assert stats.ttest_ind(ours, planted, equal_var=False).pvalue < ALPHA
    finding, simulated_one = seen.findings[0], simulated.findings[1]
    measured, simulated_psnr = (f["measurements"]["psnr_db"] for f in (finding, simulated_one))
    assert measured["low"] <= simulated_psnr["value"] <= measured["high"]
    assert measured["baseline"] == pytest.approx(simulated_psnr["baseline"], abs=1e-3)
    assert measured["control"] < 15 < np.mean(ours)
    assert finding["verdict"] == "leaks"
    page = seen.page.read_text()
    assert "a server recorded of real clients" in page
    assert "simulated clients" not in page


@pytest.mark.slow
def test_deployment_on_loopback(tmp_path: Path) -> None:
    """SuperLink, two SuperNodes and `flwr run`: what the server recorded is audited."""
    root = tmp_path / "app"
    shutil.copytree(EXAMPLE, root)
    with contextlib.ExitStack() as held:
        probes = [held.enter_context(socket.socket()) for _ in range(3)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        port, *others = (str(probe.getsockname()[1]) for probe in probes)
    address = f"127.0.0.1:{port}"
    home = tmp_path / "flwr"
    home.mkdir()
    (home / "config.toml").write_text(
        '[superlink]\ndefault = "loopback"\n\n'
        f'[superlink.loopback]\naddress = "{address}"\ninsecure = true\n'
    )
    environment = os.environ | {"FLWR_HOME": str(home), "FLWR_TELEMETRY_ENABLED": "0"}
    environment["FLWR_DISABLE_UPDATE_CHECK"] = "1"
    binaries = Path(sys.executable).parent
    environment["PATH"] = f"{binaries}{os.pathsep}{environment['PATH']}"
    here = ["--insecure", "--host", "127.0.0.1"]
    commands = [
        ["flower-superlink", *here, "--port", port, "--disable-runtime-dependency-installation"]
    ] + [
        ["flower-supernode", *here, "--port", other, "--superlink", address,
         "--node-config", f"partition-id={i} num-partitions=2"]
        for i, other in enumerate(others)
    ]  # fmt: skip
    with (tmp_path / "log").open("w") as log:
        started = []
        try:
            for words in commands:
                started.append(
                    subprocess.Popen(words, env=environment, stdout=log, stderr=log, cwd=tmp_path)
                )
                time.sleep(5)
            done = subprocess.run(
                ["flwr", "run", str(root), "loopback", "--stream",
                 "-c", f'recording="{tmp_path / "seen"}" num-server-rounds=1'],
                env=environment, capture_output=True, text=True, timeout=300, cwd=tmp_path,
            )  # fmt: skip
        finally:
            for process in reversed(started):
                process.terminate()
            for process in started:
                process.wait(timeout=30)
    said = done.stdout + done.stderr + (tmp_path / "log").read_text()
    assert (tmp_path / "seen/recording.json").exists(), said[-4000:]
    with imported(root) as app:
        from gradleak.run.recordings import read_recording

        entries = read_recording(tmp_path / "seen")
        assert len(entries) == 2
        truth = tell_truth(app["task"], entries, tmp_path / "truth.safetensors")
        status = command(
            ["audit", "--recorded", str(tmp_path / "seen"), "--data", "mnist-5k",
             "--truth", str(truth), "--model", "quickstart.task:Net", "--mechanism", "fedavg",
             "--local-steps", "1", "--local-learning-rate", "0.1", "--defense", DEFENSE,
             "--attack", "linear-layer", "--workers", "0", "--out", str(tmp_path / "out"),
             "--fail-on", "psnr_db>25", "--quiet"]
        )  # fmt: skip
    assert status == 1
