"""Gossip: clients exchange states with their neighbours, one of whom attacks."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from flwr.app import ArrayRecord, ConfigRecord, RecordDict
from torch import Tensor

from gradleak.federate.client import NODE
from gradleak.federate.federation import Federation
from gradleak.federate.records import CONFIG, arrays_of, mixed, moved, state_of, stored
from gradleak.federate.server import Good, Rounds
from gradleak.federate.topology import metropolis
from gradleak.run.recordings import Entry, keep
from gradleak.types import ModelState, Update

MOST_ROUNDS = 10
"""Rounds that a recording keeps."""


class Neighbours(Rounds):
    """A post office of clients that have no server: it hands every one its neighbours' states.

        θ_i ← Σ_j w_ij θ_j − η u_i(θ_i),   or  ... + u_i for changes of parameters

    is computed by the clients. The post office keeps what they published last. The mean of their
    states is tested, and nobody is sent it.

    Source: Lian et al., "Can decentralized algorithms outperform centralized algorithms?",
    NeurIPS 2017 (D-PSGD); weights of Xiao & Boyd, 2004.
    """

    message_type = "train.gossip"

    def __init__(
        self, made: Federation, *, done: int = 0, tensors: Mapping[str, Tensor] | None = None
    ) -> None:
        super().__init__(made, done=done)
        self._directory: Path | None = None
        self.published = dict.fromkeys(range(made.settings.clients), made.initial)
        for i in self.published:
            own = under(tensors or {}, f"node/{i}/")
            if own:
                self.published[i] = state_of(own, made.initial)
        self._records = {i: arrays_of(stored(s)) for i, s in self.published.items()}

    @property
    def raw(self) -> bool:
        """Neighbours always exchange states."""
        return False

    def letter(self, number: int, arrays: ArrayRecord, config: ConfigRecord) -> RecordDict:
        """A client's own state and those of its neighbours, by number."""
        known = {str(i): self._records[i] for i in (number, *self.made.edges[number])}
        return RecordDict({**known, CONFIG: ConfigRecord({**config, NODE: number})})

    def combine(self, good: Good, sent: RecordDict) -> ModelState:
        """The mean of what is published now."""
        before = dict(self.published)
        for i, (values, _) in good.items():
            self.published[i] = state_of(values, self.made.initial)
            self._records[i] = arrays_of(values)
        if self._directory is not None:
            self._watch(self._directory, before, good.keys())
        share = 1 / len(self.published)
        return mixed(self.published, dict.fromkeys(self.published, share))

    def tensors(self) -> dict[str, Tensor]:
        return {f"node/{i}/{k}": v for i, s in self.published.items() for k, v in stored(s).items()}

    def kept_in(self, directory: Path) -> None:
        """Keep what the attacker makes of its neighbours' states there, as a recording."""
        self._directory = directory

    def _watch(
        self, directory: Path, before: Mapping[int, ModelState], moved_now: Collection[int]
    ) -> None:
        made, rate = self.made, float(self.entry["learning_rate"])
        attacker = made.settings.graph.attacker
        seen = {i: before[i] for i in (attacker, *made.edges[attacker])}
        replies = []
        for victim in made.edges[attacker]:
            if victim not in moved_now:
                continue
            update = unmixed(made, seen, self.published[victim], victim=victim, rate=rate)
            state = seen[victim]
            entry = Entry(
                run="gossip",
                round=self.entry["round"],
                node=str(victim),
                kind=update.kind,
                message_type=self.message_type,
            )
            raw = update.kind == "gradient"
            reply = update.values if raw else stored(moved(state, update, rate=1))
            replies.append((entry, stored(state), reply))
        keep(directory, replies, rounds=MOST_ROUNDS, clients=None)


def unmixed(
    made: Federation,
    seen: Mapping[int, ModelState],
    after: ModelState,
    *,
    victim: int,
    rate: float,
) -> Update:
    """The update of a neighbour, from the states that an attacker sees.

        u_v = (Σ_k w_vk θ_k − θ_v⁺) / η,   or  θ_v⁺ − Σ_k w_vk θ_k  for changes of parameters

    The graph is known. Neighbours of the victim's that the attacker does not see are taken to be
    where the victim is: exact in the first round, when all are alike, and in a complete graph.

    Args:
        made: what everybody knows.
        seen: states before the round, by number.
        after: the victim's state after it.
        victim: its number.
        rate: η of the round.
    """
    weights = metropolis(made.edges, victim)
    mean = mixed({k: seen.get(k, seen[victim]) for k in weights}, weights).params
    kind = made.mechanism.kind
    scale = -1 / rate if kind == "gradient" else 1.0
    return Update({k: scale * (v - mean[k]) for k, v in after.params.items()}, kind)


def under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose name begins so, without it."""
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
