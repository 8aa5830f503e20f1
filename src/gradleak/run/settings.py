"""What a run is asked to do: every option of `gradleak audit`, each also a key of `--config`."""

from __future__ import annotations

import dataclasses
import re
import tomllib
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from gradleak import registry
from gradleak.errors import CorruptFile, InvalidInput, nearest
from gradleak.mechanisms import MECHANISMS, DenoisingAvg, Diffusing, FedAvg, Vertical
from gradleak.threat import BatchNormKnowledge
from gradleak.types import Fact, View

Budget = Literal["quick", "standard", "thorough"]

TARGETS: Mapping[str, int] = {"quick": 8, "standard": 16, "thorough": 64}
"""Targets of a finding by budget; the attacks keep their own steps by budget."""

CLIENTS_IN_SUM = (1, 2, 4, 8)
"""Clients in a secure sum where none are named: how fast leakage falls with their number."""

ON_DENOISERS = ("gidm", "dlg-dm", "invg-dm")
"""Attacks on diffusion clients whose noise and times are known, as far as they are registered."""

ON_PRIVATE_DENOISERS = ("gidm-plus",)
"""The same where noise and times are private."""

METRIC_NAMES = ("psnr_db", "ssim", "mse", "identified", "label_accuracy")

_LARGEST = 1_000_000
"""Bound on counts: beyond it a request is a slip of the keyboard, not an audit."""

_POSITIVE = ("batch_size", "targets", "clients", "local_steps", "clients_in_sum")


LOCAL: Mapping[str, type[FedAvg]] = {kind.id: kind for kind in (FedAvg, DenoisingAvg)}
"""Mechanisms of local training, which --local-steps and --local-learning-rate are for."""

KNOWN_BY_DEFAULT = ("batch_size", "mechanism")
"""Facts that an attacker has unless they are taken away: Kerckhoffs, and the batch size."""


