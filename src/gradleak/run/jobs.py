"""The plan of a run: which jobs there are, and the key that names each of them for ever."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from gradleak import registry
from gradleak.attacks import ATTACKS
from gradleak.attacks.parts.objective import Engine
from gradleak.data import Dataset, Split
from gradleak.defenses import DEFENSES, rebased
from gradleak.defenses import build as build_defense
from gradleak.errors import InvalidInput, nearest
from gradleak.mechanisms import MECHANISMS
from gradleak.mechanisms.client import BatchNormMode
from gradleak.run.beliefs import Belief
from gradleak.run.settings import LOCAL, AuditSettings
from gradleak.run.states import Broadcast
from gradleak.threat import ThreatModel
from gradleak.types import Fact, Mechanism, View

LARGEST_GROUP = 8
"""Targets that one job attacks side by side."""

BANK = 100
"""Candidates among which a target must be identified, where the data have as many."""

UNAWARE = " (unaware)"
"""Ends the id of a finding whose attack has an adaptive twin."""

DEFAULT_LOCAL_STEPS = 3
DEFAULT_LOCAL_LEARNING_RATE = 0.01


@dataclass(frozen=True, kw_only=True)
class JobSpec:
    """One job: an attack on a group of targets of one finding. Plain values only.

    Attributes:
        key: names the job by everything that decides its outcome.
        finding: id of the finding it belongs to.
        directory: where the run lies.
        data: name or path of the data set; `data_name` is its public name.
        data_dir: where data sets lie.
        data_fingerprint: content of the data set.
        model: name of the network.
        stage: training stage.
        state: file of the broadcast state, relative to `directory`.
        state_digest: content of the broadcast state.
        mechanism: notation of the mechanism.
        local_steps: of FedAvg.
        local_learning_rate: of FedAvg.
        batch_norm: statistics the client normalises by.
        batch_size: examples per client.
        view: whether single updates are seen, or sums.
        clients_in_sum: whose updates are seen as one.
        colluding: the last ones of these, who tell the server theirs.
        slots: targets among which the private pool is shared out, where there are sums.
        attack: id of the attack; `attack_spec` has every field.
        defense: id of the protection; `defense_spec` has every field.
        knows: facts granted.
        prior: notation of the prior that attackers are given, with every field.
        prior_file: where it lies, relative to `directory`.
        prior_digest: content of that file.
        bn_knowledge: what the attacker knows of batch-normalisation layers.
        server: server behaviour.
        seed: of the run.
        group: number of the group within the finding.
        targets: numbers of the targets; client i of target t holds the examples from
            (i·slots + t)·b to (i·slots + t + 1)·b of the private pool, so that larger sums add
            clients to smaller ones.
        clients: client of each target, or number of the sum.
        spare: a target of another client, attacked for the control alone; None where the group
            has two clients.
        bank: examples of the private pool that form the identification bank.
        ceiling: begin the attack at the truth as well.
        bounds_file: prior by which the auditor scores the targets, relative to `directory`; None
            where another job scores them, or none.
        bounds_digest: content of that file.
        updates: recorded updates that are attacked instead of simulated clients', relative to
            `directory`; `data` is then the pool they are scored with, empty where there is none.
        updates_digest: content of that file.
        device: "cpu" or "cuda".
        engine: how the attack is vectorised.
        trials_at_once: most trials that memory lets step together.
    """

    key: str = ""
    finding: str
    directory: str
    data: str
    data_name: str
    data_dir: str | None
    data_fingerprint: str
    model: str
    stage: str
    state: str
    state_digest: str
    mechanism: str
    local_steps: int | None
    local_learning_rate: float | None
    batch_norm: BatchNormMode
    batch_size: int
    attack: str
    attack_spec: str
    defense: str
    defense_spec: str
    knows: tuple[str, ...]
    prior: str | None
    prior_file: str | None
    prior_digest: str | None
    bn_knowledge: str
    server: str
    seed: int
    group: int
    targets: tuple[int, ...]
    clients: tuple[int, ...]
    spare: int | None
    bank: int
    ceiling: bool
    bounds_file: str | None
    bounds_digest: str | None
    updates: str | None = None
    updates_digest: str | None = None
    device: str
    engine: Engine | None = None
    trials_at_once: int | None = None
    view: View = "client"
    clients_in_sum: int = 1
    colluding: int = 0
    slots: int = 0

    def to_json(self) -> dict[str, Any]:
        """The job as plain JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Inverse of `to_json`."""
        lists = {k: tuple(v) for k, v in values.items() if isinstance(v, list)}
        return cls(**(dict(values) | lists))

    def keyed(self) -> Self:
        """The job with the key that its content gives it.

        Where the run lies and how it is vectorised are no part of what is measured.
        """
        content = self.to_json()
        for name in (
            "key", "directory", "data", "data_dir", "state", "prior_file", "bounds_file",
            "updates", "engine", "trials_at_once",
        ):  # fmt: skip
            del content[name]
        content["version"] = version()
        text = json.dumps(content, sort_keys=True)
        return dataclasses.replace(self, key=hashlib.sha256(text.encode()).hexdigest()[:16])

    @property
    def honest(self) -> int:
        """Clients of a target whose updates the server does not know."""
        return self.clients_in_sum - self.colluding

    @property
    def examples(self) -> int:
        """Private examples of a target."""
        return self.batch_size * self.honest

    def indices(self, target: int, division: Split) -> Tensor:
        """Examples of a target's clients in turn."""
        starts = [(i * self.slots + target) * self.batch_size for i in range(self.clients_in_sum)]
        return torch.cat([division.clients[s : s + self.batch_size] for s in starts])

    @property
    def threat(self) -> ThreatModel:
        """The threat model of the job."""
        return ThreatModel(
            knows=frozenset(Fact(fact) for fact in self.knows),
            server=self.server,  # type: ignore[arg-type]
            view=self.view,
            colluding=self.colluding,
            batch_norm=self.bn_knowledge,  # type: ignore[arg-type]
        )

    def scenario_record(self) -> dict[str, Any]:
        """What the record says on the scenario."""
        scenario: dict[str, Any] = {
            "data": self.data_name,
            "model": self.model,
            "stage": self.stage,
            "mechanism": self.mechanism,
            "batch_size": self.batch_size,
            "batch_norm": self.batch_norm,
        }
        if ":" in self.mechanism:
            scenario["mechanism"] = registry.split_spec(self.mechanism)[0]
            scenario["mechanism_spec"] = self.mechanism
        if self.mechanism in LOCAL:
            scenario["local_steps"] = self.local_steps
            scenario["local_learning_rate"] = self.local_learning_rate
        if self.view == "aggregate":
            scenario["clients"] = self.clients_in_sum
            scenario["honest_clients"] = self.honest
        return scenario


