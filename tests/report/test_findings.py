from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.datasets import load_digits

from gradleak import jsonsafe
from gradleak.metrics import baselines, clopper_pearson, score
from gradleak.report.findings import findings, headline, verdict_by_defense
from gradleak.report.schema import validate_result
from gradleak.types import Batch, DataSpec

Record = dict[str, Any]


def scores(psnr_db: float | list[float], identified: int | list[int] = 0) -> Record:
    psnr = psnr_db if isinstance(psnr_db, list) else [psnr_db]
    hits = identified if isinstance(identified, list) else [identified]
    return {
        "psnr_db": psnr,
        "ssim": [0.1] * len(psnr),
        "mse": [10 ** (-x / 10) for x in psnr],
        "identified": hits,
        "label_accuracy": [1.0],
    }


def target(
    client: int,
    psnr_db: float | list[float] = 54.0,
    *,
    status: str = "exhausted",
    objective: Any = 1.0,
    at_truth: Any = 0.0,
    identified: int | list[int] | None = None,
    control: float = 9.0,
    guess: float = 12.0,
) -> Record:
    psnr = psnr_db if isinstance(psnr_db, list) else [psnr_db]
    hits = [int(x >= 20) for x in psnr] if identified is None else identified
    flat = len(psnr)
    return {
        "client": client,
        "status": status,
        "message": "",
        "objective": objective,
        "objective_at_truth": at_truth,
        "scores": scores(psnr, hits),
        "control": scores([control] * flat, [0] * flat),
        "baselines": {
            "mean_image": scores([guess] * flat, [0] * flat),
            "nearest_public": scores([15.0] * flat, [0] * flat),
        },
    }


def record(targets: list[Record], *, defense: str = "none", **changes: Any) -> Record:
    group = changes.get("group", 0)
    return {
        "schema_version": 1,
        "key": f"{defense}-{group}",
        "finding": f"digits/lenet/init/fedsgd-b1/{defense}/dlg",
        "state": "measured",
        "reason": None,
        "scenario": {
            "data": "digits",
            "model": "lenet",
            "stage": "init",
            "mechanism": "fedsgd",
            "batch_size": 1,
        },
        "threat": {"server": "honest", "view": "client", "knows": ["batch_size", "mechanism"]},
        "attack": "dlg",
        "attack_spec": "dlg",
        "defense": defense,
        "defense_spec": defense,
        "adaptive": True,
        "seed": 0,
        "group": group,
        "seconds": 2.0,
        "gradient_evaluations": 100,
        "engine": "vmap",
        "warnings": [],
        "bank_size": 100,
        "tensors": f"tensors/{defense}-{group}.safetensors",
        "targets": targets,
        **changes,
    }


def leaking() -> Record:
    return record([target(i) for i in range(8)])


def protected_targets() -> list[Record]:
    """Eight misses whose claims fit the update better than the truth does."""
    return [target(i, 11.0, objective=0.5, at_truth=1.0) for i in range(8)]


def verdict(targets: list[Record], **changes: Any) -> tuple[str, str]:
    changes = {"defense": "gaussian-noise"} | changes
    found = findings([leaking(), record(targets, **changes)])[-1]
    return found["verdict"], found["reason"]


def test_a_plain_leak() -> None:
    (found,) = findings([leaking()])
    assert found["verdict"] == "leaks"
    assert found["trials"] == {
        "run": 8,
        "solved": 8,
        "diverged": 0,
        "failed": 0,
        "no_solution": 0,
        "recovered_images": 8,
        "images": 8,
    }
    psnr = found["measurements"]["psnr_db"]
    assert (psnr["value"], psnr["baseline"], psnr["control"]) == (54.0, 12.0, 9.0)
    assert (psnr["n"], psnr["unit"], psnr["nearest_public"]) == (8, "dB", 15.0)
    hits = found["measurements"]["identified"]
    exact = clopper_pearson(8, 8)
    assert (hits["value"], hits["low"], hits["high"]) == (1.0, exact.low, exact.high)
    assert (hits["bank_size"], hits["chance"]) == (100, 0.01)
    assert hits["excess"]["value"] == 1.0
    assert found["measurements"]["recovered"]["value"] == 1.0
    assert found["cost"] == {"seconds": 2.0, "gradient_evaluations": 100}