@dataclass(frozen=True, kw_only=True)
class AuditSettings:
    """One audit, unresolved: None means "decide by the budget and the machine".

    Attributes:
        data: name of a data set, or a path.
        data_dir: where downloaded data sets lie; None takes $GRADLEAK_DATA or the user cache.
        model: name of a network, or `module:factory`.
        weights: safetensors file of the broadcast state instead of an initialisation.
        stage: training stages audited: init, early, trained or a number of steps.
        mechanism: what a client does, `ID:field=value,...`.
        local_steps: local steps of FedAvg, for a mechanism given without fields.
        local_learning_rate: local learning rate of FedAvg, likewise.
        batch_norm: statistics the client normalises by.
        batch_size: examples per client, one finding each.
        attack: attacks, `ID:field=value,...`.
        defense: protections, `ID:field=value,...`; `none` is always added by an audit.
        knows: facts granted to the attacker, all of them; from outside, names add to the default
            and "no-NAME" takes away.
        unaware: attack every protection once more as if there were none.
        prior: what public data say of private inputs, `ID:field=value,...`; used where `knows`
            grants it.
        bn_knowledge: what the attacker knows of batch-normalisation layers.
        server: whether the server may alter the broadcast state.
        view: whether the server sees every update, or only secure sums of them.
        clients_in_sum: clients whose updates are summed, one finding each; with view "aggregate".
        colluding: clients of every sum who tell the server their updates.
        targets: updates attacked per finding.
        clients: clients the targets come from; intervals are clustered by client.
        seed: every random draw derives from it.
        budget: how much work per target.
        ceiling: begin every attack at the truth as well, which only an auditor can: what is found
            there bounds searches that end nearby.
        bounds: what can be foretold of every target without an attack, from Fisher information and
            a prior of public data; the attacks never see it.
        device: where attacks run.
        workers: worker processes; 0 runs in this process.
        memory: GB (10⁹ bytes) that all workers together may use; None takes what is free.
        ray: Ray cluster whose workers run the trials: HOST:PORT, auto, or local to start one.
        out: directory of the report; the same directory resumes.
        cost: directories of `gradleak train`, for what protections cost.
        fail_on: conditions `[DEFENSE:]METRIC OP NUMBER` that give exit status 1.
        quiet: no progress on stderr.
    """

    data: str = "mnist-5k"
    data_dir: str | None = None
    model: str = "lenet"
    weights: str | None = None
    stage: tuple[str, ...] | None = None
    mechanism: str = "fedsgd"
    local_steps: int | None = None
    local_learning_rate: float | None = None
    batch_norm: Literal["eval", "train"] = "eval"
    batch_size: tuple[int, ...] = (1,)
    attack: tuple[str, ...] = ("dlg", "inverting-gradients")
    defense: tuple[str, ...] = (
        "none",
        "gaussian-noise:std=0.01",
        "laplace-noise:std=0.01",
        "top-k:fraction=0.1",
        "clip:norm=1",
    )
    knows: tuple[str, ...] = KNOWN_BY_DEFAULT
    unaware: bool = False
    prior: str = "gaussian"
    bn_knowledge: BatchNormKnowledge = "inferred"
    server: Literal["honest", "malicious"] = "honest"
    view: View = "client"
    clients_in_sum: tuple[int, ...] | None = None
    colluding: int = 0
    targets: int | None = None
    clients: int | None = None
    seed: int = 0
    budget: Budget = "quick"
    ceiling: bool = False
    bounds: bool = False
    device: Literal["auto", "cpu", "cuda"] = "auto"
    workers: int | None = None
    memory: float | None = None
    ray: str | None = None
    out: str = "gradleak-report"
    cost: tuple[str, ...] = ()
    fail_on: tuple[str, ...] = ()
    quiet: bool = False

    def __post_init__(self) -> None:
        for name in _POSITIVE:
            value = getattr(self, name)
            for each in value if isinstance(value, tuple) else (value,):
                if each is not None and not 1 <= each <= _LARGEST:
                    raise InvalidInput(
                        f"{option(name)} {each}: expected a whole number from 1 to {_LARGEST}"
                    )
        if self.workers is not None and not 0 <= self.workers <= 1024:
            raise InvalidInput(f"--workers {self.workers}: expected a number from 0 to 1024")
        if self.workers == 0 and self.ray is not None:
            raise InvalidInput(
                "--workers 0 contradicts --ray: trials run in this process or on a cluster"
            )
        if self.memory is not None and not 0 < self.memory < float("inf"):
            raise InvalidInput(f"--memory {self.memory}: expected a positive number of GB")
        if self.memory is not None and self.ray is not None:
            raise InvalidInput(
                "--memory contradicts --ray: the nodes of a cluster have memory of their own"
            )
        if not 0 <= self.seed < 2**63:
            raise InvalidInput(f"--seed {self.seed}: expected a whole number from 0 to 2^63 − 1")
        rate = self.local_learning_rate
        if rate is not None and not 0 < rate < float("inf"):
            raise InvalidInput(f"--local-learning-rate {rate}: expected a positive number")
        registry.build("mechanism", self.mechanism, MECHANISMS)
        for drawn in (Fact.TIMESTEPS, Fact.NOISE):
            if drawn in self.knows and not trains_denoiser(self.mechanism):
                raise InvalidInput(
                    f"--knows {drawn} contradicts --mechanism {self.mechanism}: expected a client "
                    "that draws noise and times, denoising or denoising-fedavg"
                )
        for name in ("draws", "carried", "bounds"):
            if name in registry.split_spec(self.mechanism)[1]:
                raise InvalidInput(f"--mechanism {self.mechanism}: {name} is not for settings")
        if "batch_norm" in registry.split_spec(self.mechanism)[1]:
            raise InvalidInput(f"--mechanism {self.mechanism}: expected --batch-norm")
        if self.mechanism not in LOCAL:
            for name in ("local_steps", "local_learning_rate"):
                if getattr(self, name) is not None:
                    raise InvalidInput(
                        f"{option(name)} contradicts --mechanism {self.mechanism}: "
                        f"local training needs --mechanism {' or '.join(LOCAL)}"
                    )
        if self.weights is not None and self.stage is not None:
            raise InvalidInput(
                "--weights contradicts --stage: a given state is attacked as it is, choose one"
            )
        for name in ("attack", "batch_size"):
            if not getattr(self, name):
                raise InvalidInput(f"{option(name)} is empty: expected at least one")
        if self.stage == ():
            raise InvalidInput("--stage is empty: expected at least one")
        for fact in self.knows:
            if fact not in set(Fact):
                raise InvalidInput(f"--knows {fact!r}: {nearest(fact, map(str, Fact))}")
        if self.unaware and Fact.MECHANISM not in self.knows:
            raise InvalidInput(
                "--unaware contradicts --knows no-mechanism: no attack knows the protection"
            )
        if self.bn_knowledge in ("running", "none") and Fact.BN_STATISTICS in self.knows:
            raise InvalidInput(
                f"--bn-knowledge {self.bn_knowledge} contradicts --knows bn_statistics: "
                "granted statistics are exact"
            )
        if self.clients is not None and self.clients > self.resolved_targets:
            raise InvalidInput(
                f"--clients {self.clients} contradicts --targets {self.resolved_targets}: "
                "every client is attacked at least once"
            )
        self._check_view()
        for condition in self.fail_on:
            Condition.parse(condition)

    def _check_view(self) -> None:
        if self.view != "aggregate":
            for name in ("clients_in_sum", "colluding"):
                if getattr(self, name):
                    raise InvalidInput(f"{option(name)}: expected --view aggregate")
            return
        if not 0 <= self.colluding < min(self.sums):
            raise InvalidInput(
                f"--colluding {self.colluding}: expected fewer than the {min(self.sums)} clients "
                "of the smallest sum"
            )
        if self.clients is not None:
            raise InvalidInput(
                "--clients contradicts --view aggregate: every sum has clients of its own"
            )
        if registry.split_spec(self.mechanism)[0] == Vertical.id:
            raise InvalidInput("--view aggregate: expected --mechanism fedsgd or fedavg")
        for fact in (Fact.BN_STATISTICS, Fact.MINIBATCH_ORDER, Fact.TIMESTEPS, Fact.NOISE):
            if fact in self.knows and max(self.sums) > 1:
                raise InvalidInput(
                    f"--knows {fact} contradicts --view aggregate: a sum of clients has none"
                )

    @property
    def sums(self) -> tuple[int, ...]:
        """Clients whose updates are seen as one; 1 where every update is seen."""
        if self.view != "aggregate":
            return (1,)
        return tuple(dict.fromkeys(self.clients_in_sum or CLIENTS_IN_SUM))

    @property
    def grants_prior(self) -> bool:
        """Whether attackers are given the prior."""
        return Fact.PRIOR in self.knows

    @property
    def resolved_targets(self) -> int:
        """Targets of a finding, from the budget where not given."""
        return self.targets if self.targets is not None else TARGETS[self.budget]

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> AuditSettings:
        """Build from option names (hyphens or underscores), checking every value's type.

        Raises:
            InvalidInput: an unknown name (the nearest is told), or a value of another type.
        """
        hints = typing.get_type_hints(cls)
        values: dict[str, Any] = {}
        for name, value in given.items():
            known = name.replace("-", "_")
            if known not in hints:
                words = [option(n).removeprefix("--") for n in hints]
                raise InvalidInput(f"unknown setting {name!r}: {nearest(name, words)}")
            if known == "knows":
                value = granted([value] if isinstance(value, str) else value)
            values[known] = _typed(value, hints[known], where=option(known))
        if trains_denoiser(values.get("mechanism", cls.mechanism)):
            values.setdefault("model", "unet")
            values.setdefault("attack", attacks_on_denoisers(values.get("knows", cls.knows)))
        settings = cls(**values)
        if "prior" in values and not (settings.grants_prior or settings.bounds):
            raise InvalidInput(
                f"--prior {settings.prior!r} contradicts --knows: expected --knows prior"
            )
        return settings

    def describe(self, given: Iterable[str]) -> dict[str, Any]:
        """The settings for the record: what was given, and what was defaulted."""
        named = {name.replace("-", "_") for name in given}
        sides: dict[str, dict[str, Any]] = {"given": {}, "defaulted": {}}
        for each in dataclasses.fields(self):
            value = getattr(self, each.name)
            side = "given" if each.name in named else "defaulted"
            sides[side][each.name] = list(value) if isinstance(value, tuple) else value
        return dict(sides)


