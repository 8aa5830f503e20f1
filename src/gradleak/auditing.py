"""The audit: from settings to `result.json` and `report.html`."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import os
import platform
import shlex
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from gradleak import jsonsafe, models
from gradleak.attacks import ATTACKS
from gradleak.attacks import build as build_attack
from gradleak.attacks.parts.objective import Engine
from gradleak.data import Dataset, Split
from gradleak.defenses import DEFENSES, undefended
from gradleak.errors import CorruptFile, InvalidInput, NotApplicable
from gradleak.mechanisms import Diffusing, summed
from gradleak.mechanisms.denoising import check_network, one_step
from gradleak.run import states
from gradleak.run.beliefs import Belief, fitted, has_precision, prior_spec
from gradleak.run.executor import TRIALS, Progress, run_here, run_in_processes
from gradleak.run.jobs import (
    JobSpec,
    attack_spec,
    check_server,
    client_of,
    defense_spec,
    derive,
    device_of,
    mechanism_of,
    plan,
    version,
)
from gradleak.run.memory import Arrangement, arranged, free_memory, needed
from gradleak.run.settings import KNOWN_BY_DEFAULT, AuditSettings, Condition, option
from gradleak.run.states import Broadcast
from gradleak.run.store import Store, read_json, write_whole
from gradleak.run.trial import Trial, divide, load_data, settle_engine, targets_of
from gradleak.types import DataSpec, Fact, Mechanism, ModelState

SCHEMA_VERSION = 1
RESULT = "result.json"
ENGINES = "engines.json"


class Watcher(Protocol):
    """Somebody who wants to see an audit advance."""

    def planned(self, plan: str) -> None:
        """What is about to run, in one line, before it does."""
        ...

    def preparing(self, what: str) -> None:
        """Something other than trials goes on; `what` says what, in a few words."""
        ...

    def running(self, done: float, *, total: int, resumed: int) -> None:
        """`done` of `total` trials are done, `resumed` of them by an earlier run."""
        ...


class Unwatched:
    """Nobody looks."""

    def planned(self, plan: str) -> None:
        pass

    def preparing(self, what: str) -> None:
        pass

    def running(self, done: float, *, total: int, resumed: int) -> None:
        pass


@dataclass(frozen=True)
class LeakageReport:
    """What an audit found.

    Attributes:
        directory: where `result.json`, `trials.jsonl`, `tensors` and `report.html` lie.
        result: content of `result.json`.
    """

    directory: Path
    result: Mapping[str, Any]

    @property
    def findings(self) -> list[dict[str, Any]]:
        """One per scenario, attack and protection."""
        return list(self.result["findings"])

    @property
    def headline(self) -> str:
        """The outcome in one sentence."""
        return str(self.result["headline"])

    @property
    def page(self) -> Path:
        """The report to open in a browser."""
        return self.directory / "report.html"

    @property
    def failed(self) -> list[dict[str, Any]]:
        """Findings with trials that could not be run."""
        return [f for f in self.findings if f["id"] in set(self.result["failed"])]

    @property
    def violations(self) -> list[str]:
        """What beats a proved limit, a line each: an assumption of the audit is wrong."""
        return [f"{f['id']}: {v}" for f in self.findings for v in f.get("violations", ())]

    @property
    def conditions_met(self) -> list[str]:
        """The `--fail-on` conditions that hold."""
        return [str(c["condition"]) for c in self.result["fail_on"] if c["holds"]]


def audit(
    *,
    data: str | None = None,
    data_dir: str | Path | None = None,
    model: str | None = None,
    weights: str | Path | None = None,
    stage: str | Sequence[str] | None = None,
    mechanism: str | None = None,
    local_steps: int | None = None,
    local_learning_rate: float | None = None,
    batch_norm: str | None = None,
    batch_size: int | Sequence[int] | None = None,
    attacks: str | Sequence[str] | None = None,
    defenses: str | Sequence[str] | None = None,
    knows: str | Sequence[str] | None = None,
    unaware: bool | None = None,
    prior: str | None = None,
    bn_knowledge: str | None = None,
    server: str | None = None,
    view: str | None = None,
    clients_in_sum: int | Sequence[int] | None = None,
    colluding: int | None = None,
    targets: int | None = None,
    clients: int | None = None,
    seed: int | None = None,
    budget: str | None = None,
    ceiling: bool | None = None,
    bounds: bool | None = None,
    device: str | None = None,
    workers: int | None = None,
    memory: float | None = None,
    ray: str | None = None,
    out: str | Path | None = None,
    cost: str | Sequence[str] | None = None,
    fail_on: str | Sequence[str] | None = None,
    recorded: str | Path | None = None,
    truth: str | Path | None = None,
    data_spec: str | Path | None = None,
) -> LeakageReport:
    """Simulate clients, attack their updates with and without protections, and write a report.

    Every argument is an option of `gradleak audit` and means the same; None takes the default.
    `none` is always added to the protections. With `recorded`, what a server kept of real clients
    is attacked instead. Calling again with equal arguments resumes.

    Raises:
        InvalidInput: an argument makes no sense; the message is one line.
    """
    arguments = {
        "data": data,
        "data_dir": data_dir,
        "model": model,
        "weights": weights,
        "stage": stage,
        "mechanism": mechanism,
        "local_steps": local_steps,
        "local_learning_rate": local_learning_rate,
        "batch_norm": batch_norm,
        "batch_size": batch_size,
        "attack": attacks,
        "defense": defenses,
        "knows": knows,
        "unaware": unaware,
        "prior": prior,
        "bn_knowledge": bn_knowledge,
        "server": server,
        "view": view,
        "clients_in_sum": clients_in_sum,
        "colluding": colluding,
        "targets": targets,
        "clients": clients,
        "seed": seed,
        "budget": budget,
        "ceiling": ceiling,
        "bounds": bounds,
        "device": device,
        "workers": workers,
        "memory": memory,
        "ray": ray,
        "out": out,
        "cost": cost,
        "fail_on": fail_on,
    }
    given = {name: value for name, value in arguments.items() if value is not None}
    own = {"recorded": recorded, "truth": truth, "data_spec": data_spec}
    if recorded is not None:
        from gradleak.recorded_audit import RecordedAudit, run_recorded

        return run_recorded(RecordedAudit.of(given | {k: v for k, v in own.items() if v}))
    check_unrecorded(name for name, value in own.items() if value is not None)
    return run_audit(AuditSettings.of(given), given=given)


def check_unrecorded(given: Iterable[str]) -> None:
    """Refuse options that make sense for a recording alone."""
    for name in given:
        if name in ("truth", "data_spec"):
            raise InvalidInput(f"{option(name)}: expected --recorded, the directory of a recording")


def run_audit(
    settings: AuditSettings,
    *,
    given: Iterable[str] = (),
    watcher: Watcher | None = None,
    undefended: bool = True,
    verb: str = "audit",
) -> LeakageReport:
    """Run an audit, or what is left of it, and write its report.

    Args:
        settings: what is asked for.
        given: names of the settings that were given, for the record.
        watcher: told how far it is.
        undefended: add `none` to the protections.
        verb: command that the report names for repeating it.

    Raises:
        InvalidInput: the request makes no sense.
        WorkersFailed: worker processes do not start.
    """
    from gradleak.report import costs

    started = time.monotonic()
    given = list(given)
    watcher = watcher or Unwatched()
    if undefended and "none" not in settings.defense:
        settings = dataclasses.replace(settings, defense=("none", *settings.defense))
    check_names(settings)
    directory = Path(settings.out)
    watcher.preparing("loading data")
    load_data.cache_clear()  # a folder may have changed since an earlier run in this process
    dataset = load_data(settings.data, settings.data_dir)
    division = divide(dataset, settings.seed)
    network = models.build(settings.model, dataset.spec, seed=derive(settings.seed, "model"))
    check_network(network, core_of(settings), name=f"--model {settings.model}")
    # Says what does not fit before anything is written; the states are not needed for that.
    unprepared = dict.fromkeys(_stages(settings), Broadcast("", ""))
    jobs = plan(settings, dataset, division, states=unprepared)
    check_directory(directory)
    costs.check(settings.cost)
    resident = dataset.images.nbytes + dataset.labels.nbytes
    resident += 4 * len(division.public) * dataset.images[0].numel()  # the public half in float32
    arrange = functools.partial(
        arranged_jobs,
        settings,
        state=ModelState.of(network),
        spec=dataset.spec,
        resident=resident,
    )
    if not (directory / RESULT).exists():
        _check_cluster(settings)
        arrange(jobs)
    with Store(directory) as store:
        prepared = _prepare_states(settings, network, dataset, division, watcher=watcher)
        belief, auditors = _prepare_priors(settings, dataset, division, watcher=watcher)
        jobs = plan(settings, dataset, division, states=prepared, belief=belief, auditors=auditors)
        described = settings.describe(given)
        for side in described.values():
            if "prior" in side:
                side["prior"] = belief and belief.spec
                side["prior_digest"] = belief and belief.digest
        return carry_out(
            settings,
            jobs,
            store,
            watcher=watcher,
            arrange=arrange,
            started=started,
            about={
                "command": command_line(settings, given, verb=verb),
                "settings": described,
                "not_tested": not_tested(settings),
            },
        )


def carry_out(
    settings: AuditSettings,
    jobs: Sequence[JobSpec],
    store: Store,
    *,
    watcher: Watcher,
    arrange: Callable[[Sequence[JobSpec]], Arrangement],
    started: float,
    about: Mapping[str, Any],
) -> LeakageReport:
    """Run the jobs that the store lacks, and write `result.json` and `report.html`.

    Args:
        settings: how to run.
        jobs: all of the audit.
        store: open in the audit's directory.
        watcher: told how far it is.
        arrange: makes jobs fit into memory.
        started: when the audit began, on the monotonic clock.
        about: what the result says of the request.
    """
    from gradleak.report import costs
    from gradleak.report.html import render

    clock = _Clock(started, store, jobs)
    _run(settings, jobs, store, watcher=watcher, arrange=arrange, clock=clock)
    records = [store.records[job.key] for job in jobs]
    watcher.preparing("writing the report")
    result = _result(settings, records, about=about, seconds=clock())
    write_whole(store.directory / RESULT, jsonsafe.dumps(result, indent=1) + "\n")
    if settings.cost:
        costs.keep(store.directory, settings.cost)
    render(store.directory)
    return LeakageReport(store.directory, result)


def command_line(settings: AuditSettings, given: Iterable[str], *, verb: str = "audit") -> str:
    """The command that repeats a run."""
    words = ["gradleak", verb]
    names = {name.replace("-", "_") for name in given}
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if field.name not in names or value is None or value is False:
            continue
        if verb == "attack" and field.name == "attack":
            words[2:2] = list(value)
        elif value is True:
            words.append(option(field.name))
        elif field.name == "knows":
            lacking = [f"no-{fact}" for fact in KNOWN_BY_DEFAULT if fact not in value]
            words += [option(field.name), ",".join([*value, *lacking])]
        else:
            for each in value if isinstance(value, tuple) else (value,):
                words += [option(field.name), str(each)]
    return shlex.join(words)


def check_names(settings: AuditSettings) -> None:
    """Find slips of the keyboard before any file is read."""
    device_of(settings)
    for spec in settings.attack:
        check_server(spec, settings.server)
        attack_spec(spec, budget=settings.budget)
    models.check_task(settings.model, core_of(settings))
    for spec in settings.defense:
        _protected(settings, defense_spec(spec)[1])
    prior_spec(settings.prior)
    for condition in settings.fail_on:
        asked = Condition.parse(condition).defense
        if asked is not None and asked not in {defense_spec(s)[0] for s in settings.defense}:
            raise InvalidInput(f"--fail-on {condition!r}: {asked!r} is not among the protections")
    if settings.ray is not None and importlib.util.find_spec("ray") is None:
        raise InvalidInput(
            f"--ray {settings.ray!r} needs Ray, which is not installed: pip install 'gradleak[ray]'"
        )
    states.check_stages(_stages(settings))
    states.file_of(settings.weights)


def core_of(settings: AuditSettings) -> Mechanism:
    """The clients' training without protections."""
    return undefended(_protected(settings, "none"))