def test_one_recovered_image_is_a_leak() -> None:
    """The mean PSNR says nothing here; the worst case does."""
    targets = [*protected_targets()[:7], target(7)]
    assert verdict(targets)[0] == "leaks"


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("below 20 dB", {"psnr_db": 19.9, "identified": 1}),
        ("not identified", {"psnr_db": 54.0, "identified": 0}),
        ("a guess is as good", {"psnr_db": 24.0, "guess": 22.0}),
        ("the control is as good", {"psnr_db": 24.0, "control": 22.0}),
    ],
)
def test_what_is_not_recovered(name: str, changes: dict[str, Any]) -> None:
    (found,) = findings([record([target(0, **changes)])])
    assert found["trials"]["solved"] == found["trials"]["recovered_images"] == 0, name
    assert found["verdict"] == "inconclusive"


@pytest.mark.parametrize("status", ["failed", "diverged", "no_solution"])
def test_failures_stay_in_the_denominator_as_guesses(status: str) -> None:
    lost = target(3, 80.0, status=status)
    (found,) = findings([record([target(0), target(1), target(2), lost])])
    assert found["trials"]["run"] == 4
    assert found["trials"]["solved"] == 3
    assert found["trials"][status] == 1
    assert found["measurements"]["identified"]["value"] == 0.75
    assert found["measurements"]["psnr_db"]["value"] == pytest.approx((3 * 54 + 12) / 4)
    assert sum(found["missed"].values()) == 0


def test_the_guess_is_the_class_mean_where_labels_are_known() -> None:
    lost = target(0, 80.0, status="failed")
    lost["baselines"]["class_mean"] = scores(14.0)
    (found,) = findings([record([lost])])
    assert found["measurements"]["psnr_db"]["value"] == 14.0
    assert found["measurements"]["psnr_db"]["baseline"] == 14.0


def test_a_group_that_ended_in_an_error_counts() -> None:
    broken = record([], state="error", reason="out of memory", group=1, tensors=None)
    (found,) = findings([leaking(), broken])
    assert found["state"] == "measured"
    assert found["trials"]["run"] == 9
    assert found["trials"]["failed"] == 1
    assert found["measurements"]["identified"]["value"] == pytest.approx(8 / 9)
    assert found["measurements"]["psnr_db"]["value"] == pytest.approx((8 * 54 + 12) / 9)
    assert "out of memory" in found["reason"]
    stubs = [{"client": i, "status": "failed"} for i in (8, 9)]
    (found,) = findings([leaking(), broken | {"targets": stubs}])
    assert (found["trials"]["run"], found["trials"]["failed"]) == (10, 2)
    assert [t["tensors"] is None for t in found["targets"]] == [False] * 8 + [True] * 2


@pytest.mark.parametrize(
    ("objective", "at_truth", "cause"),
    [
        (1.0, 0.0, "optimiser_limited"),
        (1e-8, 0.0, "optimiser_limited"),
        (1e-10, 0.0, "information_limited"),
        (1.0005, 1.0, "information_limited"),
        (1.002, 1.0, "optimiser_limited"),
        (-5.0, -4.0, "information_limited"),
        (-4.0, -5.0, "optimiser_limited"),
        (math.nan, 0.0, "unattributed"),
        (None, 0.0, "unattributed"),
        ({"nonfinite": "inf"}, 0.0, "unattributed"),
        (0.0, math.nan, "unattributed"),
    ],
)
def test_attribution(objective: Any, at_truth: Any, cause: str) -> None:
    miss = target(0, 11.0, objective=objective, at_truth=at_truth)
    (found,) = findings([record([miss, target(1)])])
    assert [name for name, count in found["missed"].items() if count] == [cause]
    assert found["missed"][cause] == 1
    assert found["targets"][0]["missed"] == cause


