"""`observe`: an update somebody recorded becomes an observation, with no simulation involved."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from gradleak.defenses import undefended
from gradleak.errors import InvalidInput, nearest
from gradleak.mechanisms import FedSGD
from gradleak.mechanisms.client import Loss, returned_statistics
from gradleak.mechanisms.denoising import check_network
from gradleak.types import (
    DataSpec,
    Exchange,
    Knowledge,
    Mechanism,
    ModelState,
    Observation,
    Prior,
    Update,
    UpdateKind,
)


def observe(
    model: nn.Module | ModelState,
    *,
    update: Mapping[str, Tensor],
    data: DataSpec,
    batch_size: int,
    kind: UpdateKind = "gradient",
    loss: Loss = cross_entropy,
    mechanism: Mechanism | None = None,
    labels: Tensor | None = None,
    buffers: Mapping[str, Tensor] | None = None,
    prior: Prior | None = None,
) -> Observation:
    """Build an observation from the public side of one recorded round.

    There is no parameter through which private inputs could enter.

    Args:
        model: the network as it was broadcast to the client.
        update: one tensor per trainable parameter, named as in `model.named_parameters()`.
        data: public form of the data.
        batch_size: examples in the client's batch.
        kind: "gradient" of the mean loss, or "delta" (parameters after − before).
        loss: the client's loss, used when `mechanism` is not given.
        mechanism: the client's training and protections, if known; FedSGD with `loss` otherwise,
            in training mode where `buffers` moved.
        labels: (b,) int64 labels, where the attacker knows them.
        buffers: the client's fixed tensors after its step, where it returns them: running
            estimates that moved give away the batch's exact statistics.
        prior: what public data say of private inputs, from `gradleak.priors`.

    Raises:
        InvalidInput: names, shapes, kinds or values do not fit together.
    """
    state = model if isinstance(model, ModelState) else ModelState.of(model)
    for name, value in update.items():
        if name not in state.params:
            raise InvalidInput(
                f"update has unknown parameter {name!r}: {nearest(name, state.params)}"
            )
        if not value.isfinite().all():
            raise InvalidInput(
                f"update {name!r} holds NaN or infinite values: expected finite ones"
            )
    if batch_size < 1:
        raise InvalidInput(f"batch size {batch_size}: expected at least 1")
    statistics = _returned(state, buffers or {}, data, batch_size)
    if mechanism is None:
        if kind == "delta":
            raise InvalidInput(
                "update of kind 'delta': expected mechanism=FedAvg(learning_rate=..., steps=...)"
            )
        mechanism = FedSGD(batch_norm="train" if statistics else "eval", loss=loss)
    check_network(state.model, undefended(mechanism))
    if mechanism.kind != kind:
        raise InvalidInput(f"update kind {kind!r}: expected {mechanism.kind!r} for this mechanism")
    if statistics and getattr(undefended(mechanism), "batch_norm", "train") != "train":
        raise InvalidInput(
            "running estimates moved and the mechanism is in evaluation mode: expected "
            "batch_norm='train'"
        )
    if labels is not None:
        if tuple(labels.shape) != (batch_size,):
            raise InvalidInput(f"labels {tuple(labels.shape)}: expected ({batch_size},)")
        if labels.is_floating_point() or labels.min() < 0 or labels.max() >= data.classes:
            raise InvalidInput(f"labels: expected whole numbers from 0 to {data.classes - 1}")
    # A file keeps no order, and the head is found by its place: the network's order counts.
    ordered = [k for k in state.params if k in update]
    received = Update({k: update[k].detach().clone() for k in ordered}, kind)
    return Observation(
        exchanges=(Exchange(state, received),),
        mechanism=mechanism,
        data=data,
        knowledge=Knowledge(
            batch_size,
            None if labels is None else labels.long().clone(),
            bn_statistics=statistics or None,
            prior=prior,
        ),
    )


def _returned(
    state: ModelState, buffers: Mapping[str, Tensor], data: DataSpec, batch_size: int
) -> dict[str, tuple[Tensor, Tensor]]:
    for name, value in buffers.items():
        if name not in state.buffers:
            raise InvalidInput(f"unknown buffer {name!r}: {nearest(name, state.buffers)}")
        if value.shape != state.buffers[name].shape or not value.isfinite().all():
            raise InvalidInput(
                f"buffer {name!r}: expected finite values of shape "
                f"{tuple(state.buffers[name].shape)}"
            )
    return returned_statistics(state, buffers, batch_size=batch_size, shape=data.shape)
