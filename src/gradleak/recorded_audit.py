"""The audit of a recording: attacks on what a server kept of real clients."""

from __future__ import annotations

import functools
import itertools
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gradleak import models, registry
from gradleak.auditing import (
    LeakageReport,
    Unwatched,
    Watcher,
    arranged_jobs,
    carry_out,
    check_directory,
    check_names,
    command_line,
    not_tested,
)
from gradleak.errors import InvalidInput
from gradleak.run import states
from gradleak.run.jobs import (
    BANK,
    UNAWARE,
    JobSpec,
    attack_spec,
    client_of,
    defense_spec,
    derive,
    device_of,
    groups,
)
from gradleak.run.recorded import read_data_spec
from gradleak.run.recordings import Entry, read_exchange, read_recording, read_truth
from gradleak.run.replies import read_pool, store_pool, store_updates
from gradleak.run.settings import LOCAL, AuditSettings, option
from gradleak.run.store import Store
from gradleak.run.trial import divide, load_data
from gradleak.types import Batch, DataSpec, Fact, ModelState

_OWN = ("recorded", "truth", "data_spec")
_SHARED = (
    "data", "data_dir", "model", "mechanism", "local_steps", "local_learning_rate", "batch_norm",
    "batch_size", "attack", "defense", "knows", "server", "targets", "seed", "budget", "ceiling",
    "device", "workers", "memory", "out", "fail_on", "quiet",
)  # fmt: skip
_GRANTED = {str(Fact.BATCH_SIZE), str(Fact.MECHANISM), str(Fact.LABELS)}


@dataclass(frozen=True)
class RecordedAudit:
    """What to attack, and with what to score it.

    Attributes:
        recorded: directory of the recording.
        settings: the options shared with an audit; `targets` is the most replies of a round.
        data_spec: TOML file with the public form of the data; None takes it from `settings.data`.
        truth: safetensors file of what the clients trained on; None claims without scoring.
        given: names of the options that were given.
    """

    recorded: Path
    settings: AuditSettings
    data_spec: Path | None
    truth: Path | None
    given: tuple[str, ...]

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> RecordedAudit:
        """Build from option names.

        Raises:
            InvalidInput: something is missing, or contradicts a recording.
        """
        given = {name.replace("-", "_"): value for name, value in given.items()}
        for name in given:
            if name not in (*_OWN, *_SHARED):
                raise InvalidInput(
                    f"{option(name)} contradicts --recorded: it belongs to simulated clients"
                )
        if "model" not in given:
            raise InvalidInput("--recorded also needs --model, a name or module:factory")
        if "data" not in given and ("truth" in given or "data_spec" not in given):
            why = (
                "--truth also needs --data, public examples for guess and candidates"
                if "truth" in given
                else "--recorded also needs --data-spec, or --data of the same form"
            )
            raise InvalidInput(why)
        shared = {"defense": "none"} | {k: v for k, v in given.items() if k in _SHARED}
        settings = AuditSettings.of(shared)
        for name, what in (("batch_size", "size"), ("defense", "protection, joined by + if many")):
            if len(getattr(settings, name)) != 1:
                raise InvalidInput(f"{option(name)}: expected the one {what} of the clients")
        for fact in sorted(set(settings.knows) - _GRANTED):
            raise InvalidInput(f"--knows {fact} contradicts --recorded: no recording tells it")
        if Fact.LABELS in settings.knows and "truth" not in given:
            raise InvalidInput("--knows labels: expected --truth, which holds them")
        if Fact.BATCH_SIZE not in settings.knows:
            raise InvalidInput("--knows no-batch_size contradicts --recorded: expected it known")
        if settings.mechanism in LOCAL and not {"local_steps", "local_learning_rate"} <= set(given):
            raise InvalidInput(
                f"--mechanism {settings.mechanism}: expected the clients' --local-steps and "
                "--local-learning-rate"
            )
        return cls(
            Path(given["recorded"]),
            settings,
            Path(given["data_spec"]) if "data_spec" in given else None,
            Path(given["truth"]) if "truth" in given else None,
            tuple(given),
        )


