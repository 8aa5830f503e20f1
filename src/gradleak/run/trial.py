"""`run_trial`: one job in, one record out. It writes nothing and draws from the job's seed."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from gradleak import data, metrics, registry
from gradleak.attacks import attack_all
from gradleak.attacks import build as build_attack
from gradleak.attacks.parts.objective import Engine
from gradleak.attacks.recipe import Recipe
from gradleak.data import Dataset, Split
from gradleak.defenses import rebased, undefended
from gradleak.errors import GradleakError, InvalidInput, NotApplicable
from gradleak.mechanisms import Diffusing, FedAvg, summed
from gradleak.mechanisms.client import Local
from gradleak.priors import Gaussians
from gradleak.run.beliefs import believed
from gradleak.run.ceilings import ceiling
from gradleak.run.jobs import JobSpec, adaptive, derive, mechanism_of
from gradleak.run.predictions import floor, predictions
from gradleak.run.preflight import merged, objective_warnings, preflight
from gradleak.run.replies import (
    POOL,
    PUBLIC,
    client_told,
    pool_split,
    read_pool,
    replies,
    state_of,
    told,
)
from gradleak.run.settings import trains_denoiser
from gradleak.run.states import broadcast
from gradleak.run.store import TENSORS
from gradleak.scenario import Scenario, simulate
from gradleak.threat import Truth
from gradleak.types import (
    Attack,
    Batch,
    DataSpec,
    Fact,
    ModelState,
    Observation,
    Planting,
    Reconstruction,
)

SCHEMA_VERSION = 1

_GUESSED = ("diverged", "failed", "no_solution")


@dataclass(frozen=True)
class Trial:
    """What a job leaves: a record of plain values, and a safetensors image where it measured."""

    record: dict[str, Any]
    tensors: bytes | None = None


def run_trial(
    job: JobSpec,
    *,
    dataset: Dataset | None = None,
    progress: Callable[[float], None] | None = None,
) -> Trial:
    """Simulate the job's targets, attack them, and score every claim.

    An attack that does not apply and an attack that fails are records too.

    Args:
        job: what to do; with equal jobs all but the seconds are equal.
        dataset: the job's data, where they cannot be loaded by name.
        progress: called with the share done, in [0, 1].
    """
    started = time.perf_counter()
    try:
        progress = progress or (lambda _: None)
        dataset = dataset or (load_data(job.data, job.data_dir) if job.data else None)
        try:
            trial = (
                _claimed(job, progress=progress)
                if dataset is None
                else _measure(job, dataset, progress=progress)
            )
        except NotApplicable as reason:
            trial = Trial(_record(job, state="not_applicable", reason=_line(reason)))
        try:
            trial.record["foretold"] = _foretold(job, dataset)
        except Exception as error:  # what was measured counts nevertheless
            words = f"{type(error).__name__}: {_line(error)}"
            trial.record["foretold"] = {"floor": {"why_not": words}}
    except GradleakError as error:
        trial = failed(job, _line(error))
    except Exception as error:  # an attack that breaks must not take the audit with it
        trial = failed(job, f"{type(error).__name__}: {_line(error)}")
    trial.record["seconds"] = trial.record["seconds"] or time.perf_counter() - started
    return trial


def run_planned(job: Mapping[str, Any], *, progress: Callable[[float], None]) -> Trial:
    """`run_trial` for a job as plain values."""
    return run_trial(JobSpec.from_json(job), progress=progress)


def failed(job: JobSpec, reason: str) -> Trial:
    """The record of a job that could not be run."""
    return Trial(_record(job, state="error", reason=reason))


@lru_cache(maxsize=2)
def load_data(name: str, data_dir: str | None) -> Dataset:
    """Load a data set, or the pool of a recorded audit, once per process."""
    if name.endswith(POOL):
        return read_pool(Path(name))
    return data.load(name, data_dir=Path(data_dir) if data_dir else None)


def divide(dataset: Dataset, seed: int) -> Split:
    """The private and public halves of a run."""
    return data.split(dataset, derive(seed, "split"))


def settle_engine(job: JobSpec) -> Engine:
    """Measure how a job's attack is vectorised best, without attacking.

    A run measures once and remembers: rounding differs between engines, and a resumed run must
    end where an uninterrupted one does.
    """
    attack = build_attack(job.attack_spec)
    if not isinstance(attack, Recipe):
        return "loop"
    try:
        if job.updates is not None:
            seen = replies(job, load_data(job.data, job.data_dir) if job.data else None)
        else:
            dataset = load_data(job.data, job.data_dir)
            seen = [t.seen for t in simulate_targets(job, dataset, divide(dataset, job.seed))]
        return attack.settle_engine(seen, trials_at_once=job.trials_at_once)
    except Exception:  # the trial itself will say what is wrong
        return "loop"


@dataclass(frozen=True)
class _Target:
    scenario: Scenario
    seen: Observation
    truth: Truth
    generator: torch.Generator


def simulate_targets(job: JobSpec, dataset: Dataset, division: Split) -> list[_Target]:
    """Play the clients of a job, the spare one last.

    A client's draws depend on the run's seed and on its number alone, so that every attack and
    every protection meets the same batches: comparisons are paired.
    """
    state = _broadcast(job, dataset, division)
    prior = None
    if job.prior_file is not None:
        file = Path(job.directory) / job.prior_file
        prior = believed(file, str(job.prior_digest), job.device)
    mechanism = told(mechanism_of(job), dataset, division.public)
    spare = [] if job.spare is None else [(job.spare, -1)]
    targets = []
    for target, client in [*zip(job.targets, job.clients), *spare]:
        scenario = Scenario(
            data=dataset,
            model=state,
            mechanism=mechanism,
            threat=job.threat,
            batch_size=job.batch_size,
            indices=job.indices(target, division),
            client=client,
            clients=job.clients_in_sum,
            prior=prior,
        )
        generator = torch.Generator().manual_seed(derive(job.seed, "client", target))
        seen, truth = simulate(scenario, generator=generator)
        targets.append(_Target(scenario, seen, truth, generator))
    return targets


def _recorded_targets(job: JobSpec, dataset: Dataset, division: Split) -> list[_Target]:
    """The clients of a recorded job; what drew their randomness is theirs alone."""
    mechanism = client_told(job, dataset)
    state = state_of(job, dataset.spec)
    targets = []
    for target, client, seen in zip(job.targets, job.clients, replies(job, dataset), strict=True):
        first = target * job.batch_size
        indices = division.clients[first : first + job.batch_size]
        batch = dataset.batch(indices)
        batch = Batch(batch.inputs.to(job.device), batch.labels.to(job.device))
        scenario = Scenario(
            data=dataset,
            model=state,
            mechanism=mechanism,
            threat=job.threat,
            batch_size=job.batch_size,
            indices=indices,
            client=client,
        )
        truth = Truth(batch, batch, client=client)
        targets.append(_Target(scenario, seen, truth, torch.Generator()))
    return targets


def _broadcast(job: JobSpec, dataset: Dataset, division: Split) -> ModelState:
    """What the server sends: the prepared state, or what a malicious server makes of it."""
    state: ModelState = broadcast(
        Path(job.directory) / job.state, job.model, dataset.spec, job.device
    )
    attack = build_attack(job.attack_spec)
    if job.server == "honest" or not isinstance(attack, Planting):
        return state
    return attack.plant(
        state,
        dataset.batch(division.public[:PUBLIC]),
        data=dataset.spec,
        batch_size=job.examples,
        generator=torch.Generator().manual_seed(derive(job.seed, "plant")),
    )


def _measure(job: JobSpec, dataset: Dataset, *, progress: Callable[[float], None]) -> Trial:
    if dataset.fingerprint != job.data_fingerprint:
        raise InvalidInput(f"data {job.data!r} changed while the audit was running")
    recorded = job.updates is not None
    division = pool_split(job, dataset) if recorded else divide(dataset, job.seed)
    candidates = dataset.batch(division.clients[: job.bank])
    bank = candidates.inputs
    public = dataset.batch(division.public)
    attack = build_attack(job.attack_spec)
    targets = (_recorded_targets if recorded else simulate_targets)(job, dataset, division)
    attacked = targets[: len(job.targets)]
    warnings = (
        []
        if recorded
        else merged(
            [preflight(t.scenario, t.seen, t.truth, generator=t.generator) for t in attacked]
        )
    )
    claims, seconds = _claims(job, attack, [t.seen for t in targets], progress=progress)
    ceilings = _from_the_truth(job, attack, attacked)

    labels_known = Fact.LABELS in job.knows
    unlabelled = trains_denoiser(job.mechanism)
    entries, pictures, at_truth, at_guess = [], [], [], []
    for i, (target, claim) in enumerate(zip(attacked, claims)):
        true = target.truth.trained_on
        truth, original = _on_cpu(true), _on_cpu(target.truth.batch)
        transformed = true.inputs is not target.truth.batch.inputs
        beside = _control(job, i)  # a single recorded client has nobody beside it
        unrelated = _on_cpu(claims[beside].batch) if beside < len(claims) else None
        guesses = metrics.baselines(public, truth, labels_known=labels_known, spec=dataset.spec)
        objective = _auditors_view(attack, "objective", target.seen)
        fit = _auditors_view(attack, "fit", target.seen)
        visited = _as_visited(target)
        at_truth.append(objective(visited))
        at_guess.append(objective(Batch(guesses["mean_image"].inputs.to(true.inputs), true.labels)))

        def scores(
            guess: Batch, truth: Batch = truth, original: Batch = original
        ) -> dict[str, list[float]]:
            found = metrics.score(guess, truth, original=original, bank=bank, spec=dataset.spec)
            return {k: v for k, v in found.items() if not (unlabelled and k == "label_accuracy")}

        entries.append(
            {
                "client": job.clients[i],
                "target": job.targets[i],
                "status": claim.status,
                "message": claim.message,
                "objective": claim.objective,
                "objective_at_truth": at_truth[-1],
                "fit": fit(claim.batch),
                "fit_at_truth": fit(visited),
                "evaluations": claim.evaluations,
                "scores": scores(_on_cpu(claim.batch)),
                **({} if unrelated is None else {"control": scores(unrelated)}),
                **({"original": scores(_on_cpu(claim.batch), original)} if transformed else {}),
                **({"ceiling": scores(_on_cpu(ceilings[i].batch))} if ceilings else {}),
                "baselines": {name: scores(guess) for name, guess in guesses.items()},
            }
        )
        best_guess = guesses.get("class_mean", guesses["mean_image"])
        pictures.append(_pictures(claim, truth, unrelated, best_guess, dataset.spec))
        if transformed:
            pictures[-1]["original"] = original.inputs.float()
    if targets[0].seen.mechanism.deterministic:
        warnings += objective_warnings(at_truth, at_guess)
    record = _record(job, state="measured", reason=None) | {
        "seconds": seconds,
        "gradient_evaluations": sum(c.evaluations for c in claims[: len(attacked)]),
        "engine": claims[0].engine,
        "warnings": warnings,
        "bank_size": len(bank),
        "proved": ceiling(
            targets[0].scenario.mechanism,
            job.threat,
            candidates,
            dataset.spec,
            batch_size=job.batch_size,
            clients=job.honest,
            guesses=max(len(c.batch) for c in claims),
        ),
        "tensors": f"{TENSORS}/{job.key}.safetensors",
        "targets": entries,
    }
    stacked = {k: torch.stack([p[k] for p in pictures]).contiguous() for k in pictures[0]}
    return Trial(record, safetensors.torch.save(stacked))


def _claims(
    job: JobSpec,
    attack: Attack,
    seen: Sequence[Observation],
    *,
    progress: Callable[[float], None],
) -> tuple[list[Reconstruction], float]:
    """What the attack claims of every observation, and the seconds it took."""
    started = time.perf_counter()
    claims = attack_all(
        attack,
        seen,
        seed=derive(job.seed, "attack", job.group),
        engine=job.engine or "auto",
        trials_at_once=job.trials_at_once,
        progress=lambda done, total: progress(done / max(total, 1)),
    )
    return claims, time.perf_counter() - started


def _claimed(job: JobSpec, *, progress: Callable[[float], None]) -> Trial:
    """Attack recorded updates whose truth nobody gave: claims, and no score."""
    attack = build_attack(job.attack_spec)
    seen = replies(job, None)
    claims, seconds = _claims(job, attack, seen, progress=progress)
    batches = [_on_cpu(claim.batch) for claim in claims]
    record = _record(job, state="unscored", reason=None) | {
        "seconds": seconds,
        "gradient_evaluations": sum(c.evaluations for c in claims),
        "engine": claims[0].engine,
        "tensors": f"{TENSORS}/{job.key}.safetensors",
        "targets": [
            {
                "client": job.clients[i],
                "target": job.targets[i],
                "status": claim.status,
                "message": claim.message,
                "objective": claim.objective,
                "fit": _auditors_view(attack, "fit", seen[i])(claim.batch),
                "evaluations": claim.evaluations,
                "labels": claim.batch.classes.tolist(),
            }
            for i, claim in enumerate(claims)
        ],
    }
    stacked = {
        "claim": torch.stack([b.inputs.float() for b in batches]).contiguous(),
        "claim_labels": torch.stack([b.classes.long() for b in batches]),
    }
    return Trial(record, safetensors.torch.save(stacked))


def _from_the_truth(
    job: JobSpec, attack: Attack, attacked: Sequence[_Target]
) -> list[Reconstruction]:
    """Where the attack ends that begins at the truth, target by target, if that is asked for."""
    if not job.ceiling or not isinstance(attack, Recipe):
        return []
    if not all(_determined(t.seen) for t in attacked):
        return []
    return attack.refined(
        [t.seen for t in attacked],
        [t.truth.trained_on for t in attacked],
        engine=job.engine or "auto",
        trials_at_once=job.trials_at_once,
    )


def _foretold(job: JobSpec, dataset: Dataset | None) -> dict[str, Any] | None:
    """The auditor's scores of a job's targets, and the floor of its condition, if asked for."""
    if job.bounds_file is None or dataset is None:
        return None
    prior = believed(Path(job.directory) / job.bounds_file, str(job.bounds_digest), job.device)
    assert isinstance(prior, Gaussians)
    targets = simulate_targets(job, dataset, divide(dataset, job.seed))[: len(job.targets)]
    scored = []
    for number, target in zip(job.targets, targets, strict=True):
        client = rebased(
            target.scenario.mechanism, fixed_order=target.truth.order, draws=target.truth.draws
        )
        client = summed(client, job.honest)
        scores = predictions(
            client,
            target.scenario.state,
            target.seen.update,
            target.truth.batch,
            prior=prior,
            spec=dataset.spec,
            generator=torch.Generator().manual_seed(derive(job.seed, "bounds", number)),
        )
        scored.append({"target": number, **scores})
    known: dict[str, Any] = {"targets": scored, "prior": registry.describe(prior.family)}
    if job.group == 0:
        known["floor"] = floor(
            summed(targets[0].scenario.mechanism, job.honest),
            targets[0].scenario.state,
            prior=prior,
            spec=dataset.spec,
            batch_size=job.examples,
            generator=torch.Generator().manual_seed(derive(job.seed, "bounds")),
        )
    return known


def _record(job: JobSpec, *, state: str, reason: str | None) -> dict[str, Any]:
    return {
        "schema_version": SCHEMA_VERSION,
        "key": job.key,
        "finding": job.finding,
        "state": state,
        "reason": reason,
        "scenario": job.scenario_record(),
        "threat": {
            "server": job.threat.server,
            "view": job.threat.view,
            "knows": sorted(job.threat.knows),
            "batch_norm": job.threat.batch_norm,
            "prior": job.prior,
            "prior_digest": job.prior_digest,
            **({"colluding": job.colluding} if job.view == "aggregate" else {}),
        },
        "attack": job.attack,
        "attack_spec": job.attack_spec,
        "defense": job.defense,
        "defense_spec": job.defense_spec,
        "adaptive": adaptive(job),
        "seed": job.seed,
        "group": job.group,
        "seconds": 0.0,
        "gradient_evaluations": 0,
        "engine": job.engine or "",
        "warnings": [],
        "bank_size": job.bank,
        "proved": None,
        "foretold": None,
        "tensors": None,
        "targets": [],
    }


def _control(job: JobSpec, i: int) -> int:
    """Which claim of the group serves target i as control: the next one of another client."""
    n = len(job.targets)
    others = ((i + step) % n for step in range(1, n))
    return next((j for j in others if job.clients[j] != job.clients[i]), n)


def _auditors_view(attack: Attack, term: str, seen: Observation) -> Callable[[Batch], float]:
    """The attack's own `objective` or its `fit` alone; nan where it has none that applies.

    What clients draw and keep is none of the truth's, and an objective that puts something in its
    place may be lower for a wrong claim: it says nothing of why a search missed.
    """
    build = getattr(attack, term, None)
    if build is None or not _determined(seen):
        return lambda _: math.nan
    try:
        value = build(seen)
        return lambda batch: float(value(batch))
    except GradleakError:
        return lambda _: math.nan


def _determined(seen: Observation) -> bool:
    core = undefended(seen.mechanism)
    return not isinstance(core, Local) or core.determined(seen.knowledge.batch_size or 1)


def _as_visited(target: _Target) -> Batch:
    """The truth as it lies for an attack that takes an order it was not granted as that of claims.

    Within one epoch such an order is a relabelling of the batch.
    """
    core, order, true = (
        undefended(target.seen.mechanism),
        target.truth.order,
        target.truth.trained_on,
    )
    if order is None or not isinstance(core, FedAvg) or isinstance(core, Diffusing) or core.ordered:
        return true
    visited = dict.fromkeys(index for visit in order for index in visit)
    places = [*visited, *(i for i in range(len(true)) if i not in visited)]
    return Batch(true.inputs[places], true.labels[places])


def _on_cpu(batch: Batch) -> Batch:
    return Batch(batch.inputs.detach().cpu(), batch.labels.detach().cpu())


def _pictures(
    claim: Reconstruction, truth: Batch, unrelated: Batch | None, guess: Batch, spec: DataSpec
) -> dict[str, Tensor]:
    """What the report shows of one target, aligned with its truth."""
    claimed = _on_cpu(claim.batch)
    shown = guess if claim.status in _GUESSED and not _finite(claimed) else claimed
    order = metrics.align(shown, truth)
    labels = torch.where(order == metrics.MISSING, -1, shown.classes[order.clamp(min=0)])
    return {
        "truth": truth.inputs.float(),
        "claim": metrics.matched(shown, truth, bounds=spec.bounds)[0].float(),
        "control": torch.full_like(truth.inputs, math.nan).float()
        if unrelated is None
        else metrics.matched(unrelated, truth, bounds=spec.bounds)[0].float(),
        "baseline": guess.inputs.float(),
        "labels": truth.classes.long(),
        "claim_labels": labels.long(),
    }


def _finite(batch: Batch) -> bool:
    return bool(batch.inputs.isfinite().all())


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text[:400] or type(error).__name__


def targets_of(jobs: Sequence[JobSpec]) -> int:
    """Number of trials in some jobs."""
    return sum(len(job.targets) for job in jobs)
