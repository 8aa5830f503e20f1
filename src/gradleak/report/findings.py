"""Findings: what the stored trials show, with intervals, attribution and a verdict in words.

`findings` is a pure function of the records of a run. The rules, in full:

*Denominator.* Every target that was to be attacked counts. Where the attack failed, diverged or
found no solution, the attacker submits the best guess made without any update (class mean where
labels are known, mean image otherwise); such a target is not identified.

*Recovered image.* PSNR ≥ 20 dB, identified among the bank, and PSNR at least 3 dB above both the
guess and the control. A target is *solved* when at least half of its images are recovered.

*Misses.* Of a target that ran and is not solved, the attack's own objective at its claim is
compared with the objective at the truth, and so is its matching term alone: where either is worse
by more than max(0.1 % of the truth's, 1e-9), search or prior fell short of what the update shows
and the miss is *optimiser-limited*; otherwise it is *information-limited*; *unattributed* without
two finite objectives.

*"leaks"* when either holds:
  1. recovery: an image is recovered, and the control recovers none, or so few that the
     Clopper–Pearson intervals of the two shares do not overlap;
  2. identification: the lower end of the interval of the identified share is above chance, and
     the share beats control and guess in exact sign tests over clients (each one-sided, 2.5 %).

*"protected"* when none of that holds and **all** of these do: a protection is in place, the attack
knew it (adaptive), at least 8 clients, every miss information-limited (no failure, divergence,
missing solution, optimiser-limited or unattributed miss, no solved target), no sanity warning, no
proved limit broken (see `limits`), at
least half of the clients unidentified with 95 % confidence, and the same attack under the same
threat leaks the same scenario without the protection. A weak or broken attack can therefore never
certify anything.

A sum of clients without protections of their own is a scenario like any other and never a
protection: attacks that fail on it leave it *"inconclusive"*.

*"inconclusive"* otherwise; `reason` names the first condition that fails.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gradleak.metrics import (
    METRICS,
    Interval,
    clustered_mean,
    clustered_rate,
    excess_risk,
    excess_risk_interval,
    median_interval,
    sign_test,
)
from gradleak.report.limits import limits, ranking, violations
from gradleak.report.twins import deciding

RECOVERED_PSNR_DB = 20.0
RECOVERED_MARGIN_DB = 3.0
PROTECTED_CLIENTS = 8
PROTECTED_IDENTIFIED = 0.5
ALPHA = 0.025
CONFIDENCE = 0.95

Finding = dict[str, Any]
Json = Mapping[str, Any]
Scores = Mapping[str, Sequence[float]]

_BARE = {"client": "no protection is in place", "aggregate": "nothing but the sum protects"}
_RATES = {"identified": "", "label_accuracy": ""}
NO_CLAIM = ("failed", "diverged", "no_solution")
_COUNTED = ("solved", "diverged", "failed", "no_solution")
_CAUSES = ("optimiser_limited", "information_limited", "unattributed")


@dataclass(slots=True)
class _Target:
    """One attacked update; scores are lists with one value per image."""

    number: Any
    client: Any
    seed: Any
    group: Any
    status: str
    message: str
    objective: float
    objective_at_truth: float
    fit: float
    fit_at_truth: float
    scores: dict[str, list[float]]
    control: dict[str, list[float]]
    baselines: dict[str, dict[str, list[float]]]
    original: dict[str, list[float]]
    ceiling: dict[str, list[float]]
    tensors: str | None
    row: int
    recovered: list[bool] = field(default_factory=list)
    recovered_by_control: list[bool] = field(default_factory=list)

    @property
    def guess(self) -> dict[str, list[float]]:
        return self.baselines.get("class_mean") or self.baselines.get("mean_image") or {}

    @property
    def solved(self) -> bool:
        return any(self.recovered) and 2 * sum(self.recovered) >= len(self.recovered)

    @property
    def missed(self) -> str | None:
        """Why the target was missed; None where it was solved or there is no claim."""
        if self.solved or self.status in NO_CLAIM:
            return None
        if not (math.isfinite(self.objective) and math.isfinite(self.objective_at_truth)):
            return "unattributed"
        short = _worse(self.objective, self.objective_at_truth) or _worse(
            self.fit, self.fit_at_truth
        )
        return "optimiser_limited" if short else "information_limited"


def _worse(claim: float, truth: float) -> bool:
    """Whether a claim's value exceeds the truth's by more than rounding; False for nan."""
    return claim > truth + max(1e-3 * abs(truth), 1e-9)


def findings(records: Sequence[Mapping[str, Any]]) -> list[Finding]:
    """Turn the records of a run into findings, in order of first appearance.

    Args:
        records: lines of trials.jsonl, decoded or with non-finite numbers still tagged; of
            records with one key the last counts. Their order within a finding does not matter.

    Returns:
        One finding per finding id, in the form of result.json; see the module for the rules.
    """
    grouped: dict[str, list[Mapping[str, Any]]] = {}
    for record in {r.get("key", i): r for i, r in enumerate(records)}.values():
        grouped.setdefault(str(record["finding"]), []).append(record)
    foretold: dict[str, _Foretold] = {}
    for record in records:
        if record.get("foretold"):
            foretold.setdefault(_condition(record), _Foretold()).add(record)
    found = [
        _finding(
            name,
            sorted(group, key=lambda r: (r.get("seed") or 0, r.get("group") or 0)),
            foretold=foretold.get(_condition(group[0]), _Foretold()),
        )
        for name, group in grouped.items()
    ]
    leaking = {_setting(f) for f in found if f["verdict"] == "leaks" and f["defense"] == "none"}
    for finding in found:
        if finding["verdict"] == "protected" and _setting(finding) not in leaking:
            finding["verdict"] = "inconclusive"
            finding["reason"] = (
                "the same attack does not leak the undefended updates, so its failure here "
                "shows nothing about the protection"
            )
    return found


def headline(found: Sequence[Finding]) -> str:
    """Say in one sentence what the server recovers, undefended first, then per protection."""
    measured = [f for f in found if f["state"] == "measured"]
    if not measured:
        claims = sum(len(f["targets"]) for f in found if f["state"] == "unscored")
        return (
            f"{claims} claims on recorded updates, none scored: no truth was given."
            if claims
            else "Nothing could be measured: no attack ran to an end."
        )
    worst = {spec: max(group, key=_leakage) for spec, group in _by_defense(measured).items()}
    clauses: list[str] = []
    for spec, finding in sorted(worst.items(), key=lambda item: item[1]["defense"] != "none"):
        trials = finding["trials"]
        share = f"{trials['recovered_images'] or 'none'} of {trials['images']}"
        where = (
            "undefended updates"
            if finding["defense"] == "none"
            else f"updates under {as_given(finding)}"
        )
        if finding["scenario"].get("clients", 1) > 1:
            where += f", of which only sums over {finding['scenario']['clients']} clients are seen"
        if clauses:
            clause = f"{share} from {where}"
        else:
            noun = "image" if trials["images"] == 1 else "images"
            clause = f"The server recovers {share} {noun} from {where}"
        if finding["verdict"] != "leaks":
            clause += f" ({verdict_by_defense(found)[spec]})"
        elif not trials["recovered_images"]:
            rate = finding["measurements"]["identified"]["value"]
            clause += f" (yet picks {rate:.0%} out of {finding['bank_size']} candidates)"
        clauses.append(clause)
    return "; ".join(clauses) + "."


def verdict_by_defense(found: Sequence[Finding]) -> dict[str, str]:
    """Verdict of each protection (keyed by its spec) over everything that was tried on it.

    "leaks" if any finding leaks, "protected" if every finding that applies is protected; unaware
    attacks beside their adaptive twins count for a leak alone.
    """
    verdicts = {}
    for spec, group in _by_defense(deciding(found)).items():
        words = {f["verdict"] for f in group if f["state"] != "not_applicable"}
        verdicts[spec] = (
            "leaks" if "leaks" in words else words.pop() if len(words) == 1 else "inconclusive"
        )
    return verdicts


def as_given(finding: Json) -> str:
    """The protection as the request spelled it, without the parameters it left at default."""
    parts = str(finding["id"]).rsplit("/", 2)
    return parts[1] if len(parts) == 3 else str(finding["defense_spec"])


def _by_defense(found: Iterable[Json]) -> dict[str, list[Json]]:
    grouped: dict[str, list[Json]] = {}
    for finding in found:
        grouped.setdefault(finding["defense_spec"], []).append(finding)
    return grouped


def _leakage(finding: Json) -> tuple[bool, float, float]:
    trials = finding["trials"]
    share = trials["recovered_images"] / max(trials["images"], 1)
    return finding["verdict"] == "leaks", share, finding["measurements"]["psnr_db"]["value"]


def _setting(finding: Mapping[str, Any]) -> str:
    """What two findings share that differ in their protection alone."""
    return repr((_scene(finding), finding["attack"]))


def _condition(record: Mapping[str, Any]) -> str:
    """What two records share that differ in their attack alone."""
    return repr((_scene(record), record.get("defense_spec") or record["defense"]))


def _scene(record: Mapping[str, Any]) -> tuple[Any, ...]:
    threat = {k: sorted(v) if k == "knows" else v for k, v in (record.get("threat") or {}).items()}
    return sorted(record["scenario"].items()), sorted(threat.items())


@dataclass(slots=True)
class _Foretold:
    """What the auditor foretold of the targets of one condition, whatever attacks them."""

    prior: str | None = None
    floor: dict[str, Any] | None = None
    targets: dict[Any, dict[str, Any]] = field(default_factory=dict)

    def add(self, record: Mapping[str, Any]) -> None:
        known = record["foretold"]
        self.prior = known.get("prior") or self.prior
        self.floor = known.get("floor") or self.floor
        for scores in known.get("targets", ()):
            self.targets[record.get("seed"), scores["target"]] = dict(scores)

    def of(self, target: _Target) -> dict[str, Any] | None:
        return self.targets.get((target.seed, target.number))

    def beside(self, targets: Sequence[_Target]) -> Finding | None:
        """The prior, and how well each score ranked the targets for which there is a claim."""
        if not self.targets:
            return None
        pairs = [
            (scores, float(np.mean(t.scores["mse"])))
            for t in targets
            if t.status not in NO_CLAIM and (scores := self.of(t)) and t.scores.get("mse")
        ]
        ranks = ranking([scores for scores, _ in pairs], [error for _, error in pairs])
        return {"prior": self.prior, "ranking": ranks}


def _finding(name: str, records: Sequence[Mapping[str, Any]], *, foretold: _Foretold) -> Finding:
    first = records[0]
    states = [str(r["state"]) for r in records]
    reasons = _unique(str(r["reason"]) for r in records if r.get("reason"))
    finding: Finding = {
        "id": name,
        "state": "not_run",
        "scenario": dict(first["scenario"]),
        "threat": dict(first.get("threat") or {}),
        "attack": first["attack"],
        "attack_spec": first.get("attack_spec") or first["attack"],
        "defense": first["defense"],
        "defense_spec": first.get("defense_spec") or first["defense"],
        "adaptive": all(bool(r.get("adaptive")) for r in records),
        "bank_size": first.get("bank_size"),
        "measurements": {},
        "trials": {"run": 0, **dict.fromkeys(_COUNTED, 0), "recovered_images": 0, "images": 0},
        "missed": dict.fromkeys(_CAUSES, 0),
        "cost": {
            "seconds": math.fsum(_number(r.get("seconds", 0.0)) for r in records),
            "gradient_evaluations": sum(int(r.get("gradient_evaluations") or 0) for r in records),
        },
        "verdict": "inconclusive",
        "warnings": _unique(str(w) for r in records for w in r.get("warnings") or ()),
        "reason": "; ".join(reasons) or None,
        "limits": [],
        "violations": [],
        "foretold": None,
        "targets": [],
        "tensors": _unique(str(r["tensors"]) for r in records if r.get("tensors")),
    }
    if "unscored" in states:
        claimed = [t for r in records for t in _targets(r)]
        finding["state"] = "unscored"
        finding["targets"] = [_public(t, None) for t in claimed]
        finding["trials"]["run"] = len(claimed)
        finding["reason"] = finding["reason"] or "no truth was given: claims are not scored"
        return finding
    attempted = [r for r in records if r["state"] in ("measured", "error")]
    targets = [t for r in attempted for t in _targets(r)]
    if "measured" not in states or not any(t.scores or t.guess for t in targets):
        if attempted:
            finding["state"] = "error"
            finding["reason"] = finding["reason"] or "no target could be scored"
            finding["trials"] |= {"run": len(targets), "failed": len(targets)}
        elif "not_applicable" in states:
            finding["state"] = "not_applicable"
        return finding
    if not all(t.control for t in targets):
        finding["warnings"].append("some targets have no control attack")
    _settle(targets)
    proved = [r["proved"] for r in records if r.get("proved")]
    compared = limits(
        max(proved, key=lambda p: p.get("identified") or 0.0) if proved else None,
        foretold.floor,
        _clusters(targets, lambda t: t.scores.get("identified")),
        _clusters(targets, lambda t: t.scores.get("mse")),
    )
    finding |= {
        "state": "measured",
        "measurements": _measurements(targets, first),
        "limits": compared,
        "violations": violations(compared),
        "foretold": foretold.beside(targets),
        "targets": [
            _public(t, foretold.of(t)) for t in sorted(targets, key=lambda t: t.tensors is None)
        ],
        "trials": {
            "run": len(targets),
            "solved": sum(t.solved for t in targets),
            "diverged": sum(t.status == "diverged" for t in targets),
            "failed": sum(t.status == "failed" for t in targets),
            "no_solution": sum(t.status == "no_solution" for t in targets),
            "recovered_images": sum(sum(t.recovered) for t in targets),
            "images": sum(len(t.recovered) for t in targets),
        },
        "missed": {cause: sum(t.missed == cause for t in targets) for cause in _CAUSES},
    }
    finding["verdict"], finding["reason"] = _verdict(finding, targets)
    if reasons:
        finding["reason"] += f" ({'; '.join(reasons)})"
    return finding


def _targets(record: Mapping[str, Any]) -> list[_Target]:
    """Targets of one record; an error that names none still counts as one failed target."""
    broken = record["state"] == "error"
    unnamed = {"client": f"group {record.get('group')}, seed {record.get('seed')}"}
    return [
        _Target(
            number=t.get("target"),
            client=t.get("client"),
            seed=record.get("seed"),
            group=record.get("group"),
            status="failed" if broken else str(t["status"]),
            message=str(t.get("message") or (broken and record.get("reason")) or ""),
            objective=_number(t.get("objective")),
            objective_at_truth=_number(t.get("objective_at_truth")),
            fit=_number(t.get("fit")),
            fit_at_truth=_number(t.get("fit_at_truth")),
            scores=_scores(t.get("scores")),
            control=_scores(t.get("control")),
            baselines={k: _scores(v) for k, v in (t.get("baselines") or {}).items()},
            original=_scores(t.get("original")),
            ceiling=_scores(t.get("ceiling")),
            tensors=record.get("tensors"),
            row=row,
        )
        for row, t in enumerate(record.get("targets") or [unnamed])
    ]


def _settle(targets: Sequence[_Target]) -> None:
    """Give every target the scores it counts with, and decide which images are recovered."""
    names = {name: None for t in targets for name in (*t.scores, *t.guess)}
    sizes = [len(v) for t in targets for k, v in (t.scores or t.guess).items() if k in METRICS]
    b = max(sizes, default=1)
    usual = {
        name: _finite_mean(x for t in targets for x in t.guess.get(name, ())) for name in names
    }
    for target in targets:
        claimed, submitted = target.scores, {}
        for name in names:
            count = 1 if name == "label_accuracy" else b
            fallback = [usual[name]] * count if math.isfinite(usual[name]) else [0.0] * count
            guess = target.guess.get(name) or fallback
            if target.status in NO_CLAIM or name not in claimed:
                submitted[name] = [0.0] * count if name == "identified" else list(guess)
            else:
                submitted[name] = [
                    g if math.isnan(x) else x for x, g in zip(claimed[name], guess, strict=True)
                ]
        target.scores = submitted
        target.recovered = _recovered(submitted, target.guess, target.control)
        target.recovered_by_control = (
            _recovered(target.control, target.guess, {}) if target.control else []
        )


def _recovered(scores: Scores, *rivals: Scores) -> list[bool]:
    found = []
    for image, (psnr, hit) in enumerate(zip(scores["psnr_db"], scores["identified"], strict=True)):
        bars = [r["psnr_db"][image] + RECOVERED_MARGIN_DB for r in rivals if r.get("psnr_db")]
        found.append(hit == 1 and psnr >= max([RECOVERED_PSNR_DB, *bars]))
    return found


def _clusters(
    targets: Sequence[_Target], pick: Callable[[_Target], Sequence[float] | None]
) -> list[list[float]]:
    """Values by client, in order of first appearance, for the clients that have any."""
    by_client: dict[Any, list[float]] = {}
    for target in targets:
        by_client.setdefault(target.client, []).extend(map(float, pick(target) or ()))
    return [values for values in by_client.values() if values]


def _measurements(targets: Sequence[_Target], record: Mapping[str, Any]) -> dict[str, Finding]:
    measured = {}
    for name in (*METRICS, *_RATES):
        if name not in targets[0].scores:
            continue
        values = _clusters(targets, lambda t, name=name: t.scores[name])  # type: ignore[misc]
        images = np.array([x for client in values for x in client])
        metric = METRICS.get(name)
        interval = (
            clustered_mean(values, confidence=CONFIDENCE, limits=metric.limits)
            if metric
            else clustered_rate(values, confidence=CONFIDENCE)
        )
        value = _mean(values)
        entry = {
            "value": value,
            "low": min(interval.low, value),
            "high": max(interval.high, value),
            "confidence": CONFIDENCE,
            "n": len(targets),
            "clients": len(values),
            "images": len(images),
            "unit": metric.unit if metric else _RATES[name],
            "baseline": _reference(targets, name, lambda t: t.guess),
            "control": _reference(targets, name, lambda t: t.control),
            "original": _reference(targets, name, lambda t: t.original),
            "ceiling": _reference(targets, name, lambda t: t.ceiling),
        }
        if metric:
            leakiest = 0.95 if metric.higher_leaks else 0.05
            middle = median_interval(values)
            entry["quantiles"] = {
                "mean": value,
                "median": float(np.median(images)),
                "median_low": max(middle.low, metric.limits[0]),
                "median_high": min(middle.high, metric.limits[1]),
                "worst_5_percent": float(np.quantile(images, leakiest)),
                "worst_case": float(images.max() if metric.higher_leaks else images.min()),
            }
            entry["nearest_public"] = _reference(
                targets, name, lambda t: t.baselines.get("nearest_public", {})
            )
        measured[name] = entry
    bank = record.get("bank_size")
    if "identified" in measured:
        b = max(len(t.scores["identified"]) for t in targets)
        measured["identified"] |= {
            "bank_size": bank,
            "chance": min(1.0, b / bank) if bank else None,
            "excess": _excess(targets),
        }
    measured["recovered"] = _recovered_share(targets)
    return measured


def _recovered_share(targets: Sequence[_Target]) -> Finding:
    values = _clusters(targets, lambda t: t.recovered)
    control = _clusters(targets, lambda t: t.recovered_by_control)
    interval = _rate(values)
    return {
        "value": _mean(values),
        "low": interval.low,
        "high": interval.high,
        "confidence": CONFIDENCE,
        "n": len(targets),
        "clients": len(values),
        "images": sum(map(len, values)),
        "unit": "",
        "baseline": 0.0,
        "control": _mean(control) if control else None,
    }


def _excess(targets: Sequence[_Target]) -> dict[str, float] | None:
    """Excess risk of identification over the control, over the targets that have one."""
    paired = [t for t in targets if t.control.get("identified")]
    if not paired:
        return None
    attack = _clusters(paired, lambda t: t.scores["identified"])
    control = _clusters(paired, lambda t: t.control["identified"])
    interval = excess_risk_interval(attack, control, confidence=CONFIDENCE)
    return {
        "value": excess_risk(_mean(attack), _mean(control)),
        "low": interval.low,
        "high": interval.high,
        "confidence": CONFIDENCE,
    }


def _verdict(finding: Finding, targets: Sequence[_Target]) -> tuple[str, str]:
    """The verdict of one finding by itself, and why."""
    trials, missed = finding["trials"], finding["missed"]
    identified = finding["measurements"]["identified"]
    bank = finding["bank_size"]
    if _leaks_by_recovery(targets):
        return "leaks", (
            f"{trials['recovered_images']} of {trials['images']} images recovered: PSNR of "
            f"{RECOVERED_PSNR_DB:g} dB or more, {RECOVERED_MARGIN_DB:g} dB above guess and "
            f"control, picked out of {bank} candidates"
        )
    if _leaks_by_identification(identified, targets):
        return "leaks", (
            f"{identified['value']:.0%} of images picked out of {bank} candidates, where chance "
            f"gives {identified['chance']:.1%} and the control {identified['control']:.0%}"
        )
    clients = len({t.client for t in targets})
    bare = _BARE[finding["threat"].get("view", "client")]
    no_claim = trials["failed"] + trials["diverged"] + trials["no_solution"]
    doubts = {
        f"{bare}, and this attack shows no leak": finding["defense"] == "none",
        "the attack did not know the protection": not finding["adaptive"],
        f"{no_claim} of {trials['run']} targets without a claim: "
        f"{trials['failed']} failed, {trials['diverged']} diverged, "
        f"{trials['no_solution']} without a solution": no_claim > 0,
        f"{missed['optimiser_limited']} of {trials['run']} targets missed because the optimiser "
        "did not reach the truth's objective": missed["optimiser_limited"] > 0,
        f"{missed['unattributed']} of {trials['run']} misses cannot be attributed: the attack "
        "has no finite objective, or clients draw what it does not know": missed["unattributed"]
        > 0,
        "the control recovers as much as the attack": trials["recovered_images"] > 0,
        f"{clients} clients: {PROTECTED_CLIENTS} or more are needed": clients < PROTECTED_CLIENTS,
        "sanity checks gave warnings": bool(finding["warnings"]),
        "an attack beats what is proved": bool(finding["violations"]),
        f"up to {identified['high']:.0%} of images may be identified "
        f"({CONFIDENCE:.0%} confidence)": identified["high"] >= PROTECTED_IDENTIFIED,
        "misses and targets do not add up": missed["information_limited"] != trials["run"],
    }
    for reason, holds in doubts.items():
        if holds:
            return "inconclusive", reason
    return "protected", (
        f"all {trials['run']} misses are information-limited for this attack, and at most "
        f"{identified['high']:.0%} of images are identified ({CONFIDENCE:.0%} confidence)"
    )


def _leaks_by_recovery(targets: Sequence[_Target]) -> bool:
    attack = _clusters(targets, lambda t: t.recovered)
    control = _clusters(targets, lambda t: t.recovered_by_control)
    if not any(map(any, attack)):
        return False
    if not any(map(any, control)):
        return True
    return _rate(attack).low > _rate(control).high


def _leaks_by_identification(identified: Finding, targets: Sequence[_Target]) -> bool:
    if not identified["chance"] or identified["low"] <= identified["chance"]:
        return False
    references: tuple[Callable[[_Target], Scores], ...] = (lambda t: t.control, lambda t: t.guess)
    for reference in references:
        paired = [t for t in targets if reference(t).get("identified")]
        attack = _clusters(paired, lambda t: t.scores["identified"])
        rival = _clusters(paired, lambda t: reference(t)["identified"])  # noqa: B023
        if not paired or sign_test(attack, rival) > ALPHA:
            return False
    return True


def _rate(values: Sequence[Sequence[float]]) -> Interval:
    return clustered_rate(values, confidence=CONFIDENCE)


def _public(target: _Target, foretold: Finding | None) -> Finding:
    """One target as result.json shows it; scores are those that count."""
    return {
        "client": target.client,
        "seed": target.seed,
        "group": target.group,
        "status": target.status,
        "message": target.message,
        "objective": target.objective,
        "objective_at_truth": target.objective_at_truth,
        "solved": target.solved,
        "recovered_images": sum(target.recovered),
        "images": len(target.recovered),
        "missed": target.missed,
        "scores": target.scores,
        "control": target.control or None,
        "baselines": target.baselines,
        "original": target.original or None,
        "ceiling": target.ceiling or None,
        "foretold": foretold,
        "tensors": target.tensors,
        "row": target.row,
    }


def _reference(
    targets: Sequence[_Target], name: str, pick: Callable[[_Target], Scores]
) -> float | None:
    values = _clusters(targets, lambda t: pick(t).get(name))
    return _mean(values) if values else None


def _mean(values: Sequence[Sequence[float]]) -> float:
    return float(np.mean([np.mean(v) for v in values]))


def _finite_mean(values: Iterable[float]) -> float:
    finite = [x for x in values if math.isfinite(x)]
    return math.fsum(finite) / len(finite) if finite else math.nan


def _scores(raw: Mapping[str, Any] | None) -> dict[str, list[float]]:
    """Scores as floats, each inside the range its metric can take (nan stays nan)."""
    scores = {}
    for name, values in (raw or {}).items():
        limits = METRICS[name].limits if name in METRICS else (0.0, 1.0)
        numbers = [_number(v) for v in values]
        scores[name] = [x if math.isnan(x) else min(max(x, limits[0]), limits[1]) for x in numbers]
    return scores


def _number(value: Any) -> float:
    """A float from JSON: plain, tagged as non-finite, or null for nan."""
    if isinstance(value, Mapping):
        value = value["nonfinite"]
    return math.nan if value is None else float(value)


def _unique(words: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(words))
