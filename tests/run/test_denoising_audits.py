"""Audits of clients that train diffusion models: what fits together, and what is reported."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import gradleak as gl
from gradleak import models, priors
from gradleak.auditing import audit, check_names, core_of
from gradleak.data import load
from gradleak.errors import InvalidInput
from gradleak.mechanisms import Denoising, DenoisingAvg
from gradleak.models.factory import check_outputs
from gradleak.run import settings as settings_module
from gradleak.run import states
from gradleak.run.settings import AuditSettings
from gradleak.run.trial import divide
from gradleak.types import DataSpec, ModelState

DIGITS = DataSpec.image((1, 8, 8), 10)


def settings(**given: object) -> AuditSettings:
    return AuditSettings.of(given)


def test_a_diffusion_client_has_a_network_and_attacks_of_its_own() -> None:
    given = settings(mechanism="denoising:timestep=50")
    assert given.model == "unet"
    assert given.attack
    assert core_of(given) == Denoising(timestep=50)
    check_names(given)
    local = settings(mechanism="denoising-fedavg", local_steps=5, local_learning_rate=0.1)
    assert core_of(local) == DenoisingAvg(steps=5, learning_rate=0.1)
    assert settings().model == "lenet"


def test_default_attacks_are_those_registered_whose_needs_are_granted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(settings_module, "ON_DENOISERS", ("dlg", "idlg", "not-yet-there", "ggl"))
    monkeypatch.setattr(settings_module, "ON_PRIVATE_DENOISERS", ("not-yet-there",))
    of = settings_module.attacks_on_denoisers
    known = ("batch_size", "mechanism", "noise", "timesteps")
    assert of(known) == ("dlg", "idlg")  # ggl needs a prior
    assert of((*known, "prior")) == ("dlg", "idlg", "ggl")
    assert of(("batch_size", "noise")) == ("inverting-gradients",)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"mechanism": "denoising", "model": "lenet"}, "lenet is a classifier.*one of unet"),
        ({"model": "unet"}, "expected --mechanism denoising"),
        ({"mechanism": "denoising", "defense": "soteria"}, "--defense soteria: expected a class"),
        ({"mechanism": "denoising", "knows": "noise", "view": "aggregate"}, "a sum of clients"),
        ({"knows": "timesteps"}, "expected a client that draws"),
        ({"mechanism": "denoising:carried=true"}, "carried"),
        ({"mechanism": "denoising", "local_steps": 2}, "fedavg or denoising-fedavg"),
        ({"mechanism": "denoising:schedule=lineer"}, "did you mean 'linear'"),
    ],
)
def test_what_does_not_fit_is_refused_before_data_are_read(
    given: dict[str, object], words: str
) -> None:
    with pytest.raises(InvalidInput, match=words):
        check_names(settings(**given))


class Own(nn.Module):
    """A user's denoiser."""

    def __init__(self, channels: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, channels, 3, padding=1)

    def forward(self, x: Tensor, times: Tensor) -> Tensor:
        return self.conv(x) * (1 + times.to(x)[:, None, None, None] / 1000)


def test_a_network_called_with_times_must_return_images() -> None:
    check_outputs(Own(), DIGITS, name="mine:own")
    with pytest.raises(InvalidInput, match="as of a denoiser"):
        check_outputs(Own(2), DIGITS, name="mine:own")
    with pytest.raises(InvalidInput, match="expected a classifier; of a denoiser, cvb"):
        models.build("unet+precode", DIGITS, seed=0)
    assert "first.1.latent_noise" in dict(models.build("unet+cvb", DIGITS, seed=0).named_buffers())


def test_an_audit_reports_no_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_denoiser.py").write_text(
        "import torch\nfrom tests.run.test_denoising_audits import Own\n"
        "def build(spec):\n    return Own(spec.shape[0])\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    report = audit(
        data="digits", model="own_denoiser:build", mechanism="denoising:timestep=300",
        knows="timesteps,noise", attacks="inverting-gradients:steps=3", defenses="none",
        stage="2", targets=2, workers=0, out=tmp_path / "out",
    )  # fmt: skip
    (finding,) = report.findings
    assert finding["state"] == "measured"
    assert "psnr_db" in finding["measurements"]
    assert "label_accuracy" not in finding["measurements"]
    assert not finding["warnings"]
    assert "the noise that was added" in report.page.read_text()
    assert gl.__version__


def test_a_prior_of_denoisers_is_a_broadcast_state(tmp_path: Path) -> None:
    data = load("digits")
    division = divide(data, 0)
    network = models.build("unet", data.spec, seed=0)
    client = Denoising(timesteps=10)

    def prepared(path: Path, client: Denoising | None = client) -> ModelState:
        found = states.prepare(
            network, data, division.public, stage=states.GIVEN, weights=path, seed=0,
            client=client, directory=tmp_path, progress=lambda *_: None,
        )  # fmt: skip
        return models.load_weights(tmp_path / found.path, network)

    (tmp_path / "tensors").mkdir()
    family = priors.Diffusion(steps=1, width=16, conditional=False, timesteps=10, batch_size=8)
    fitted = family.fit(data.batch(division.public[:20]), data.spec, seed=0)
    assert isinstance(fitted, priors.Denoiser)
    path = tmp_path / "good.safetensors"
    priors.save(fitted, path)
    state = prepared(path)
    assert all(torch.equal(v, fitted.network[k]) for k, v in state.params.items())
    with pytest.raises(InvalidInput, match="was trained under"):
        prepared(path, Denoising())
    with pytest.raises(InvalidInput, match="is a prior"):
        prepared(path, None)
    stolen = family.fit(data.batch(division.clients[:60]), data.spec, seed=0)
    priors.save(stolen, tmp_path / "stolen.safetensors")
    with pytest.raises(InvalidInput, match="private examples"):
        prepared(tmp_path / "stolen.safetensors")