def _protected(settings: AuditSettings, defense: str) -> Mechanism:
    try:
        return client_of(
            settings.mechanism,
            local_steps=settings.local_steps,
            local_learning_rate=settings.local_learning_rate,
            batch_norm=settings.batch_norm,
            defense=defense,
        )
    except NotApplicable as reason:
        raise InvalidInput(f"--defense {reason}") from None


def _stages(settings: AuditSettings) -> tuple[str, ...]:
    if settings.weights is not None:
        return (states.GIVEN,)
    return tuple(dict.fromkeys(settings.stage or ("init",)))


def check_directory(directory: Path) -> None:
    """Refuse to write over a `result.json` that is not ours."""
    path = directory / RESULT
    if not path.exists():
        return
    try:
        ours = "gradleak_version" in read_json(path)
    except (CorruptFile, TypeError):
        ours = False
    if not ours:
        raise InvalidInput(
            f"{str(path)!r} was not written by gradleak: choose another --out, or move it away"
        )


def _prepare_states(
    settings: AuditSettings,
    network: torch.nn.Module,
    dataset: Dataset,
    division: Split,
    *,
    watcher: Watcher,
) -> dict[str, Broadcast]:
    core = core_of(settings)
    client = None
    if isinstance(core, Diffusing):
        client = dataclasses.replace(one_step(core), bounds=dataset.spec.bounds)
    return {
        stage: states.prepare(
            network,
            dataset,
            division.public,
            stage=stage,
            weights=states.file_of(settings.weights),
            seed=derive(settings.seed, "training"),
            client=client,
            directory=Path(settings.out),
            progress=lambda step, steps, stage=stage: watcher.preparing(  # type: ignore[misc]
                f"training {settings.model} to stage {stage}: step {step} of {steps}"
            ),
        )
        for stage in _stages(settings)
    }


