"""Rounds of a server that sees the sum of its clients' updates."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from flwr.app import Message

from gradleak.federate.federation import Federation
from gradleak.federate.records import ARRAYS, EXAMPLES, METRICS, tensors_of
from gradleak.federate.server import Good, Rounds, Stopped
from gradleak.federate.sum_grid import SumGrid


class Summed(Rounds):
    """Rounds over a grid that plays the protocol: one reply, and an account of its steps.

    Nothing is on record of single clients but who is not in the sum, and at which step why.

    Args:
        made: data, network and client.
        grid: plays the protocol.
        done: rounds of earlier runs.
    """

    def __init__(self, made: Federation, grid: SumGrid, *, done: int = 0) -> None:
        super().__init__(made, done=done)
        self._grid = grid

    def judged(self, received: Mapping[int, Message]) -> Good:
        """The mean, as if it were one client's reply.

        Raises:
            Stopped: no session came to a sum.
        """
        played, numbers = self._grid.played, self._numbers
        steps: list[dict[str, Any]] = []
        lost: dict[int | str, str] = {}
        for step in played.steps:
            entry = dataclasses.asdict(step)
            for kind in ("dropped", "rejected"):
                found = {
                    numbers.get(node, "helper"): reason for node, reason in entry[kind].items()
                }
                entry[kind] = [{"client": c, "reason": r} for c, r in found.items()]
                if step.attempt == played.attempts:
                    lost |= {c: f"{step.name}: {r}" for c, r in found.items()}
            steps.append(entry)
        left = {numbers[node] for node in played.summed}
        out = [numbers[node] for node in self._asked if numbers[node] not in left]
        self.entry |= {
            "failed": [{"client": c, "reason": lost.get(c, "not in the sum")} for c in out],
            "client_seconds": None,
            "aggregation_seconds": played.seconds,
            "bytes_down": sum(s.bytes_down for s in played.steps),
            "bytes_up": sum(s.bytes_up for s in played.steps),
            "steps": steps,
        }
        if played.reason is not None:
            first = next((f"; client {c}: {r}" for c, r in lost.items()), "")
            raise Stopped(
                f"round {self.entry['round']}: no sum in {played.attempts} attempts: "
                f"{played.reason}{first}"
            )
        (reply,) = received.values()
        values = tensors_of(reply.content[ARRAYS])
        return {0: (values, float(reply.content[METRICS][EXAMPLES]))}
