"""Recordings: bounded, whole, and refused in one line where they are bad."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

import gradleak as gl
from gradleak.cli.app import run as command
from gradleak.run.recordings import Entry, keep, read_exchange, read_recording, write_truth
from gradleak.types import Batch

MODEL = "tests.run.test_recordings:Net"


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(64, 12)
        self.norm = nn.BatchNorm1d(12)
        self.head = nn.Linear(12, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.hidden(x.flatten(1)).sigmoid()))


def trained(net: Net, batch: Batch, *, rate: float = 0.1) -> dict[str, torch.Tensor]:
    """What a stock client replies after one step in evaluation mode."""
    copy = Net()
    copy.load_state_dict(net.state_dict())
    copy.eval()
    loss = nn.functional.cross_entropy(copy(batch.inputs), batch.labels)
    loss.backward()
    with torch.no_grad():
        for parameter in copy.parameters():
            parameter -= rate * parameter.grad
    return dict(copy.state_dict())


def recording(directory: Path, *, clients: int = 3, rounds: int = 1) -> list[Batch]:
    """Record clients of one digit each, and tell the truth."""
    digits = gl.data.load("digits")
    torch.manual_seed(0)
    net = Net()
    batches, truth = [], {}
    for number in range(1, rounds + 1):
        for i in range(clients):
            batch = digits.batch([number * clients + i])
            entry = Entry(run="1", round=number, node=str(i), kind="delta", num_examples=1)
            reply = (entry, net.state_dict(), trained(net, batch))
            keep(directory, [reply], rounds=None, clients=None)
            batches.append(batch)
            truth[number, str(i)] = batch
    write_truth(directory / "truth.safetensors", truth)
    (directory / "spec.toml").write_text("shape = [1, 8, 8]\nclasses = 10\n")
    return batches


def options(directory: Path, out: Path, *more: str) -> list[str]:
    return [
        "audit", "--recorded", str(directory), "--model", MODEL, "--mechanism", "fedavg",
        "--local-steps", "1", "--local-learning-rate", "0.1", "--attack", "linear-layer",
        "--out", str(out), "--workers", "0", "--quiet", *more,
    ]  # fmt: skip


def test_what_is_kept_comes_back(tmp_path: Path) -> None:
    (batch,) = recording(tmp_path, clients=1)
    (entry,) = read_recording(tmp_path)
    net = Net()
    state, update, buffers = read_exchange(tmp_path, entry, net)
    want = gl.FedAvg(learning_rate=0.1).mean(state, batch).values
    assert update.keys() == want.keys()
    for name, value in update.items():
        torch.testing.assert_close(value, want[name], atol=1e-6, rtol=1e-4)
    assert "norm.running_mean" in buffers


def test_bounds_hold_and_runs_are_told_apart(tmp_path: Path) -> None:
    tensors = {"w": torch.zeros(2)}
    for run in ("1", "2"):
        for number in range(1, 5):
            entries = [
                (Entry(run=run, round=number, node=str(n), kind="delta"), tensors, tensors)
                for n in range(4)
            ]
            keep(tmp_path, entries, rounds=2, clients=3)
    kept = [(e.run, e.round, e.node) for e in read_recording(tmp_path)]
    assert kept == [(r, n, c) for r in "12" for n in (1, 2) for c in "012"]
    assert len(list(tmp_path.glob("broadcast-*"))) == 1


def test_scored_with_truth_and_shown_without(tmp_path: Path) -> None:
    recording(tmp_path / "seen", clients=3, rounds=2)
    truth = str(tmp_path / "seen/truth.safetensors")
    scored = tmp_path / "scored"
    spec = str(tmp_path / "seen/spec.toml")
    both = ("--data", "digits", "--truth", truth, "--data-spec", spec)
    assert command(options(tmp_path / "seen", scored, *both)) == 0
    result = json.loads((scored / "result.json").read_text())
    assert [f["scenario"]["stage"] for f in result["findings"]] == ["round-1", "round-2"]
    for finding in result["findings"]:
        psnr = finding["measurements"]["psnr_db"]
        assert psnr["n"] == 3
        assert psnr["low"] > 60 > 20 > max(psnr["baseline"], psnr["control"])
    before = (scored / "result.json").stat().st_mtime
    assert command(options(tmp_path / "seen", scored, *both)) == 0  # resumes: nothing runs again
    assert len((scored / "trials.jsonl").read_text().splitlines()) == 2
    assert (scored / "result.json").stat().st_mtime >= before

    shown = tmp_path / "shown"
    assert command(options(tmp_path / "seen", shown, "--data-spec", spec)) == 0
    result = json.loads((shown / "result.json").read_text())
    assert {f["state"] for f in result["findings"]} == {"unscored"}
    assert [len(f["targets"]) for f in result["findings"]] == [3, 3]
    page = (shown / "report.html").read_text()
    assert page.count("Claim by linear-layer on client") == 6
    assert "no truth was given" in page
    claims = safetensors.torch.load_file(shown / result["findings"][0]["tensors"][0])["claim"]
    truths = torch.cat([gl.data.load("digits").batch([i]).inputs for i in (3, 4, 5)])
    assert float((claims[:, 0] - truths).square().mean()) < 1e-6
    assert not list(shown.glob("tensors/*.pool.safetensors"))


def test_updates_that_an_attack_is_given_hold_no_truth(tmp_path: Path) -> None:
    """The attacker's file is equal, whatever the truth says."""
    recording(tmp_path / "seen", clients=2)
    lie = {(1, str(n)): Batch(torch.zeros(1, 1, 8, 8), torch.tensor([n])) for n in range(2)}
    write_truth(tmp_path / "lie.safetensors", lie)
    claims = []
    for name in ("seen/truth", "lie"):
        out = tmp_path / f"out-{Path(name).name}"
        truth = str(tmp_path / f"{name}.safetensors")
        more = ("--data", "digits", "--truth", truth)
        assert command(options(tmp_path / "seen", out, *more)) == 0
        (updates,) = out.glob("tensors/updates-*")
        (trials,) = (out / "trials.jsonl").read_text().splitlines()
        record = json.loads(trials)
        stored = safetensors.torch.load_file(out / record["tensors"])
        claims.append((updates.name, stored["claim"]))
    assert claims[0][0] == claims[1][0]
    assert torch.equal(claims[0][1], claims[1][1])