def test_protected_when_everything_holds() -> None:
    word, reason = verdict(protected_targets())
    assert word == "protected"
    assert "at most 37%" in reason


SPOILERS: dict[str, tuple[Callable[[list[Record]], None], dict[str, Any], str]] = {
    "an optimiser-limited miss": (
        lambda t: t[0].update(objective=2.0),
        {},
        "optimiser did not reach",
    ),
    "an unattributed miss": (lambda t: t[0].update(objective=math.nan), {}, "cannot be attributed"),
    "a failure": (lambda t: t[0].update(status="failed"), {}, "1 failed"),
    "a divergence": (lambda t: t[0].update(status="diverged"), {}, "1 diverged"),
    "no solution": (lambda t: t[0].update(status="no_solution"), {}, "without a solution"),
    "seven clients": (lambda t: t.pop(), {}, "7 clients"),
    "one client eight times": (
        lambda t: [x.update(client=0) for x in t] and None,
        {},
        "1 clients",
    ),
    "an unaware attack": (lambda t: None, {"adaptive": False}, "did not know the protection"),
    "no protection": (lambda t: None, {"defense": "none", "group": 1}, ""),
    "a warning": (lambda t: None, {"warnings": ["objective at the truth is 3"]}, "sanity"),
    "no control": (lambda t: t[0].update(control=None), {}, "sanity"),
    "another scenario": (
        lambda t: None,
        {"scenario": {"data": "digits", "model": "mlp", "batch_size": 1}},
        "does not leak the undefended",
    ),
    "another threat": (
        lambda t: None,
        {"threat": {"server": "honest", "view": "client", "knows": ["labels"]}},
        "does not leak the undefended",
    ),
    "another attack": (lambda t: None, {"attack": "idlg"}, "does not leak the undefended"),
    "two of eight identified": (
        lambda t: [x["scores"].update(identified=[1]) for x in t[:2]] and None,
        {},
        "may be identified",
    ),
}


@pytest.mark.parametrize("name", SPOILERS)
def test_never_protected(name: str) -> None:
    """Planted faults: each alone turns the protected finding above into another word."""
    spoil, changes, expected = SPOILERS[name]
    targets = protected_targets()
    spoil(targets)
    word, reason = verdict(targets, **changes)
    assert word == ("leaks" if name == "no protection" else "inconclusive")
    assert expected in reason


def test_a_broken_attack_never_protects() -> None:
    """300 random findings: "protected" implies that every miss is information-limited."""
    rng = np.random.default_rng(0)
    words = set()
    for _ in range(300):
        statuses = rng.choice(
            ["exhausted", "solved", "failed", "diverged", "no_solution"],
            size=int(rng.integers(1, 14)),
            p=[0.88, 0.06, 0.02, 0.02, 0.02],
        )
        targets = [
            target(
                i,
                float(rng.choice([11.0, 54.0], p=[0.98, 0.02])),
                status=str(status),
                objective=float(rng.choice([0.5, 2.0, math.nan], p=[0.96, 0.02, 0.02])),
                at_truth=1.0,
            )
            for i, status in enumerate(statuses)
        ]
        found = findings([leaking(), record(targets, defense="clip")])[-1]
        words.add(found["verdict"])
        if found["verdict"] == "protected":
            assert found["missed"]["information_limited"] == found["trials"]["run"] >= 8
    assert words == {"leaks", "protected", "inconclusive"}, "the sample must reach every word"


def test_identification_alone_can_leak() -> None:
    """Eight of eight picked out of 100 at a PSNR below the guess."""
    assert verdict([target(i, 11.0, identified=1) for i in range(8)])[0] == "leaks"
    lucky = [target(i, 11.0, identified=1) for i in range(8)]
    for t in lucky:
        t["control"]["identified"] = [1]
    assert verdict(lucky)[0] == "inconclusive", "the control is as good"


