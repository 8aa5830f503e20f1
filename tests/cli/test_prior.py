"""`gradleak prior`: a trained network, its card, its samples, and whom an audit lets use it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from gradleak import data, priors
from gradleak.cli.app import DONE, INVALID, NETWORKS, run
from gradleak.errors import InvalidInput
from gradleak.run.beliefs import fitted
from gradleak.run.prior_training import TRAINABLE
from gradleak.run.trial import divide
from tests.laws.small import SMALL_PRIORS


def train(out: Path, *more: str, name: str = "gan") -> int:
    command = ["prior", "train", SMALL_PRIORS[name], "--data", "digits", "--quiet"]
    command += ["--samples", "0"] * ("--samples" not in more)
    return run([*command, "--out", str(out), *more])


@pytest.mark.parametrize("name", SMALL_PRIORS)
def test_weights_card_and_samples(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "prior.safetensors"
    assert train(out, name=name) == DONE
    told = capsys.readouterr().out.split()
    assert told == [str(out.with_suffix(s)) for s in (".safetensors", ".md", ".png")]
    prior = priors.load(out)
    card = out.with_suffix(".md").read_text()
    assert "898 examples of digits" in card
    assert priors.digest(prior) in card
    with Image.open(out.with_suffix(".png")) as sheet:
        assert sheet.size == (12 * 8 * 2, 6 * 8 * 2)
    assert not out.with_suffix(".training").exists()
    assert train(out, name=name) == INVALID
    assert "exists: expected a new file" in capsys.readouterr().err


def test_a_score_is_put_on_the_card_then_or_later(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights of another half are told from those of this one."""
    monkeypatch.setattr("gradleak.run.sample_quality._STEPS", 20)
    out = tmp_path / "prior.safetensors"
    assert train(out, "--samples", "40", name="gan") == DONE
    card = out.with_suffix(".md")
    with_score = card.read_text()
    assert "of 40 samples from 859\n  pictures that it was not trained on" in with_score
    card.unlink()
    score = ["prior", "score", str(out), "--data", "digits", "--samples", "40"]
    assert run(score) == DONE
    assert card.read_text() == with_score
    capsys.readouterr()
    for words, *more in (
        ("was not trained on the public half of digits with --seed 1", "--seed", "1"),
        ("too few pictures for a score from 890 samples", "--samples", "890"),
        ("with 0 samples: expected a generator", "--samples", "0"),
    ):
        assert run([*score, *more]) == INVALID
        assert words in capsys.readouterr().err


def test_the_help_names_what_is_trained() -> None:
    assert set(NETWORKS) == set(TRAINABLE)


def test_the_list_names_families_and_trained_priors(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["prior", "list", "--json"]) == DONE
    assert {row["id"] for row in json.loads(capsys.readouterr().out)} == {
        *priors.PRIORS,
        *priors.TRAINED,
    }


def test_a_prior_that_has_seen_private_examples_is_refused(tmp_path: Path) -> None:
    """Public of one seed is half private for another; fingerprints tell, not names."""
    digits = data.load("digits")
    out = tmp_path / "prior.safetensors"
    (tmp_path / "tensors").mkdir()
    assert train(out) == DONE
    belief = fitted(str(out), digits, divide(digits, 0).public, seed=0, directory=tmp_path)
    assert belief.digest == priors.digest(priors.load(tmp_path / belief.path))
    other = divide(digits, 1).public
    private = torch.ones(len(digits), dtype=torch.bool)
    private[other] = False
    prior = priors.load(out)
    assert isinstance(prior, priors.Network)
    count = int(prior.seen(digits.batch(private.nonzero()[:, 0]).inputs).sum())
    assert 300 < count < 600
    with pytest.raises(InvalidInput, match=f"trained on {count} of the 899 private examples"):
        fitted(str(out), digits, other, seed=1, directory=tmp_path)
    silent = tmp_path / "gaussian.safetensors"
    priors.save(priors.fit("gaussian", digits.batch(other), digits.spec, seed=0), silent)
    with pytest.raises(InvalidInput, match="does not tell its examples"):
        fitted(str(silent), digits, other, seed=1, directory=tmp_path)


def test_an_audit_grants_a_trained_prior(tmp_path: Path) -> None:
    out, report = tmp_path / "prior.safetensors", tmp_path / "report"
    assert train(out) == DONE
    status = run(
        ["attack", "gias:steps=4,restarts=1", "--data", "digits", "--model", "lenet-tiny",
         "--knows", "prior,labels", "--prior", str(out), "--workers", "0", "--quiet",
         "--out", str(report)]
    )  # fmt: skip
    assert status == DONE
    (finding,) = json.loads((report / "result.json").read_text())["findings"]
    assert finding["state"] == "measured"
    assert "prior" in finding["threat"]["knows"]