def run_recorded(request: RecordedAudit, *, watcher: Watcher | None = None) -> LeakageReport:
    """Attack every recorded update, round by round, aware and unaware of the protection.

    Raises:
        InvalidInput: the request makes no sense, or a file does not fit it.
    """
    started = time.monotonic()
    settings, watcher = request.settings, watcher or Unwatched()
    check_names(settings)
    watcher.preparing("reading the recording")
    spec = _spec(request)
    network = models.build(settings.model, spec, seed=derive(settings.seed, "model"))
    rounds = _rounds(request, network)
    entries = [reply.entry for group in rounds for reply in group]
    truths = (
        read_truth(request.truth, entries, spec, batch_size=settings.batch_size[0])
        if request.truth is not None
        else None
    )
    directory = Path(settings.out)
    check_directory(directory)
    with Store(directory) as store:
        pool = None if truths is None else _pool(settings, truths, spec, directory)
        jobs = list(_jobs(settings, rounds, network, spec, pool))
        resident = sum(v.nbytes for r in itertools.chain(*rounds) for v in r.update.values())
        given = [name for name in request.given if name in _SHARED]
        own = [w for n in _OWN if (v := getattr(request, n)) for w in (option(n), str(v))]
        described = settings.describe(given)
        for side in described.values():
            for name in side.keys() - set(_SHARED):
                del side[name]
        described["given"] |= {n: str(v) for n in _OWN if (v := getattr(request, n))}
        return carry_out(
            settings,
            jobs,
            store,
            watcher=watcher,
            arrange=functools.partial(
                arranged_jobs,
                settings,
                state=ModelState.of(network),
                spec=spec,
                resident=resident,
            ),
            started=started,
            about={
                "recorded": {"replies": len(entries), "rounds": len(rounds)},
                "command": f"{command_line(settings, given)} {shlex.join(own)}",
                "settings": described,
                "not_tested": [t for t in not_tested(settings) if not t.startswith("Stages")]
                + ["Rounds and clients that were not recorded"],
            },
        )


@dataclass(frozen=True)
class _Reply:
    target: int
    stage: str
    entry: Entry
    state: ModelState
    update: dict[str, Tensor]
    buffers: dict[str, Tensor]


def _spec(request: RecordedAudit) -> DataSpec:
    """The form of the data, from a file or from public examples."""
    named = None if request.data_spec is None else read_data_spec(request.data_spec)
    if "data" not in request.given:
        assert named is not None
        return named
    load_data.cache_clear()  # a folder may have changed since an earlier run in this process
    spec = load_data(request.settings.data, request.settings.data_dir).spec
    form = (spec.shape, spec.bounds, spec.classes)
    if named is not None and (named.shape, named.bounds, named.classes) != form:
        raise InvalidInput(
            f"--data-spec tells {named.shape} in {named.bounds} of {named.classes} classes, "
            f"--data {spec.shape} in {spec.bounds} of {spec.classes}: expected equal forms"
        )
    return named or spec


def _rounds(request: RecordedAudit, network: nn.Module) -> list[list[_Reply]]:
    """All that is attacked, grouped by the state that was sent."""
    settings = request.settings
    kind = client_of(
        settings.mechanism,
        local_steps=settings.local_steps,
        local_learning_rate=settings.local_learning_rate,
        batch_norm=settings.batch_norm,
        defense=settings.defense[0],
    ).kind
    entries = read_recording(request.recorded)
    runs = {entry.run for entry in entries}
    grouped: dict[tuple[str, int, str], list[Entry]] = {}
    for entry in entries:
        if entry.kind != kind:
            want = "fedavg with its steps and rate" if entry.kind == "delta" else "fedsgd"
            raise InvalidInput(
                f"--mechanism {settings.mechanism}: the recording holds a {entry.kind} of each "
                f"client, expected {want}"
            )
        grouped.setdefault((entry.run, entry.round, entry.broadcast), []).append(entry)
    stages: dict[str, int] = {}
    rounds: list[list[_Reply]] = []
    number = itertools.count()
    for (run, place, _), group in grouped.items():
        stage = f"round-{place}" if len(runs) == 1 else f"run-{run}-round-{place}"
        stages[stage] = stages.get(stage, 0) + 1
        stage += f"-state-{stages[stage]}" if stages[stage] > 1 else ""
        replies = []
        for entry in group[: settings.targets]:
            state, update, buffers = read_exchange(request.recorded, entry, network)
            if not any(bool(v.any()) for v in update.values()):
                raise InvalidInput(
                    f"{str(request.recorded / entry.reply)!r}: the update is zero, it shows nothing"
                )
            replies.append(_Reply(next(number), stage, entry, state, update, buffers))
        rounds.append(replies)
    return rounds