def test_leaks_under_the_null() -> None:
    """Claims independent of the truth, 16 clients, 400 findings: "leaks" in at most 5 %.

    The statement is tested at alpha = 1e-6. Identification is by chance, and PSNR is that of
    a control: attack and control are exchangeable.
    """
    rng = np.random.default_rng(1)
    leaks = 0
    for _ in range(400):
        targets = []
        for i in range(16):
            one = target(i, float(rng.normal(13, 3)), identified=int(rng.random() < 0.01))
            one["control"] = scores(float(rng.normal(13, 3)), int(rng.random() < 0.01))
            targets.append(one)
        leaks += findings([record(targets)])[0]["verdict"] == "leaks"
    assert leaks <= stats.binom.isf(1e-6, 400, 0.05)


def audit_of_digits(
    claim_of: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], seed: int
) -> str:
    """Verdict on 8 digits when the attacker claims `claim_of(truth, an unrelated digit)`."""
    digits = load_digits()
    order = torch.randperm(1797, generator=torch.Generator().manual_seed(seed))
    images = torch.as_tensor(digits.images / 16.0)[order, None]
    labels = torch.as_tensor(digits.target)[order]
    spec = DataSpec.image((1, 8, 8), 10)
    bank, public = images[:100], Batch(images[100:500], labels[100:500])
    targets = []
    for i in range(8):
        truth = Batch(images[[i]], labels[[i]])
        claims = {
            "scores": claim_of(truth.inputs, images[[500 + i]]),
            "control": images[[600 + i]],
        }
        guesses = baselines(public, truth, labels_known=True, spec=spec)
        one = target(i) | {
            role: score(Batch(inputs, truth.labels), truth, bank=bank, spec=spec)
            for role, inputs in claims.items()
        }
        one["baselines"] = {
            name: score(guess, truth, bank=bank, spec=spec) for name, guess in guesses.items()
        }
        targets.append(one)
    return str(findings([record(targets)])[0]["verdict"])


def test_real_images_under_the_null_and_under_a_leak() -> None:
    """Another digit as the claim leaks in none of 15 findings; nine tenths of the truth do."""
    null = [audit_of_digits(lambda truth, other: other, seed) for seed in range(15)]
    assert set(null) == {"inconclusive"}
    assert audit_of_digits(lambda truth, other: 0.9 * truth + 0.1 * other, 0) == "leaks"


def test_batches() -> None:
    """A target is solved from half of its images on; every recovered image counts."""
    half = target(0, [54.0, 54.0, 11.0, 11.0])
    quarter = target(1, [54.0, 11.0, 11.0, 11.0])
    (found,) = findings([record([half, quarter])])
    assert [t["solved"] for t in found["targets"]] == [True, False]
    assert (found["trials"]["recovered_images"], found["trials"]["images"]) == (3, 8)
    hits = found["measurements"]["identified"]
    exact = clopper_pearson(0.75, 2)
    assert (hits["n"], hits["images"], hits["clients"]) == (2, 8, 2)
    assert (hits["value"], hits["low"], hits["high"]) == (3 / 8, exact.low, exact.high)
    assert hits["chance"] == 0.04
    failed = target(2, [54.0] * 4, status="failed")
    (found,) = findings([record([half, failed])])
    assert found["measurements"]["psnr_db"]["images"] == 8


def test_quantiles_look_at_the_leaky_side() -> None:
    (found,) = findings([record([target(i, float(i)) for i in range(101)])])
    psnr, mse = (found["measurements"][m]["quantiles"] for m in ("psnr_db", "mse"))
    assert (psnr["mean"], psnr["median"], psnr["worst_5_percent"]) == (50.0, 50.0, 95.0)
    assert psnr["worst_case"] == 100.0
    assert mse["worst_case"] == pytest.approx(1e-10)
    assert psnr["median_low"] < 50 < psnr["median_high"]


