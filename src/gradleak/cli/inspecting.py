"""What a network gives away before any update is seen: ranks, layer by layer."""

from __future__ import annotations

import dataclasses

from rich.table import Table

from gradleak import jsonsafe, models
from gradleak.attacks.closed_form.ranks import LayerRank, recoverability
from gradleak.cli.tables import console
from gradleak.run.states import file_of
from gradleak.run.trial import load_data
from gradleak.types import ModelState


def print_ranks(
    model: str, *, data: str, data_dir: str | None, weights: str | None, seed: int, as_json: bool
) -> None:
    """Print the rank analysis of R-GAP, as a table with a verdict or as JSON.

    Raises:
        InvalidInput: unknown network or data, or weights that do not fit.
    """
    spec = load_data(data, data_dir).spec
    network = models.build(model, spec, seed=seed)
    given = file_of(weights)
    state = models.load_weights(given, network) if given else ModelState.of(network)
    found = recoverability(state, spec)
    if as_json:
        print(jsonsafe.dumps(_as_json(found), indent=1))
        return
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