def _prepare_priors(
    settings: AuditSettings, dataset: Dataset, division: Split, *, watcher: Watcher
) -> tuple[Belief | None, Belief | None]:
    """The attackers' prior and the auditor's; the latter is Gaussian."""

    def fit(spec: str) -> Belief:
        watcher.preparing(f"fitting the prior {spec}")
        return fitted(
            spec,
            dataset,
            division.public,
            seed=derive(settings.seed, "prior"),
            directory=Path(settings.out),
        )

    usable = settings.prior if has_precision(settings.prior) else "gaussian"
    return (
        fit(settings.prior) if settings.grants_prior else None,
        fit(usable) if settings.bounds else None,
    )


def arranged_jobs(
    settings: AuditSettings,
    jobs: Sequence[JobSpec],
    *,
    state: ModelState,
    spec: DataSpec,
    resident: int,
) -> Arrangement:
    """Make the jobs fit into memory beside `resident` bytes of data, or refuse."""
    device = jobs[0].device
    needs = [
        needed(
            build_attack(job.attack_spec),
            summed(mechanism_of(job), job.honest),
            state,
            spec,
            batch_size=job.examples,
            targets=len(job.targets) + (job.spare is not None),
            data=resident,
        )
        for job in jobs
    ]
    return arranged(
        needs,
        workers=settings.workers,
        most_workers=1 if device == "cuda" else min(len(jobs), cores()),
        free=None if settings.ray else free_memory(settings.memory, device=device),
    )