def test_neither_order_nor_repetition_of_records_matters() -> None:
    parts = [record([target(4 * g + i, 30.0 + i) for i in range(4)], group=g) for g in range(3)]
    whole = findings(parts)
    assert findings(parts[::-1]) == whole
    assert findings([*parts, copy.deepcopy(parts[1])]) == whole
    before = copy.deepcopy(parts)
    findings(parts)
    assert parts == before, "pure"


def test_states_without_a_measurement() -> None:
    absent = record([], state="not_applicable", reason="needs labels", defense="clip")
    broken = record([], state="error", reason="out of memory", defense="top-k")
    for found, state in zip(findings([absent, broken]), ("not_applicable", "error"), strict=True):
        assert found["state"] == state
        assert found["verdict"] == "inconclusive"
        assert found["reason"] in ("needs labels", "out of memory")
        assert found["measurements"] == {}
    assert findings([broken])[0]["trials"]["failed"] == 1
    assert findings([]) == []


def test_non_finite_numbers_survive_the_file() -> None:
    odd = target(0, math.inf, objective=math.nan)
    odd["scores"]["ssim"] = [math.nan]
    raw = record([odd, target(1)])
    found = findings([raw])
    assert found[0]["measurements"]["psnr_db"]["quantiles"]["worst_case"] == 200.0
    assert math.isfinite(found[0]["measurements"]["ssim"]["value"])
    tagged = findings([jsonsafe.encode(raw)])
    assert jsonsafe.dumps(tagged) == jsonsafe.dumps(found)


def test_the_schema_accepts_every_finding() -> None:
    records = [
        leaking(),
        record(protected_targets(), defense="gaussian-noise"),
        record([target(0, 11.0, status="failed", objective=math.nan)], defense="clip"),
        record([], state="error", reason="why", defense="top-k", tensors=None),
        record([], state="not_applicable", reason="why", defense="sign", tensors=None),
    ]
    result = {
        "schema_version": 1,
        "gradleak_version": "0",
        "settings": {},
        "environment": {},
        "seconds": 1.0,
        "findings": findings(records),
    }
    validate_result(result)
    validate_result(jsonsafe.loads(jsonsafe.dumps(result)))


def test_headline_and_verdicts() -> None:
    found = findings(
        [
            record([target(0), *protected_targets()[1:]], defense="clip"),
            record(protected_targets(), defense="gaussian-noise"),
            record([target(0, 11.0)], defense="top-k"),
            leaking(),
            record([], state="not_applicable", reason="needs labels", defense="none", group=1)
            | {"finding": "other", "attack": "idlg"},
        ]
    )
    assert headline(found) == (
        "The server recovers 8 of 8 images from undefended updates; "
        "1 of 8 from updates under clip; "
        "none of 8 from updates under gaussian-noise (protected); "
        "none of 1 from updates under top-k (inconclusive)."
    )
    assert verdict_by_defense(found) == {
        "clip": "leaks",
        "gaussian-noise": "protected",
        "top-k": "inconclusive",
        "none": "leaks",
    }


def test_one_unprotected_attack_spoils_a_protection() -> None:
    weak = record([target(0, 11.0)], defense="gaussian-noise")
    weak |= {"finding": "weak", "key": "weak", "attack": "idlg"}
    shown = record(protected_targets(), defense="gaussian-noise")
    found = findings([leaking(), shown, weak])
    assert verdict_by_defense(found)["gaussian-noise"] == "inconclusive"


def test_headline_when_nothing_ran() -> None:
    broken = record([], state="error", reason="why")
    assert headline(findings([broken])).startswith("Nothing could be measured")
    picked = [target(i, 11.0, identified=1) for i in range(8)]
    assert "picks 100% out of 100 candidates" in headline(findings([record(picked)]))
