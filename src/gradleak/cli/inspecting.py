"""What a network gives away before any update is seen: traps for its clients, and ranks."""

from __future__ import annotations

import dataclasses

import torch
from rich.table import Table

from gradleak import jsonsafe, models
from gradleak.attacks import ATTACKS
from gradleak.attacks import build as build_attack
from gradleak.attacks.closed_form.ranks import LayerRank, recoverability
from gradleak.cli.tables import console
from gradleak.data import Dataset
from gradleak.detection import LIMITS, Evidence, suspicions
from gradleak.errors import InvalidInput, NotApplicable
from gradleak.run.replies import PUBLIC
from gradleak.run.states import file_of
from gradleak.run.trial import divide, load_data
from gradleak.types import ModelState, Planting

_OWN = 512
"""Examples that play the client's own."""

_PLANTED_FOR = 16
"""Batch size for which `--planted` crafts."""


def print_inspection(
    model: str,
    *,
    data: str,
    data_dir: str | None,
    weights: str | None,
    planted: str | None,
    seed: int,
    as_json: bool,
) -> bool:
    """Print what looks crafted in a state, and the rank analysis of R-GAP: as tables or as JSON.

    Returns:
        Whether anything is suspicious.

    Raises:
        InvalidInput: unknown network or data, weights that do not fit, or `planted` is no attack
            of a malicious server or has no place in the network.
    """
    dataset = load_data(data, data_dir)
    spec = dataset.spec
    network = models.build(model, spec, seed=seed)
    given = file_of(weights)
    state = models.load_weights(given, network) if given else ModelState.of(network)
    if planted is not None:
        state = _crafted(planted, state, dataset, seed=seed)
    chosen = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))[:_OWN]
    suspicious = suspicions(state, spec, dataset.batch(chosen))
    found = recoverability(state, spec)
    if as_json:
        told = _as_json(found) | {"suspicious": [dataclasses.asdict(e) for e in suspicious]}
        print(jsonsafe.dumps(told, indent=1))
        return bool(suspicious)
    _print_suspicions(model, suspicious)
    _print_ranks(model, found)
    return bool(suspicious)


def _crafted(spec: str, state: ModelState, dataset: Dataset, *, seed: int) -> ModelState:
    """What the malicious server of an attack would make of a state."""
    attack = build_attack(spec)
    if not isinstance(attack, Planting):
        crafting = [name for name, kind in ATTACKS.items() if kind.about.server == "malicious"]
        raise InvalidInput(
            f"--planted {spec!r}: an honest server's attack, expected {', '.join(crafting)}"
        )
    try:
        return attack.plant(
            state,
            dataset.batch(divide(dataset, seed).public[:PUBLIC]),
            data=dataset.spec,
            batch_size=_PLANTED_FOR,
            generator=torch.Generator().manual_seed(seed),
        )
    except NotApplicable as reason:
        raise InvalidInput(f"--planted {spec!r} has no place in this network: {reason}") from None


def _print_suspicions(model: str, suspicious: list[Evidence]) -> None:
    out = console()
    if not suspicious:
        out.print(f"{model}: nothing in it looks crafted by a malicious server")
        return
    out.print(f"{model}: SUSPICIOUS, do not answer it with an update")
    table = Table(box=None, pad_edge=False)
    for title in ("layer", "statistic", "value", "limit", "why"):
        table.add_column(title, no_wrap=title in ("layer", "statistic"))
    for e in suspicious:
        limit = f"{LIMITS[e.statistic]:g}"
        table.add_row(e.layer, e.statistic, f"{e.value:.3g}", limit, e.reason)
    out.print(table)


def _print_ranks(model: str, found: list[LayerRank] | str) -> None:
    out = console()
    if isinstance(found, str):
        out.print(f"{model}: not a chain that can be solved layer by layer: {found}")
        return
    table = Table(box=None, pad_edge=False)
    table.add_column("layer", no_wrap=True)
    for title in ("unknowns", "weight equations", "gradient equations", "independent"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for layer in found:
        numbers = (
            layer.unknowns,
            layer.weight_equations,
            layer.gradient_equations,
            layer.rank,
        )
        verdict = "determined" if layer.recoverable else f"lacks {layer.unknowns - layer.rank}"
        table.add_row(layer.name, *map(str, numbers), verdict)
    out.print(table)
    out.print(_verdict(model, found))


def _verdict(model: str, found: list[LayerRank]) -> str:
    lacking = [layer.name for layer in found if not layer.recoverable]
    if not lacking:
        return f"{model}: the gradient of one example determines it, layer by layer (r-gap)"
    return (
        f"{model}: r-gap stops at {lacking[-1]!r}; what lies below is not determined by layer-wise "
        "equations, which other attacks need not respect"
    )


def _as_json(found: list[LayerRank] | str) -> dict[str, object]:
    if isinstance(found, str):
        return {"chain": False, "reason": found, "layers": []}
    rows = [dataclasses.asdict(layer) | {"recoverable": layer.recoverable} for layer in found]
    return {"chain": True, "reason": None, "layers": rows}