def _run(
    settings: AuditSettings,
    jobs: Sequence[JobSpec],
    store: Store,
    *,
    watcher: Watcher,
    arrange: Callable[[Sequence[JobSpec]], Arrangement],
    clock: Callable[[], float],
) -> None:
    """Run the jobs that the store lacks. Jobs that ended in an error get another chance."""
    left = [j for j in jobs if store.records.get(j.key, {"state": "error"})["state"] == "error"]
    total = targets_of(jobs)
    resumed = total - targets_of(left)
    if not left:
        return
    arrangement = arrange(left)
    watcher.planned(str(arrangement))
    left = [
        dataclasses.replace(j, trials_at_once=most)
        for j, most in zip(left, arrangement.together, strict=True)
    ]
    engines = _Engines(store.directory / ENGINES)
    left = [dataclasses.replace(j, engine=engines.of(j, watcher=watcher)) for j in left]
    done = float(resumed)
    shares: dict[str, float] = {}

    def progress(job: JobSpec, share: float) -> None:
        shares[job.key] = share * len(job.targets)
        watcher.running(done + sum(shares.values()), total=total, resumed=resumed)

    by_key = {job.key: job for job in left}
    with (
        _cluster(settings, watcher=watcher),
        contextlib.closing(
            _trials(settings, left, workers=arrangement.workers, progress=progress)
        ) as trials,
    ):
        watcher.running(done, total=total, resumed=resumed)
        for trial in trials:
            store.append(trial.record | {"elapsed": clock()}, tensors=trial.tensors)
            key = trial.record["key"]
            shares.pop(key, None)
            done += len(by_key[key].targets)
            watcher.running(done + sum(shares.values()), total=total, resumed=resumed)


def _trials(
    settings: AuditSettings,
    jobs: Sequence[JobSpec],
    *,
    workers: int | None,
    progress: Progress[JobSpec],
) -> Generator[Trial]:
    if settings.ray is not None:
        from gradleak.run.on_ray import run_on_ray

        return run_on_ray(jobs, workers=workers, progress=progress)
    if not workers:
        return run_here(jobs, TRIALS, progress=progress)
    return run_in_processes(jobs, TRIALS, workers=min(workers, len(jobs)), progress=progress)


