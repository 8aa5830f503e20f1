"""What server and clients agree on before the first round, built once per process."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor
from torch.func import functional_call

from gradleak import data, defenses, models
from gradleak.data import Dataset
from gradleak.defenses import advanced, rebased, undefended
from gradleak.errors import InvalidInput, NotApplicable
from gradleak.federate.records import stored
from gradleak.federate.secure_sum import SecureSum, secure_sum
from gradleak.federate.settings import TrainSettings
from gradleak.federate.topology import Edges, Star
from gradleak.mechanisms import Denoising, DenoisingAvg, FedAvg, FedSGD
from gradleak.mechanisms.client import Call, template
from gradleak.mechanisms.denoising import Diffusing, Draws, carry, check_network
from gradleak.run.jobs import derive
from gradleak.run.replies import told
from gradleak.run.sample_quality import SampleQuality, drawn_images, sample_quality
from gradleak.seeding import child, normal
from gradleak.types import Batch, Mechanism, ModelState

FINAL_EXAMPLES = 10_000
"""Most public examples of the final test; none of them is one of a round's."""
FINAL_DENOISED = 1_000
"""The same of a denoiser, a pass of which costs a hundred times a small classifier's."""


@dataclass(frozen=True, eq=False)
class Federation:
    """Data, network and client of one training.

    Attributes:
        settings: what was asked for.
        dataset: all examples.
        parts: indices of every client's examples.
        public: indices of examples that are no client's.
        mechanism: local training with its protections.
        initial: state before the first round.
        secure_sum: under which the server sees a sum only; None where it sees every update.
    """

    settings: TrainSettings
    dataset: Dataset
    parts: tuple[Tensor, ...]
    public: Tensor
    mechanism: Mechanism
    initial: ModelState
    secure_sum: SecureSum | None

    def stream(self, name: str) -> torch.Generator:
        """Draws that derive from the seed."""
        return child(torch.Generator().manual_seed(self.settings.seed), name)

    @property
    def edges(self) -> Edges:
        """Neighbours of every client; empty for a star."""
        settings = self.settings
        if isinstance(settings.graph, Star):
            return ()
        return settings.graph.edges(settings.clients, seed=derive(settings.seed, "graph"))

    @property
    def helpers(self) -> int:
        """Nodes besides the clients."""
        return 0 if self.secure_sum is None else self.secure_sum.agreed.aggregation.helpers

    def batch(self, client: int, server_round: int) -> Batch:
        """The examples that a client draws in a round."""
        part = self.parts[client]
        size = self.settings.batch_size or len(part)
        draw = self.stream(f"client/{client}/round/{server_round}")
        return self.dataset.batch(part[torch.randperm(len(part), generator=draw)[:size]])

    def client_of(self, client: int, server_round: int, batch: Batch) -> Mechanism:
        """The protected mechanism of a client in a round.

        Noise and times of a denoiser's client follow the seed, as its examples do. What
        protections draw does not.
        """
        core = undefended(self.mechanism)
        mechanism = self.mechanism
        if (minibatch := getattr(core, "minibatch_size", None)) is not None:
            mechanism = rebased(mechanism, minibatch_size=min(minibatch, len(batch)))
        if isinstance(core, Diffusing):
            client_core = undefended(mechanism)
            assert isinstance(client_core, Diffusing)
            draw = self.stream(f"client/{client}/round/{server_round}/denoising")
            mechanism = rebased(mechanism, draws=client_core.draw(batch, generator=draw))
        return mechanism

    def test(self, state: ModelState, *, final: bool = False) -> tuple[float | None, float, int]:
        """Accuracy, mean loss and number of examples, on public examples.

        The loss is in nats; of a denoiser, which has no accuracy, it is the clients' own, at times
        spread evenly and noise that every round meets again. Normalises as the clients do. Those
        of the final test are others than those of the rounds.
        """
        rounds = self.public[: self.settings.test_examples]
        core = undefended(self.mechanism)
        assert isinstance(core, FedSGD | FedAvg)
        most = FINAL_DENOISED if isinstance(core, Diffusing) else FINAL_EXAMPLES
        rest = self.public[len(rounds) :][:most]
        chosen = rest if final and len(rest) else rounds
        network = template(state.model, core.batch_norm)

        def called(*given: Tensor) -> Tensor:
            found: Tensor = functional_call(
                network, {**state.params, **state.buffers}, given, strict=False
            )
            return found

        right = total = 0.0
        with torch.no_grad():
            if isinstance(core, Diffusing):
                return None, self._denoised(core, called, chosen), len(chosen)
            for indices in torch.split(chosen, 500):
                batch = self.dataset.batch(indices)
                logits = called(batch.inputs)
                right += float((logits.argmax(1) == batch.labels).sum())
                total += float(torch.nn.functional.cross_entropy(logits, batch.labels)) * len(batch)
        return right / len(chosen), total / len(chosen), len(chosen)

    def _denoised(self, core: Diffusing, network: Call, chosen: Tensor) -> float:
        """Mean denoising loss of public examples."""
        stream, count = self.stream("test"), len(chosen)
        times = (torch.arange(count) * core.timesteps) // count
        times = times[torch.randperm(count, generator=stream)]
        if core.timestep is not None:
            times = torch.full((count,), core.timestep)
        total = 0.0
        for places in torch.split(torch.arange(count), 500):
            batch = self.dataset.batch(chosen[places])
            noise = normal(batch.inputs.shape, generator=stream, dtype=batch.inputs.dtype)
            batch = carry(batch, Draws(times[places][:, None], noise[:, None]))
            total += float(core.objective(network, batch)) * len(batch)
        return total / count

    def quality(self, state: ModelState) -> SampleQuality | None:
        """How the images that a denoiser draws compare with public ones; None of a classifier."""
        core = undefended(self.mechanism)
        if not isinstance(core, Diffusing) or not self.settings.samples:
            return None
        network = template(state.model, getattr(core, "batch_norm", "eval"))

        def called(x: Tensor, times: Tensor) -> Tensor:
            found: Tensor = functional_call(
                network, {**state.params, **state.buffers}, (x, times), strict=False
            )
            return found

        drawn = drawn_images(
            core.noise_schedule,
            called,
            self.dataset.spec,
            count=self.settings.samples,
            generator=self.stream("samples"),
        )
        return sample_quality(drawn, self.dataset, self.public, seed=self.settings.seed)


