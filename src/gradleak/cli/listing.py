"""What there is: attacks, label rules, protections, priors, networks, data, protocols, papers."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

from rich.table import Table

from gradleak import jsonsafe
from gradleak.cli.tables import console
from gradleak.errors import InvalidInput, nearest


def attacks() -> list[dict[str, Any]]:
    """Every attack with its paper and what it needs."""
    from gradleak.attacks import ATTACKS

    return [
        {
            "id": about.id,
            "title": about.title,
            "paper": about.paper,
            "link": about.link,
            "modalities": sorted(about.modalities),
            "needs": sorted(about.needs),
            "likelihood": about.likelihood,
            "prior": about.prior,
            "server": about.server,
            "networks": "classifiers" if about.classifiers else "any",
            "deviations": list(about.deviations),
            "fields": _fields(attack),
        }
        for attack in ATTACKS.values()
        for about in (attack.about,)
    ]


def labels() -> list[dict[str, Any]]:
    """Every rule of label recovery with its paper and what it assumes."""
    from gradleak.attacks.labels import LABEL_RULES

    return [
        {**dataclasses.asdict(rule.about), "fields": _fields(rule)} for rule in LABEL_RULES.values()
    ]


def defenses() -> list[dict[str, Any]]:
    """Every protection with its fields and its data sheet."""
    from gradleak.defenses import DEFENSES

    return [
        {
            "id": name,
            "title": defense.title,
            "about": (inspect.getdoc(defense) or "").partition("\n")[0],
            "fields": _fields(defense),
            **dataclasses.asdict(defense.sheet),
        }
        for name, defense in DEFENSES.items()
    ]


def priors() -> list[dict[str, Any]]:
    """Every prior with its fields."""
    from gradleak.priors import PRIORS, TRAINED, load

    trained = [
        {
            "id": name,
            "title": f"{load(path).title}, trained",
            "proper": False,
            "about": f"A trained prior; {path.with_suffix('.md').name} tells how.",
            "fields": {},
        }
        for name, path in TRAINED.items()
    ]
    return [
        {
            "id": name,
            "title": family.title,
            "proper": family.proper,
            "about": (inspect.getdoc(family) or "").partition("\n")[0],
            "fields": _fields(family),
        }
        for name, family in PRIORS.items()
    ] + trained


def models() -> list[dict[str, Any]]:
    """Every built-in network."""
    from gradleak.models import MODELS

    return [
        {
            "id": about.id,
            "title": about.title,
            "task": "denoises" if about.denoiser else "classifies",
            "batch_norm": about.batch_norm,
        }
        for about in MODELS.values()
    ] + [{"id": "module:factory", "title": "Your own network", "task": None, "batch_norm": None}]


def mechanisms() -> list[dict[str, Any]]:
    """Every way of training that a client may have, with its fields."""
    from gradleak.mechanisms import MECHANISMS, Diffusing

    return [
        {
            "id": name,
            "about": (inspect.getdoc(kind) or "").partition("\n")[0],
            "trains": "denoisers" if issubclass(kind, Diffusing) else "classifiers",
            "fields": {
                k: v
                for k, v in _fields(kind).items()
                if k not in ("draws", "carried", "freed", "batch_norm")
            },
        }
        for name, kind in MECHANISMS.items()
    ]


def facts() -> list[dict[str, Any]]:
    """Everything that an attacker can be granted."""
    from gradleak.report.wording import FACTS
    from gradleak.run.settings import KNOWN_BY_DEFAULT
    from gradleak.types import Fact

    return [
        {"id": str(fact), "title": FACTS[fact], "by_default": str(fact) in KNOWN_BY_DEFAULT}
        for fact in Fact
    ]


def data() -> list[dict[str, Any]]:
    """Every data set that has a name."""
    from gradleak.data import DATASETS

    return [dataclasses.asdict(about) | {"shape": list(about.shape)} for about in DATASETS.values()]


def aggregations() -> list[dict[str, Any]]:
    """Every aggregation protocol with its fields and its data sheet."""
    from gradleak.crypto import aggregations

    return [
        {"id": name, **dataclasses.asdict(protocol.sheet), "fields": _fields(protocol)}
        for name, protocol in aggregations().items()
    ]


def reproductions() -> list[dict[str, Any]]:
    """Every published table that can be computed again."""
    from gradleak.reproductions import REPRODUCTIONS

    return [
        {
            "id": each.id,
            "title": each.title,
            "paper": each.paper,
            "link": each.link,
            "deviations": list(each.deviations),
        }
        for each in REPRODUCTIONS.values()
    ]


KINDS: dict[str, Callable[[], list[dict[str, Any]]]] = {
    "attacks": attacks,
    "labels": labels,
    "defenses": defenses,
    "priors": priors,
    "models": models,
    "mechanisms": mechanisms,
    "facts": facts,
    "data": data,
    "aggregations": aggregations,
    "reproductions": reproductions,
}

_COLUMNS = {
    "attacks": ("id", "title", "server", "likelihood", "prior", "needs"),
    "labels": ("id", "title", "claims", "assumes", "fields"),
    "defenses": ("id", "title", "promises", "broken_by"),
    "priors": ("id", "title", "proper", "fields"),
    "models": ("id", "title", "task", "batch_norm"),
    "mechanisms": ("id", "about", "trains", "fields"),
    "facts": ("id", "title", "by_default"),
    "data": ("id", "title", "shape", "classes", "embedded", "licence"),
    "aggregations": ("id", "title", "trusts", "survives"),
    "reproductions": ("id", "title", "paper", "link"),
}


def print_listing(kind: str, identifier: str | None, *, as_json: bool) -> None:
    """Print one of `KINDS` as a table, or one entry of it whole, or either as JSON.

    Raises:
        InvalidInput: nothing of this kind has that name.
    """
    rows = {row["id"]: row for row in KINDS[kind]()}
    if kind == "defenses" and identifier is not None and identifier.partition(":")[0] == "dp-sgd":
        rows |= {identifier: rows["dp-sgd"] | _accounted(identifier)}
    if identifier is not None and identifier not in rows:
        raise InvalidInput(f"unknown in {kind}: {identifier!r}; {nearest(identifier, rows)}")
    if as_json:
        shown = list(rows.values()) if identifier is None else rows[identifier]
        print(jsonsafe.dumps(shown, indent=1))
    elif identifier is None:
        console().print(_table(kind, list(rows.values())))
    else:
        console().print(_whole(rows[identifier]))


def _accounted(spec: str) -> dict[str, Any]:
    """What `dp-sgd` with these fields spends: in one update, and over its rounds."""
    from gradleak import registry
    from gradleak.defenses import DPSGD
    from gradleak.metrics import epsilon
    from gradleak.report import wording
    from gradleak.run.ceilings import accounted

    rule = registry.build("defense", spec, {DPSGD.id: DPSGD})
    once = epsilon(rule.delta, noise_multiplier=rule.noise_multiplier)
    over = wording.accounted(accounted(rule)["epsilon"])
    return {
        "fields": {field: getattr(rule, field) for field in _fields(DPSGD)},
        "one update": f"ε = {wording.significant(once)} at δ = {rule.delta:g}",
        "all rounds": f"{over} at δ = {rule.delta:g}",
    }


def _table(kind: str, rows: list[dict[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in _COLUMNS[kind]:
        table.add_column(column.replace("_", " "), overflow="fold", no_wrap=column == "id")
    for row in rows:
        table.add_row(*(_words(row[column]) for column in _COLUMNS[kind]))
    return table


def _whole(row: dict[str, Any]) -> Table:
    """Everything about one entry; what is a list of sentences has a line for each."""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in row.items():
        lines = value if name == "deviations" else [_words(value)]
        for number, line in enumerate(lines):
            table.add_row("" if number else name.replace("_", " "), line)
    return table


def _fields(thing: type[Any]) -> dict[str, Any]:
    """Fields that the notation ID:field=value can set, with their defaults."""
    return {
        field.name: field.default
        for field in dataclasses.fields(thing)
        if field.init and isinstance(field.default, int | float | str | type(None))
    }


def _words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k}={v}" for k, v in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value))
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: ""}[value]
    return str(value)