def _check_cluster(settings: AuditSettings) -> None:
    """Find a wrong address before anything is done; a finished run needs no cluster."""
    if settings.ray is not None:
        from gradleak.run.on_ray import check

        check(settings.ray)


@contextlib.contextmanager
def _cluster(settings: AuditSettings, *, watcher: Watcher) -> Iterator[None]:
    """Be connected to the Ray cluster of a run, if it asks for one."""
    if settings.ray is None:
        yield
        return
    from gradleak.run.on_ray import connected

    watcher.preparing(f"connecting to Ray at {settings.ray}")
    with connected(settings.ray, workers=settings.workers or cores()):
        yield


class _Clock:
    """Seconds that a run has taken, its earlier parts included: records tell how far these came."""

    def __init__(self, started: float, store: Store, jobs: Sequence[JobSpec]) -> None:
        known = (store.records.get(job.key, {}) for job in jobs)
        self._zero = started - max((r.get("elapsed", 0.0) for r in known), default=0.0)

    def __call__(self) -> float:
        return time.monotonic() - self._zero


class _Engines:
    """How each attack is vectorised in this run, measured once."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: dict[str, Engine] = read_json(path) if path.exists() else {}

    def of(self, job: JobSpec, *, watcher: Watcher) -> Engine:
        size = len(job.targets) + (job.spare is not None)
        kind = "/".join(
            map(str, (job.attack_spec, job.defense_spec, job.model, job.data_fingerprint,
                      job.mechanism, job.local_steps, job.batch_norm, ",".join(job.knows),
                      job.prior, job.batch_size, job.honest, size, job.device))
        )  # fmt: skip
        if kind not in self._known:
            watcher.preparing(f"measuring how {job.attack} runs fastest")
            threads = torch.get_num_threads()
            torch.set_num_threads(1)
            try:
                self._known[kind] = settle_engine(job)
            finally:
                torch.set_num_threads(threads)
            write_whole(self._path, jsonsafe.dumps(self._known, indent=1) + "\n")
        return self._known[kind]


def _result(
    settings: AuditSettings,
    records: Sequence[Mapping[str, Any]],
    *,
    about: Mapping[str, Any],
    seconds: float,
) -> dict[str, Any]:
    from gradleak.report.findings import findings, headline

    found = findings(records)
    conditions = [Condition.parse(text) for text in settings.fail_on]
    held = {c.text: c.holding(found) for c in conditions}
    return {
        "schema_version": SCHEMA_VERSION,
        "gradleak_version": version(),
        "headline": headline(found),
        **about,
        "environment": environment(device_of(settings)),
        "seconds": seconds,
        "fail_on": [
            {"condition": c.text, "holds": bool(held[c.text]), "findings": held[c.text]}
            for c in conditions
        ],
        "failed": list(dict.fromkeys(r["finding"] for r in records if r["state"] == "error")),
        "findings": found,
    }


def not_tested(settings: AuditSettings) -> list[str]:
    """What an audit leaves open, in words."""
    ran = {spec.partition(":")[0] for spec in settings.attack}
    tried = {part.partition(":")[0] for spec in settings.defense for part in spec.split("+")}
    unknown = sorted(set(map(str, Fact)) - set(settings.knows))
    stages = _stages(settings)
    untried = sorted(DEFENSES.keys() - tried)
    left = [
        f"Attacks: {', '.join(sorted(ATTACKS.keys() - ran))}" if ATTACKS.keys() - ran else "",
        "Attacks that gradleak does not have: a verdict holds for the attacks that were run",
        f"Protections: {', '.join(untried)}" if untried else "",
        f"Stages of training other than {', '.join(stages)}",
        f"Batch sizes other than {', '.join(map(str, settings.batch_size))}",
        f"Attackers who also know: {', '.join(unknown)}" if unknown else "",
        "A server that alters what it broadcasts" if settings.server == "honest" else "",
        "Servers that see only a sum of updates (secure aggregation)"
        if settings.view == "client"
        else f"Sums of other than {', '.join(map(str, settings.sums))} clients",
        "Attackers who combine several rounds of one client",
        f"Priors other than {settings.prior}" if settings.grants_prior else "",
    ]
    return [text for text in left if text]


def environment(device: str) -> dict[str, Any]:
    """What a run ran on, for the record."""
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": cores(),
        "threads_per_worker": 1,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
    }


def cores() -> int:
    """Cores this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on every system
        return os.cpu_count() or 1