def granted(listed: Iterable[object]) -> list[str]:
    """The facts known by default, with those listed, without those listed as "no-FACT"."""
    facts = set(KNOWN_BY_DEFAULT)
    for word in (w.strip() for each in listed for w in str(each).split(",")):
        fact = word.removeprefix("no-")
        if fact not in set(Fact):
            raise InvalidInput(f"--knows {word!r}: {nearest(fact, map(str, Fact))}")
        (facts.discard if word.startswith("no-") else facts.add)(fact)
    return sorted(facts)


def trains_denoiser(mechanism: str) -> bool:
    """Whether the notation is of a client that trains a diffusion model."""
    kind = MECHANISMS.get(registry.split_spec(mechanism)[0])
    return kind is not None and issubclass(kind, Diffusing)


def attacks_on_denoisers(knows: Iterable[str]) -> tuple[str, ...]:
    """The attacks of an audit of diffusion clients: those made for them whose needs are granted."""
    from gradleak.attacks import ATTACKS

    granted = {Fact(fact) for fact in knows}
    private = not {Fact.TIMESTEPS, Fact.NOISE} <= granted
    fitting = ON_PRIVATE_DENOISERS if private else ON_DENOISERS
    found = [n for n in fitting if n in ATTACKS and ATTACKS[n].about.needs <= granted]
    return tuple(found) or ("inverting-gradients",)


