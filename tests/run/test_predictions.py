"""The auditor's scores: right numbers, honest refusals, and nothing of them in an attack."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gradleak as gl
from gradleak import metrics, priors
from gradleak.auditing import ENGINES
from gradleak.defenses import build, undefended
from gradleak.run import predictions, trial
from gradleak.types import Batch, Mechanism, ModelState
from tests.laws.small import SPEC, TwoTwins, batch_of, state_of, stream

PUBLIC = Batch(torch.rand((60, 1, 4, 4), generator=stream(3)), torch.arange(60) % 3)
PRIOR = priors.fit("gaussian", PUBLIC, SPEC, seed=0)
assert isinstance(PRIOR, priors.Gaussians)


def client(spec: str) -> Mechanism:
    return build(spec)(gl.FedSGD())


def scored(spec: str, *, size: int = 1, state: ModelState | None = None) -> dict[str, Any]:
    mechanism, state, truth = client(spec), state or state_of(TwoTwins), batch_of(size)
    sent = mechanism.sample(state, truth, generator=stream(1))
    return predictions.predictions(
        mechanism, state, sent, truth, prior=PRIOR, spec=SPEC, generator=stream(2)
    )


@pytest.mark.parametrize(
    ("spec", "information"),
    [
        ("clip:norm=0.5+gaussian-noise:std=0.1", 100.0),
        ("laplace-noise:std=0.1", 200.0),
        ("gaussian-noise:std=0.1,scope=example", 200.0),
    ],
)
def test_scores_against_the_information_matrix(spec: str, information: float) -> None:
    size = 2 if "example" in spec else 1
    found, state, truth = scored(spec, size=size), state_of(TwoTwins), batch_of(size)
    layers, centre = client(spec), gl.FedSGD()
    clipped = build("clip:norm=0.5")(centre) if "clip" in spec else centre
    f = metrics.update_map(clipped, state, truth.labels)
    matrix = metrics.information_matrix(f, truth.inputs, per_coordinate=information)
    precision = torch.block_diag(*[PRIOR.precision] * size)
    assert found["posterior_trace"] == pytest.approx(metrics.posterior_trace(matrix, precision))
    assert abs(found["dfil"] - metrics.dfil(matrix)) < 6 * found["dfil_error"]
    sent = layers.sample(state, truth, generator=stream(1)).values
    bare = metrics.update_map(undefended(layers), state, truth.labels)
    added = torch.cat([sent[k].flatten() for k in state.params]) - bare(truth.inputs)
    exact = metrics.influence(bare, truth.inputs, added.detach(), damping=predictions.DAMPING)
    assert 0 < found["influence"] <= exact
    assert (found["dimensions"], found["entries"]) == (0, 16 * size)
    assert found["why_not"] == {}


def test_without_noise_directions_are_counted() -> None:
    found = scored("none")
    assert found["dimensions"] == 16
    assert found["posterior_trace"] is found["dfil"] is found["influence"] is None
    assert set(found["why_not"]) == {"posterior_trace", "dfil", "influence"}


def test_what_does_not_apply_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "no derivative" in scored("sign")["why_not"]["dimensions"]
    assert "no derivative" in scored("sign+gaussian-noise:std=1")["why_not"]["posterior_trace"]
    monkeypatch.setattr(predictions, "MATRIX", 1000)
    found = scored("gaussian-noise:std=0.1")
    assert found["why_not"]["posterior_trace"].startswith(
        "a Jacobian of 16 inputs × 123 parameters"
    )
    assert found["dfil"] > 0, "probes need no matrix"


class Functional(nn.Module):
    """ReLU as a plain call: no module tells of it."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(x.flatten(1)))


def floor(spec: str, network: type[nn.Module] = TwoTwins, size: int = 1) -> dict[str, Any] | None:
    return predictions.floor(
        client(spec), state_of(network), prior=PRIOR, spec=SPEC, batch_size=size,
        generator=stream(4),
    )  # fmt: skip


def test_a_floor_names_the_assumptions_that_do_not_hold() -> None:
    smooth, kinked = floor("gaussian-noise:std=0.1"), floor("gaussian-noise:std=0.1", Functional)
    assert smooth is not None
    assert kinked is not None
    assert 0 < smooth["mse"] < float(PRIOR.precision.inverse().trace()) / 16
    assert smooth["unless"] == ["real data follow the fitted prior only roughly"]
    assert "relu makes the gradient jump" in kinked["unless"]
    batch = floor("top-k:fraction=0.5+gaussian-noise:std=0.1", size=2)
    assert batch is not None
    assert batch["unless"][1:] == [
        "top-k makes the update jump",
        "claims are matched to the truths of their batch afterwards",
    ]
    assert floor("clip:norm=1") is None


ASKED: dict[str, Any] = {
    "data": "digits", "model": "mlp", "attacks": ["posterior:steps=5,restarts=1", "linear-layer"],
    "defenses": "gaussian-noise:std=0.1", "targets": 2, "workers": 0,
}  # fmt: skip


def test_bounds_change_no_claim_and_reach_no_attack(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = []
    grant = gl.ThreatModel.grant

    def watched(*arguments: Any) -> gl.Observation:
        seen = grant(*arguments)
        held.append(seen.knowledge.prior)
        return seen

    plain = gl.audit(**ASKED, out=tmp_path / "plain")
    monkeypatch.setattr(gl.ThreatModel, "grant", watched)
    (tmp_path / "bounds").mkdir()  # which engine is fastest is measured once in a run
    (tmp_path / "bounds" / ENGINES).write_bytes((tmp_path / "plain" / ENGINES).read_bytes())
    with_them = gl.audit(**ASKED, bounds=True, out=tmp_path / "bounds")
    assert held
    assert set(held) == {None}
    for before, after in zip(plain.findings, with_them.findings, strict=True):
        assert before["measurements"] == after["measurements"]
        assert before["foretold"] is None
        noisy = after["defense"] != "none"
        scores = [t["foretold"]["posterior_trace"] is not None for t in after["targets"]]
        assert scores == [noisy, noisy], "by both attacks' findings, though scored once"
    assert with_them.result["command"].count("--bounds") == 1


def test_a_score_that_fails_leaves_the_measurement(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no such derivative")

    monkeypatch.setattr(trial, "predictions", broken)
    small = ASKED | {"attacks": "linear-layer", "targets": 1}
    finding = gl.audit(**small, bounds=True, out=tmp_path).findings[0]
    assert finding["state"] == "measured"
    (_, limit) = finding["limits"]
    assert limit["why"] == ["RuntimeError: no such derivative"]