@lru_cache(maxsize=2)
def federation(settings: TrainSettings) -> Federation:
    """Read the data, divide them, build network and client, and let a client try one step.

    Halves and initial weights are those of an audit with the same seed.

    Raises:
        InvalidInput: a name or a value makes no sense, there are fewer examples than clients, or a
            protection does not fit the network or the mechanism.
    """
    directory = None if settings.data_dir is None else Path(settings.data_dir)
    dataset = data.load(settings.data, data_dir=directory)
    halves = data.split(dataset, derive(settings.seed, "split"))
    if len(halves.clients) < settings.clients:
        raise InvalidInput(
            f"--clients {settings.clients}: the clients' half of {dataset.name} has "
            f"{len(halves.clients)} examples"
        )
    draw = child(torch.Generator().manual_seed(settings.seed), "partition")
    parts = settings.division(
        dataset.labels[halves.clients], clients=settings.clients, generator=draw
    )
    core = settings.client
    if isinstance(core, Denoising | DenoisingAvg):
        core = replace(core, bounds=dataset.spec.bounds)
    client = defenses.build(settings.defense)(core)
    network = models.build(settings.model, dataset.spec, seed=derive(settings.seed, "model"))
    initial = ModelState.of(network)
    if settings.weights is not None:
        initial = models.load_weights(Path(settings.weights), network)
    check_network(initial.model, core, name=f"--model {settings.model}")
    most = max(map(len, parts))
    summed = None
    if settings.aggregation != "none":
        summed = secure_sum(
            settings.aggregation,
            clip=settings.aggregation_clip,
            bits=settings.aggregation_bits,
            most_examples=min(settings.batch_size or most, most),
            least=max(2, settings.min_clients),
            kind=core.kind,
        )
        summed.agreed.check(settings.asked(settings.clients), stored(initial))
    return _tried(
        Federation(
            settings,
            dataset,
            tuple(halves.clients[part] for part in parts),
            halves.public,
            told(client, dataset, halves.public),
            initial,
            summed,
        )
    )


def _tried(made: Federation) -> Federation:
    """Let a client work on very few examples, so that what cannot work is refused at once."""
    core = undefended(made.mechanism)
    size = min(made.settings.batch_size or math.inf, getattr(core, "minibatch_size", None) or 2)
    batch = made.dataset.batch(made.parts[0][: int(size)])
    try:
        with torch.no_grad():
            advanced(made.mechanism, made.initial, batch, {}, generator=made.stream("trial"))
    except NotApplicable as reason:
        raise InvalidInput(f"--defense {made.settings.defense}: {reason}") from None
    return made
