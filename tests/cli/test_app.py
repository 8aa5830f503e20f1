"""Commands end to end, in this process."""

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch.nn.functional import cross_entropy

from gradleak import data, models
from gradleak.attacks import ATTACKS
from gradleak.cli import run
from gradleak.crypto import aggregations
from gradleak.priors import TRAINED

AUDIT = [
    "audit", "--data", "digits", "--model", "mlp", "--attack", "linear-layer",
    "--defense", "gaussian-noise:std=0.1", "--targets", "2", "--workers", "0", "--quiet",
]  # fmt: skip


def test_audit_prints_a_table_and_names_the_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*AUDIT, "--out", str(tmp_path)]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert "gaussian-noise:std=0.1" in captured.out
    assert "The server recovers 2 of 2 images from undefended updates" in captured.out
    assert captured.out.rstrip().endswith(f"Report: {tmp_path / 'report.html'}")


def test_fail_on_gives_status_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--fail-on", "psnr_db>60", "--fail-on", "gaussian-noise:psnr_db>60"]
    assert run([*AUDIT, "--out", str(tmp_path), *options]) == 1
    assert capsys.readouterr().err == "fails on: psnr_db>60\n"
    assert run([*AUDIT, "--out", str(tmp_path), *options[2:]]) == 0


def test_failed_trials_give_status_3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gradleak.run import trial

    monkeypatch.setattr(trial, "attack_all", None)
    assert run([*AUDIT, "--out", str(tmp_path)]) == 3


def test_an_interrupt_gives_status_130(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from gradleak.run import trial

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(trial, "attack_all", interrupted)
    assert run([*AUDIT, "--out", str(tmp_path)]) == 130
    assert "the same command resumes" in capsys.readouterr().err
    monkeypatch.undo()
    assert run([*AUDIT, "--out", str(tmp_path)]) == 0


def test_the_command_line_wins_over_the_config(tmp_path: Path) -> None:
    config = tmp_path / "audit.toml"
    config.write_text(
        'data = "digits"\nmodel = "mlp"\nattack = "linear-layer"\ndefense = []\n'
        f'targets = 5\nworkers = 0\nquiet = true\nout = "{tmp_path / "out"}"\n'
    )
    assert run(["audit", "--config", str(config), "--targets", "1"]) == 0
    settings = json.loads((tmp_path / "out" / "result.json").read_text())["settings"]
    assert settings["given"]["targets"] == 1
    assert settings["given"]["model"] == "mlp"


def test_report_renders_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*AUDIT, "--out", str(tmp_path)]) == 0
    page = (tmp_path / "report.html").read_bytes()
    (tmp_path / "report.html").unlink()
    capsys.readouterr()
    assert run(["report", str(tmp_path)]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "report.html")
    assert (tmp_path / "report.html").read_bytes() == page


def test_one_simulated_attack(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--data", "digits", "--model", "mlp", "--workers", "0", "--out", str(tmp_path)]
    assert run(["attack", "linear-layer", *options]) == 0
    out = capsys.readouterr().out
    assert "1/1" in out
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["command"].startswith("gradleak attack linear-layer --data digits")
    assert [f["defense"] for f in result["findings"]] == ["none"]


def test_a_recorded_update(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    digits = data.load("digits")
    network = models.build("mlp", digits.spec, seed=1)
    batch = digits.batch([7])
    gradient = torch.autograd.grad(
        cross_entropy(network(batch.inputs), batch.labels), list(network.parameters())
    )
    names = [name for name, _ in network.named_parameters()]
    safetensors.torch.save_file(dict(zip(names, gradient)), tmp_path / "u.safetensors")
    safetensors.torch.save_file(network.state_dict(), tmp_path / "s.safetensors")
    (tmp_path / "spec.toml").write_text("shape = [1, 8, 8]\nclasses = 10\n")
    files = ["u.safetensors", "s.safetensors", "spec.toml"]
    update, state, spec = (str(tmp_path / name) for name in files)
    recorded = ["--update", update, "--state", state, "--data-spec", spec, "--model", "mlp"]
    assert run(["attack", "linear-layer", *recorded, "--out", str(tmp_path / "out")]) == 0
    assert ["labels", str(int(batch.labels))] in map(
        str.split, capsys.readouterr().out.splitlines()
    )
    claim = safetensors.torch.load_file(tmp_path / "out" / "reconstruction.safetensors")
    assert torch.allclose(claim["inputs"], batch.inputs, atol=1e-4)
    assert json.loads((tmp_path / "out" / "attack.json").read_text())["status"] == "solved"
    assert (tmp_path / "out" / "reconstruction.png").stat().st_size > 0


@pytest.mark.parametrize(
    "kind",
    ["attacks", "defenses", "priors", "models", "mechanisms", "facts", "data", "aggregations"],
)
def test_lists(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["list", kind]) == 0
    table = capsys.readouterr().out
    assert run(["list", kind, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert rows
    for row in rows:
        assert row["id"] in table
    if kind == "priors":
        assert {"id", "title", "proper", "fields"} <= rows[0].keys()
        improper = [row["id"] for row in rows if not row["proper"]]
        assert improper == ["tv", "autoencoder", "gan", "diffusion", *TRAINED]
    if kind == "attacks":
        needed = {"id", "title", "paper", "link", "modalities", "needs", "server", "deviations"}
        assert all(needed <= row.keys() for row in rows)


def test_one_attack_is_shown_whole(capsys: pytest.CaptureFixture[str]) -> None:
    about = ATTACKS["spear"].about
    assert run(["list", "attacks", "spear"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for words in (about.paper, about.link, "batch_size", "draws=1000000", *about.deviations):
        assert " ".join(words.split()[:4]) in shown
    assert run(["list", "attacks", "spear", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["id"] == "spear"


def test_one_aggregation_is_shown_whole(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("cryptography")
    assert run(["list", "aggregations", "lightsecagg"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    sheet = aggregations()["lightsecagg"].sheet
    for words in (sheet.title, sheet.trusts, sheet.survives, sheet.leaks, sheet.cost):
        assert " ".join(words.split()[:4]) in shown
    assert "privacy=0.5, dropouts=0.3" in shown


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"]) == 0
    assert capsys.readouterr().out.startswith("gradleak 0.")
    assert run([]) == 0
    shown = capsys.readouterr().out
    assert "audit" in shown
    for unbuilt in ("ray", "aggregate"):
        assert unbuilt not in shown
    assert run(["audit", "--help"]) == 0
    assert "--fail-on" in capsys.readouterr().out


def test_a_data_sheet_says_what_epsilon_is_spent(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["list", "defenses", "dp-sgd:noise_multiplier=2,rounds=4"]) == 0
    shown = capsys.readouterr().out
    assert "ε = 1.99 at δ = 1e-05" in shown
    assert "ε = 4.38 (exact)" in shown, "four steps at 2 are one at 1"
    assert run(["list", "defenses", "dp-sgd:noise=2"]) == 2
    assert "has no field 'noise'" in capsys.readouterr().err