def version() -> str:
    """The installed version of gradleak."""
    return importlib.metadata.version("gradleak")


def derive(seed: int, *names: object) -> int:
    """A seed of its own for one use, so that no two uses share a stream."""
    text = "/".join(map(str, (seed, *names)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def attack_spec(spec: str, *, budget: str) -> str:
    """Complete the notation of an attack with every field; the budget sets those not given.

    Raises:
        InvalidInput: unknown attack or field, or a value that makes no sense.
    """
    attack = registry.build("attack", spec, ATTACKS)
    name, given = registry.split_spec(spec)
    by_budget: Mapping[str, Any] = getattr(ATTACKS[name], "budgets", {}).get(budget, {})
    changes = {field: value for field, value in by_budget.items() if field not in given}
    return registry.describe(dataclasses.replace(attack, **changes))


def check_server(spec: str, server: str) -> None:
    """Refuse an attack that alters the broadcast where the server is honest.

    Raises:
        InvalidInput: it does.
    """
    about = ATTACKS[name].about if (name := registry.split_spec(spec)[0]) in ATTACKS else None
    if about is not None and about.server == "malicious" and server != "malicious":
        raise InvalidInput(
            f"attack {name!r} alters what the server broadcasts: expected --server malicious"
        )


def defense_spec(spec: str) -> tuple[str, str]:
    """The ids of a protection ("a+b" for a composition), and its notation with every field.

    Raises:
        InvalidInput: unknown protection or field, or a value that makes no sense.
    """
    layers = [registry.build("defense", part.strip(), DEFENSES) for part in spec.split("+")]
    ids = "+".join(layer.id for layer in layers)
    return ids, "+".join(registry.describe(layer) for layer in layers)


def client_of(
    mechanism: str,
    *,
    local_steps: int | None,
    local_learning_rate: float | None,
    batch_norm: BatchNormMode,
    defense: str,
) -> Mechanism:
    """The client that settings describe: local training under its protections.

    Args:
        mechanism: notation of local training.
        local_steps: of one of `LOCAL` without fields; None takes the default, as for the rate.
        local_learning_rate: of the same.
        batch_norm: statistics the client normalises by.
        defense: notation of the protections.
    """
    core: Mechanism = registry.build("mechanism", mechanism, MECHANISMS)
    if mechanism in LOCAL:
        core = LOCAL[mechanism](
            steps=local_steps or DEFAULT_LOCAL_STEPS,
            learning_rate=local_learning_rate or DEFAULT_LOCAL_LEARNING_RATE,
        )
    return build_defense(defense)(rebased(core, batch_norm=batch_norm))


DEVICES = ("auto", "cpu", "cuda")


def device_of(settings: AuditSettings) -> str:
    """The device a run uses.

    Raises:
        InvalidInput: CUDA is asked for and absent.
    """
    return chosen_device(settings.device)


def chosen_device(name: str) -> str:
    """The device that "auto", "cpu" or "cuda" stands for here.

    Raises:
        InvalidInput: another word, or CUDA is asked for and absent.
    """
    if name not in DEVICES:
        raise InvalidInput(f"--device {name!r}: {nearest(name, DEVICES)}")
    present = torch.cuda.is_available()
    if name == "cuda" and not present:
        raise InvalidInput("--device cuda: torch finds no CUDA device here, expected cpu or auto")
    return "cuda" if present and name != "cpu" else "cpu"


def groups(targets: int) -> list[range]:
    """Divide targets into groups of nearly equal size, at most `LARGEST_GROUP`."""
    count = -(-targets // LARGEST_GROUP)
    bounds = [targets * i // count for i in range(count + 1)]
    return [range(a, b) for a, b in itertools.pairwise(bounds)]


def plan(
    settings: AuditSettings,
    dataset: Dataset,
    division: Split,
    *,
    states: Mapping[str, Broadcast],
    belief: Belief | None = None,
    auditors: Belief | None = None,
) -> list[JobSpec]:
    """All jobs of a run, in the order in which a reader wants their findings.

    Args:
        settings: what is asked for.
        dataset: loaded data.
        division: its private and public halves.
        states: broadcast state by stage.
        belief: the prior, where attackers are given one.
        auditors: the prior of the auditor's bounds, where these are asked for.

    Raises:
        InvalidInput: an unknown attack or protection, or more targets than there are examples.
    """
    targets = settings.resolved_targets
    clients = settings.clients or targets
    pool = len(division.clients)
    attacks = {spec: attack_spec(spec, budget=settings.budget) for spec in settings.attack}
    defenses = {spec: defense_spec(spec) for spec in settings.defense}
    fedavg = settings.mechanism in LOCAL
    alone = clients == 1
    slots = targets + alone
    jobs = []
    for stage, batch_size, in_sum in _cases(list(states), settings.batch_size, settings.sums):
        needed = slots * batch_size * max(settings.sums)
        if needed > pool:
            each = f"{batch_size} examples"
            if settings.view == "aggregate":
                each += f" of each of {max(settings.sums)} clients"
            raise InvalidInput(
                f"{targets} targets of {each} need {needed} private examples: "
                f"{dataset.name} has {pool}; ask for fewer --targets or a smaller --batch-size"
            )
        for defense, (defense_id, full_defense) in defenses.items():
            beliefs = (True, False) if settings.unaware and defense_id != "none" else (True,)
            for position, (attack, aware) in enumerate(itertools.product(attacks, beliefs)):
                scores = auditors if position == 0 else None
                full_attack = attacks[attack]
                knows = set(settings.knows) - (set() if aware else {Fact.MECHANISM})
                mechanism = f"{settings.mechanism}-b{batch_size}"
                if settings.view == "aggregate":
                    mechanism += f"-n{in_sum}" + f"-k{settings.colluding}" * (
                        settings.colluding > 0
                    )
                finding = "/".join(
                    (dataset.name, settings.model, stage, mechanism, defense, attack)
                ) + ("" if aware else UNAWARE)
                for number, members in enumerate(groups(targets)):
                    owners = tuple(t % clients for t in members)
                    jobs.append(
                        JobSpec(
                            finding=finding,
                            directory=settings.out,
                            data=settings.data,
                            data_name=dataset.name,
                            data_dir=settings.data_dir,
                            data_fingerprint=dataset.fingerprint,
                            model=settings.model,
                            stage=stage,
                            state=states[stage].path,
                            state_digest=states[stage].digest,
                            mechanism=settings.mechanism,
                            local_steps=settings.local_steps or DEFAULT_LOCAL_STEPS
                            if fedavg
                            else None,
                            local_learning_rate=settings.local_learning_rate
                            or DEFAULT_LOCAL_LEARNING_RATE
                            if fedavg
                            else None,
                            batch_norm=settings.batch_norm,
                            batch_size=batch_size,
                            attack=registry.split_spec(attack)[0],
                            attack_spec=full_attack,
                            defense=defense_id,
                            defense_spec=full_defense,
                            knows=tuple(sorted(knows)),
                            prior=belief.spec if belief else None,
                            prior_file=belief.path if belief else None,
                            prior_digest=belief.digest if belief else None,
                            bn_knowledge=settings.bn_knowledge,
                            server=settings.server,
                            seed=settings.seed,
                            group=number,
                            targets=tuple(members),
                            clients=owners,
                            spare=_spare(owners, members, clients=clients, targets=targets),
                            bank=min(pool, max(BANK, needed)),
                            ceiling=settings.ceiling,
                            bounds_file=scores.path if scores else None,
                            bounds_digest=scores.digest if scores else None,
                            device=device_of(settings),
                            view=settings.view,
                            clients_in_sum=in_sum,
                            colluding=settings.colluding,
                            slots=slots if in_sum > 1 else 0,
                        ).keyed()
                    )
    return jobs


def mechanism_of(job: JobSpec) -> Mechanism:
    """The client of a job: local training under its protections."""
    return client_of(
        job.mechanism,
        local_steps=job.local_steps,
        local_learning_rate=job.local_learning_rate,
        batch_norm=job.batch_norm,
        defense=job.defense_spec,
    )


def adaptive(job: JobSpec) -> bool:
    """Whether the attacker knows the protection (trivially so where there is none)."""
    return job.defense == "none" or Fact.MECHANISM in job.knows


def _cases(
    stages: Sequence[str], sizes: Sequence[int], sums: Sequence[int]
) -> Iterator[tuple[str, int, int]]:
    return itertools.product(stages, dict.fromkeys(sizes), sums)


def _spare(owners: tuple[int, ...], members: range, *, clients: int, targets: int) -> int | None:
    """A target of another client for a group that lies within one client."""
    if len(set(owners)) > 1:
        return None
    if clients == 1:
        return targets
    return next(t for t in range(targets) if t % clients != owners[0])