def _truncate(directory: Path) -> None:
    path = next(directory.glob("reply-*"))
    path.write_bytes(path.read_bytes()[:-40])


def _remove(directory: Path) -> None:
    next(directory.glob("reply-*")).unlink()


def _pickle(directory: Path) -> None:
    next(directory.glob("reply-*")).write_bytes(pickle.dumps({"hidden.weight": 1}))


def _reshape(directory: Path) -> None:
    path = next(directory.glob("reply-*"))
    tensors = safetensors.torch.load_file(path)
    tensors["head.bias"] = torch.zeros(3)
    safetensors.torch.save_file(tensors, path)


def _poison(directory: Path) -> None:
    path = next(directory.glob("reply-*"))
    tensors = safetensors.torch.load_file(path)
    tensors["head.bias"] = torch.full((10,), float("nan"))
    safetensors.torch.save_file(tensors, path)


def _still(directory: Path) -> None:
    broadcast = next(directory.glob("broadcast-*"))
    next(directory.glob("reply-*")).write_bytes(broadcast.read_bytes())


def _manifest(change: Callable[[dict[str, object]], object]) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        path = directory / "recording.json"
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    return damage


def _garbage(directory: Path) -> None:
    (directory / "recording.json").write_text("{")


def _gone(directory: Path) -> None:
    (directory / "recording.json").unlink()


BAD: dict[str, tuple[Callable[[Path], None], str]] = {
    "truncated": (_truncate, "truncated"),
    "missing": (_remove, "no weights file"),
    "pickle": (_pickle, "pickle"),
    "shapes": (_reshape, "'head.bias' is (3,)"),
    "nan": (_poison, "non-finite"),
    "zero": (_still, "the update is zero"),
    "version": (_manifest(lambda m: m.update(schema_version=2)), "schema_version 2"),
    "entries": (_manifest(lambda m: m.update(entries=[])), "no reply"),
    "fields": (_manifest(lambda m: m["entries"][0].pop("node")), "entry 1: node is None"),  # type: ignore[index]
    "outside": (
        _manifest(lambda m: m["entries"][0].update(reply="../x.safetensors")),  # type: ignore[index]
        "lies outside the recording",
    ),
    "garbage": (_garbage, "is not a JSON file"),
    "gone": (_gone, "no recording in"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_recording_is_told_in_one_line(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage, words = BAD[name]
    recording(tmp_path / "seen", clients=1)
    damage(tmp_path / "seen")
    spec = str(tmp_path / "seen/spec.toml")
    assert command(options(tmp_path / "seen", tmp_path / "out", "--data-spec", spec)) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert words in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ((), "also needs --data-spec"),
        (("--truth", "x"), "--truth also needs --data"),
        (("--data", "digits", "--truth", "x"), "cannot read 'x'"),
        (("--data", "digits", "--clients", "3"), "--clients contradicts --recorded"),
        (("--data", "digits", "--knows", "labels"), "expected --truth"),
        (("--data", "digits", "--knows", "prior"), "contradicts --recorded"),
        (("--data", "digits", "--batch-size", "1", "--batch-size", "2"), "--batch-size"),
        (("--data", "mnist-5k"), "fails on a batch"),
    ],
)
def test_a_request_that_makes_no_sense(
    more: tuple[str, ...], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recording(tmp_path / "seen", clients=1)
    assert command(options(tmp_path / "seen", tmp_path / "out", *more)) == 2
    said = capsys.readouterr().err
    assert words in said
    assert said.count("\n") == 1


def test_kinds_must_agree(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recording(tmp_path / "seen", clients=1)
    words = ["audit", "--recorded", str(tmp_path / "seen"), "--model", MODEL, "--data", "digits"]
    assert command([*words, "--out", str(tmp_path / "out"), "--quiet"]) == 2
    assert "holds a delta of each client, expected fedavg" in capsys.readouterr().err
    assert command(["audit", "--truth", "x", "--quiet"]) == 2
    assert "--truth: expected --recorded" in capsys.readouterr().err
