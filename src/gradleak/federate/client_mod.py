"""Protections in anybody's Flower app: as a client mod, or inside the training loop."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from flwr.app import Context, Error, Message
from flwr.common.constant import ErrorCode
from torch import Tensor, nn

from gradleak.defenses import Sent, advanced, build, informed
from gradleak.errors import GradleakError, InvalidInput, NotApplicable
from gradleak.federate import weights
from gradleak.federate.records import arrays_of, tensors_of
from gradleak.federate.secrecy import secret_generator
from gradleak.federate.weights import STATISTICS, Weights
from gradleak.types import Batch, Mechanism, ModelState, Update, UpdateKind

Train = Callable[[Message, Context], Message]
Mod = Callable[[Message, Context, Train], Message]

_log = logging.getLogger(__name__)


class _Absent:
    """What a message does not carry; a protection that asks for it learns so."""

    def __init__(self, what: str) -> None:
        self._what = what

    def _refuse(self, *_: object) -> Any:
        raise NotApplicable(f"needs the client's {self._what}, which a message does not carry")

    __getattr__ = __len__ = __iter__ = __call__ = _refuse


_BATCH: Any = _Absent("examples")
_MODEL: Any = _Absent("network")


def protect(defense: str, *, kind: UpdateKind = "delta", public: Batch | None = None) -> Mod:
    """A client mod that protects what the app sends after training.

        ũ = θ + P(θ' − θ)

    for the weights θ broadcast and θ' replied, all floating-point tensors together. Whole numbers
    and running estimates of normalisation layers, which are no part of an update, are sent as the
    app has them: those of a single local step tell the batch's statistics. Messages other than
    training, metrics and errors pass untouched. What a client keeps from round to round lies in
    its `context.state`. An update that cannot be protected is never sent: the server receives an
    error that says why.

    Args:
        defense: notation of the protections, "id:field=value,..." joined by "+".
        kind: "delta" where the app replies weights; "gradient" where it replies gradients.
        public: examples that everybody may know, for protections that ask for some.

    Raises:
        InvalidInput: unknown notation, or a protection that must see the examples or the network.
    """
    wrap = build(defense)
    memory = f"gradleak.protect:{defense}"

    def protected(before: Weights, after: Weights, context: Context) -> Weights:
        names = _numbers(before, after, kind=kind)
        high = {k: torch.promote_types(after[k].dtype, torch.float32) for k in names}
        old = {k: before[k].to(high[k]) for k in names}
        new = {k: after[k].to(high[k]) for k in names}
        sent = Update({k: new[k] - old[k] for k in names} if kind == "delta" else new, kind)
        client = _told(wrap(Sent(sent)), public)
        update = _round(client, ModelState(_MODEL, old), _BATCH, context, memory).values
        shift = old if kind == "delta" else dict.fromkeys(names, 0)
        return after | {k: (shift[k] + update[k]).to(after[k].dtype) for k in names}

    def mod(message: Message, context: Context, train: Train) -> Message:
        if not weights.trains(message):
            return train(message, context)
        try:
            _, before = weights.read(message.content, where="the server's message")
            reply = train(message, context)
            if reply.has_error():
                return reply
            name, after = weights.read(reply.content, where="the client's reply")
            reply.content[name] = arrays_of(protected(before, after, context))
        except GradleakError as reason:
            words = f"protect({defense!r}): {reason}"
            _log.error(words)
            return Message(Error(ErrorCode.MOD_FAILED_PRECONDITION, words), reply_to=message)
        return reply

    _check(wrap, defense, kind=kind, public=public)
    return mod


def client_update(
    model: nn.Module,
    batch: Batch,
    mechanism: Mechanism,
    *,
    learning_rate: float | None = None,
    public: Batch | None = None,
    context: Context | None = None,
) -> None:
    """Train `model` in place by one protected round: for protections that must see the examples.

        θ ← θ + u, or θ ← θ − η u where the mechanism sends a gradient

    Buffers stay as they are.

    Args:
        model: the network as it was broadcast.
        batch: the client's examples.
        mechanism: training with its protections, e.g. Soteria()(FedAvg(learning_rate=0.1)).
        learning_rate: η, for mechanisms that send a gradient.
        public: examples that everybody may know, for protections that ask for some.
        context: where the client keeps what it remembers; without it every round is its first.

    Raises:
        InvalidInput: a learning rate is missing, or given without need.
    """
    if (mechanism.kind == "gradient") != (learning_rate is not None):
        want = "expected one" if learning_rate is None else "it has its own"
        raise InvalidInput(f"learning_rate={learning_rate} for a {mechanism.kind}: {want}")
    state = ModelState.of(model)
    memory = "gradleak.client_update"
    update = _round(_told(mechanism, public), state, batch, context, memory).values
    scale = 1.0 if learning_rate is None else -learning_rate
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in update:
                parameter.add_(update[name], alpha=scale)


def _round(
    client: Mechanism, state: ModelState, batch: Batch, context: Context | None, memory: str
) -> Update:
    """One round of a client that draws in secret and remembers in its context."""
    kept: dict[str, Tensor] = {}
    if context is not None and memory in context.state:
        kept = tensors_of(context.state[memory])
    with torch.no_grad():
        update, keeps = advanced(client, state, batch, kept, generator=secret_generator())
    for name, value in update.values.items():
        if not bool(value.isfinite().all()):
            raise InvalidInput(f"protected {name!r} holds NaN or infinite values, it is not sent")
    if context is not None and keeps:
        context.state[memory] = arrays_of(keeps)
    return update


def _told(client: Mechanism, public: Batch | None) -> Mechanism:
    return client if public is None else informed(client, public)


def _numbers(before: Weights, after: Weights, *, kind: UpdateKind) -> list[str]:
    """Names of the tensors that are protected, in the order of the reply."""
    names = [k for k, v in after.items() if v.is_floating_point() and not k.endswith(STATISTICS)]
    missing = sorted(before.keys() - after.keys()) if kind == "delta" else []
    unknown = sorted(after.keys() - before.keys())
    if missing or unknown:
        raise InvalidInput(
            f"the reply's names differ from the server's: missing {missing[:3]}, "
            f"unknown {unknown[:3]}"
        )
    if not names:
        raise InvalidInput("the reply holds no floating-point tensor: nothing to protect")
    for name in names:
        if after[name].shape != before[name].shape:
            raise InvalidInput(
                f"{name!r} is {tuple(after[name].shape)} in the reply: expected "
                f"{tuple(before[name].shape)}"
            )
        if not bool(after[name].isfinite().all()):
            raise InvalidInput(f"{name!r} holds NaN or infinite values after training")
    return names


def _check(
    wrap: Callable[[Mechanism], Mechanism],
    defense: str,
    *,
    kind: UpdateKind,
    public: Batch | None,
) -> None:
    """Try the protection on a small update, so that what cannot work is said at once."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"0.weight": (4, 1, 3, 3), "0.bias": (4,), "2.weight": (3, 16), "2.bias": (3,)}
    small = {k: torch.randn(s, generator=generator) for k, s in shapes.items()}
    client = _told(wrap(Sent(Update(small, kind))), public)
    try:
        advanced(client, ModelState(_MODEL, small), _BATCH, {}, generator=generator)
    except NotApplicable as reason:
        raise InvalidInput(
            f"protect({defense!r}) {reason}: train by gradleak.federate.client_update"
        ) from None
    except GradleakError:
        pass  # one that names layers of the real network, say, is judged when it meets them