def option(name: str) -> str:
    """The command-line spelling of a setting."""
    return "--" + name.replace("_", "-")


def read_config(path: Path) -> dict[str, Any]:
    """Read `--config audit.toml`: option names as keys.

    Raises:
        InvalidInput: the file is missing, or holds a table.
        CorruptFile: it is not TOML.
    """
    try:
        with path.open("rb") as file:
            values = tomllib.load(file)
    except OSError as error:
        raise InvalidInput(f"cannot read {str(path)!r}: {error.strerror or error}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise CorruptFile(f"{str(path)!r} is not a TOML file: {reason}") from None
    for name, value in values.items():
        if isinstance(value, dict):
            raise InvalidInput(f"{str(path)!r}: expected option = value, found a table [{name}]")
    return values


@dataclass(frozen=True)
class Condition:
    """A condition of `--fail-on`: `[DEFENSE:]METRIC OP NUMBER`, e.g. `top-k:psnr_db>20`."""

    text: str
    metric: str
    operator: Literal[">", ">=", "<", "<="]
    threshold: float
    defense: str | None = field(default=None)

    @classmethod
    def parse(cls, text: str) -> Condition:
        """Read a condition.

        Raises:
            InvalidInput: another form, or an unknown metric.
        """
        match = re.fullmatch(
            r"\s*(?:(?P<defense>[\w-]+):)?(?P<metric>[\w-]+)\s*(?P<op>>=|<=|>|<)\s*(?P<value>\S+)\s*",
            text,
        )
        if match is None:
            raise InvalidInput(
                f"--fail-on {text!r}: expected [PROTECTION:]METRIC>NUMBER, e.g. 'psnr_db>20'"
            )
        if match["metric"] not in METRIC_NAMES:
            hint = nearest(match["metric"], METRIC_NAMES)
            raise InvalidInput(f"--fail-on {text!r}: unknown metric {match['metric']!r}, {hint}")
        try:
            threshold = float(match["value"])
        except ValueError:
            raise InvalidInput(f"--fail-on {text!r}: {match['value']!r} is not a number") from None
        if threshold != threshold:
            raise InvalidInput(f"--fail-on {text!r}: nan is never reached")
        return cls(
            text,
            match["metric"],
            typing.cast(Literal[">", ">=", "<", "<="], match["op"]),
            threshold,
            match["defense"],
        )

    def holding(self, findings: Sequence[Mapping[str, Any]]) -> list[str]:
        """Ids of the findings whose measured value meets the condition."""
        compare = {
            ">": float.__gt__,
            ">=": float.__ge__,
            "<": float.__lt__,
            "<=": float.__le__,
        }[self.operator]
        held = []
        for finding in findings:
            measured = (finding.get("measurements") or {}).get(self.metric) or {}
            value = measured.get("value")
            if self.defense not in (None, finding["defense"]) or value is None:
                continue
            if compare(float(value), self.threshold):
                held.append(str(finding["id"]))
        return held


def _typed(value: Any, hint: Any, *, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        hint = next(a for a in arguments if a is not type(None))
        origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple:
        items = value if isinstance(value, list | tuple) else [value]
        return tuple(_typed(item, arguments[0], where=where) for item in items)
    if origin is Literal:
        if value not in arguments:
            raise InvalidInput(f"{where} {value!r}: {nearest(str(value), arguments)}")
        return value
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is str and isinstance(value, Path | int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        words = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
        raise InvalidInput(f"{where} {value!r}: expected {words[hint]}")
    return value