def _pool(
    settings: AuditSettings, truths: Sequence[Batch], spec: DataSpec, directory: Path
) -> tuple[str, int]:
    """Store truths, fellow candidates and public examples, no picture twice.

    Returns:
        The file, and how many of its examples are private.
    """
    dataset = load_data(settings.data, settings.data_dir)
    division = divide(dataset, settings.seed)
    private = {_print(x) for batch in truths for x in batch.inputs}

    def others(indices: Tensor) -> Batch:
        batch = dataset.batch(indices)
        new = torch.tensor([_print(x) not in private for x in batch.inputs])
        return Batch(batch.inputs[new], batch.labels[new])

    count = sum(map(len, truths))
    fellows = others(division.clients)
    more = max(0, BANK - count)
    fellows = Batch(fellows.inputs[:more], fellows.labels[:more])
    path, _ = store_pool(directory, truths, [fellows, others(division.public)], spec)
    return path, count + len(fellows)


def _print(image: Tensor) -> bytes:
    """An image to eight bits: what tells that two are one."""
    return image.mul(255).round().to(torch.uint8).numpy().tobytes()


def _jobs(
    settings: AuditSettings,
    rounds: Sequence[Sequence[_Reply]],
    network: nn.Module,
    spec: DataSpec,
    pool: tuple[str, int] | None,
) -> list[JobSpec]:
    directory = Path(settings.out)
    (given,) = settings.defense
    defense, full_defense = defense_spec(given)
    (batch_size,) = settings.batch_size
    data = "" if pool is None else str(directory / pool[0])
    aware = [True, False] if defense != "none" else [True]
    knowing = [k for k in aware if not k or Fact.MECHANISM in settings.knows] or [False]
    name = settings.data if pool is not None else "recorded"
    jobs = []
    for replies, attack, known in itertools.product(rounds, settings.attack, knowing):
        stage = replies[0].stage
        state = states.keep(replies[0].state, network, directory)
        full_attack = attack_spec(attack, budget=settings.budget)
        where = (name, settings.model, stage, f"{settings.mechanism}-b{batch_size}")
        finding = "/".join((*where, given, attack)) + ("" if known else UNAWARE)
        facts = set(settings.knows) - {str(Fact.MECHANISM)}
        for number, members in enumerate(groups(len(replies))):
            chosen = [replies[i] for i in members]
            updates, digest = store_updates(
                directory, {r.target: (r.update, r.buffers) for r in chosen}, spec
            )
            jobs.append(
                JobSpec(
                    finding=finding,
                    directory=settings.out,
                    data=data,
                    data_name=name,
                    data_dir=None,
                    data_fingerprint=read_pool(Path(data)).fingerprint if data else "",
                    model=settings.model,
                    stage=stage,
                    state=state.path,
                    state_digest=state.digest,
                    mechanism=settings.mechanism,
                    local_steps=settings.local_steps,
                    local_learning_rate=settings.local_learning_rate,
                    batch_norm=settings.batch_norm,
                    batch_size=batch_size,
                    attack=registry.split_spec(full_attack)[0],
                    attack_spec=full_attack,
                    defense=defense,
                    defense_spec=full_defense,
                    knows=tuple(sorted(facts | ({str(Fact.MECHANISM)} if known else set()))),
                    prior=None,
                    prior_file=None,
                    prior_digest=None,
                    bn_knowledge=settings.bn_knowledge,
                    server=settings.server,
                    seed=settings.seed,
                    group=number,
                    targets=tuple(r.target for r in chosen),
                    clients=tuple(int(r.entry.node) for r in chosen),
                    spare=None,
                    bank=0 if pool is None else pool[1],
                    ceiling=settings.ceiling,
                    bounds_file=None,
                    bounds_digest=None,
                    updates=updates,
                    updates_digest=digest,
                    device=device_of(settings),
                ).keyed()
            )
    return jobs
