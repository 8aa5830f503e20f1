"""Watches an unmodified network run and replaces every use of a parameter by a rule."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from gradleak.attacks.parts.fast.kernel import Kernel, Pair
from gradleak.attacks.parts.fast.rules import (
    LinearRule,
    Received,
    Rule,
    ScaleRule,
    conv_rule,
)

_HARMLESS = {"shape", "dtype", "device", "ndim", "requires_grad", "layout", "is_cuda", "is_sparse"}
_QUESTIONS = {"dim", "size", "numel", "is_floating_point", "is_complex", "__len__", "__hash__"}


class Unsupported(RuntimeError):
    """The network uses a parameter in a way that no rule covers."""


class Tape(TorchFunctionMode):
    """Active during one forward pass; collects the rules in `rules`.

    Args:
        names: id of every trained tensor of the running network -> its name.
        kernels: convolutions by parameter name, kept between passes.
        received: updates of the trials in the pass.
        copies: hand out copies of outputs, for networks that overwrite them in place.
    """

    def __init__(
        self,
        names: Mapping[int, str],
        kernels: dict[str, Kernel],
        received: Received,
        *,
        copies: bool,
    ) -> None:
        super().__init__()
        self.names, self.kernels, self.received, self.copies = names, kernels, received, copies
        self.rules: list[Rule] = []
        self._used: set[int] = set()
        self._versions: list[tuple[int, int]] = []

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        named = dict(kwargs or {})
        if not any(id(a) in self.names for a in _leaves((*args, *named.values()))):
            return func(*args, **named)
        rule = _RULES.get(func)
        if rule is not None:
            return self._record(rule(self, *args, **named))
        name = getattr(func, "__name__", "")
        if name == "__get__":
            attribute = getattr(getattr(func, "__self__", None), "__name__", "")
            if attribute in _HARMLESS:
                return func(*args, **named)
        elif name in _QUESTIONS:
            return func(*args, **named)
        raise Unsupported(f"{name} takes a parameter")

    @property
    def overwritten(self) -> bool:
        """Whether the network wrote into an output or input that a rule still needs."""
        now = [(r.x._version, r.z._version) for r in self.rules]
        return now != self._versions

    def claim(self, weight: Tensor, bias: Tensor | None) -> list[str]:
        """Names of the trained ones of (weight, bias), each allowed once."""
        if id(weight) not in self.names:
            raise Unsupported("a trained bias on a fixed weight")
        taken = [p for p in (weight, bias) if p is not None and id(p) in self.names]
        for p in taken:
            if id(p) in self._used:
                raise Unsupported(f"{self.names[id(p)]} is used twice")
            self._used.add(id(p))
        return [self.names[id(p)] for p in taken]

    def _record(self, rule: Rule) -> Tensor:
        if not rule.z.requires_grad:
            rule.z.requires_grad_()
        self.rules.append(rule)
        self._versions.append((rule.x._version, rule.z._version))
        return rule.z.clone() if self.copies else rule.z


def _leaves(values: Sequence[Any]) -> Iterator[Any]:
    for value in values:
        if isinstance(value, list | tuple):
            yield from _leaves(value)
        else:
            yield value


def _linear(tape: Tape, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Rule:
    return LinearRule(input, weight, bias, tape.claim(weight, bias), tape.received)


def _conv2d(
    tape: Tape,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Rule:
    if groups != 1 or input.ndim != 4:
        raise Unsupported("grouped or unbatched convolution")
    if padding == "valid":
        padding = 0
    if isinstance(padding, str):
        raise Unsupported(f"padding={padding!r}")
    names = tape.claim(weight, bias)
    if names[0] not in tape.kernels:
        geometry = _pair(stride), _pair(padding), _pair(dilation)
        tape.kernels[names[0]] = Kernel(weight, bias, *geometry)
    return conv_rule(input, tape.kernels[names[0]], names, tape.received)


def _batch_norm(
    tape: Tape,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Rule:
    if training or running_mean is None or running_var is None or weight is None:
        raise Unsupported("batch normalisation by the batch's own statistics")
    names = tape.claim(weight, bias)
    inverse = torch.rsqrt(running_var + eps)
    return ScaleRule(
        input, weight, bias, names, tape.received, kept=(1,), mean=running_mean, inverse=inverse
    )


def _layer_norm(
    tape: Tape,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Rule:
    if weight is None:
        raise Unsupported("a trained bias on a fixed weight")
    names = tape.claim(weight, bias)
    unit = F.layer_norm(input, list(normalized_shape), None, None, eps)
    kept = range(input.ndim - len(normalized_shape), input.ndim)
    return ScaleRule(unit, weight, bias, names, tape.received, kept=kept)


def _group_norm(
    tape: Tape,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Rule:
    if weight is None:
        raise Unsupported("a trained bias on a fixed weight")
    names = tape.claim(weight, bias)
    unit = F.group_norm(input, num_groups, None, None, eps)
    return ScaleRule(unit, weight, bias, names, tape.received, kept=(1,))


def _pair(value: int | Sequence[int]) -> Pair:
    if isinstance(value, int):
        return value, value
    return (value[0], value[0]) if len(value) == 1 else (value[0], value[1])


_RULES: dict[Any, Callable[..., Rule]] = {
    F.linear: _linear,
    F.conv2d: _conv2d,
    torch.conv2d: _conv2d,
    F.batch_norm: _batch_norm,
    F.layer_norm: _layer_norm,
    F.group_norm: _group_norm,
}
