"""Watches an unmodified network run and replaces every use of a parameter by a rule."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from gradleak.attacks.parts.fast.kernel import Kernel
from gradleak.attacks.parts.fast.patches import Pair
from gradleak.attacks.parts.fast.rules import (
    LinearRule,
    Received,
    Rule,
    ScaleRule,
    ShiftRule,
    conv_rule,
)

_HARMLESS = {"shape", "dtype", "device", "ndim", "requires_grad", "layout", "is_cuda", "is_sparse"}
_QUESTIONS = {"dim", "size", "numel", "is_floating_point", "is_complex", "__len__", "__hash__"}


class Unsupported(RuntimeError):
    """The network uses a parameter in a way that no rule covers."""


@dataclass
class Constants:
    """What does not change between passes.

    Attributes:
        kernels: convolutions by parameter name, with packed weights and without.
        inverses: reciprocal standard deviations of batch normalisations by parameter name.
    """

    kernels: dict[tuple[str, bool], Kernel] = field(default_factory=dict)
    inverses: dict[str, Tensor] = field(default_factory=dict)


class Tape(TorchFunctionMode):
    """Active during one forward pass; collects the rules in `rules`.

    Args:
        names: id of every trained tensor of the running network -> its name.
        constants: what is kept between passes.
        received: updates of the trials in the pass.
        copies: hand out copies of outputs, for networks that overwrite them in place.
        packs: let convolutions keep packed weights.
    """

    def __init__(
        self,
        names: Mapping[int, str],
        constants: Constants,
        received: Received,
        *,
        copies: bool,
        packs: bool,
    ) -> None:
        super().__init__()
        self.packs = packs
        self.names, self.constants, self.received, self.copies = names, constants, received, copies
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
            return self.record(rule(self, *args, **named))
        if func in _COMPOSITES:
            return _COMPOSITES[func](self, *args, **named)
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
        return [_versions(rule) for rule in self.rules] != self._versions

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

    def record(self, rule: Rule) -> Tensor:
        if not rule.z.requires_grad:
            rule.z.requires_grad_()
        self.rules.append(rule)
        self._versions.append(_versions(rule))
        return rule.z.clone() if self.copies else rule.z


def _versions(rule: Rule) -> tuple[int, int]:
    return rule.z._version, 0 if rule.x is None else rule.x._version


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
    if input.ndim != 4:
        raise Unsupported("unbatched convolution")
    if padding == "valid":
        padding = 0
    if isinstance(padding, str):
        raise Unsupported(f"padding={padding!r}")
    names = tape.claim(weight, bias)
    known, key = tape.constants.kernels, (names[0], tape.packs)
    if key not in known:
        geometry = _pair(stride), _pair(padding), _pair(dilation)
        packs = tape.packs and weight.shape[2:] != (1, 1)
        known[key] = Kernel(weight, bias, *geometry, groups=groups, packs=packs)
    return conv_rule(input, known[key], names, tape.received)


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
    known = tape.constants.inverses
    if names[0] not in known:
        known[names[0]] = torch.rsqrt(running_var + eps)
    return ScaleRule(
        input,
        weight,
        bias,
        names,
        tape.received,
        kept=(1,),
        mean=running_mean,
        inverse=known[names[0]],
    )


def _layer_norm(
    tape: Tape,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Rule:
    unit = F.layer_norm(input, list(normalized_shape), None, None, eps)
    kept = range(input.ndim - len(normalized_shape), input.ndim)
    return _scaled(tape, unit, weight, bias, kept)


def _group_norm(
    tape: Tape,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Rule:
    unit = F.group_norm(input, num_groups, None, None, eps)
    return _scaled(tape, unit, weight, bias, (1,))


def _scaled(
    tape: Tape, unit: Tensor, weight: Tensor | None, bias: Tensor | None, kept: Sequence[int]
) -> Rule:
    """Scale and shift of normalised values along the axes `kept`."""
    if weight is None:
        raise Unsupported("a trained bias on a fixed weight")
    names = tape.claim(weight, bias)
    return ScaleRule(unit, weight, bias, names, tape.received, kept=kept)


def _add(tape: Tape, input: Tensor, other: Tensor, *, alpha: float = 1) -> Rule:
    p, x = (input, other) if id(input) in tape.names else (other, input)
    shape = _broadcast(p, x)
    if alpha != 1 or shape != x.shape:
        raise Unsupported("a parameter added with a factor, or wider than what it is added to")
    return ShiftRule(x, p, shape, tape.claim(p, None)[0], tape.received)


def _multiply(tape: Tape, input: Tensor, other: Tensor) -> Rule:
    p, x = (input, other) if id(input) in tape.names else (other, input)
    if _broadcast(p, x) != x.shape:
        raise Unsupported("a parameter wider than what it multiplies")
    lead = x.ndim - p.ndim
    kept = [i for i in range(1, x.ndim) if i >= lead and p.shape[i - lead] > 1]
    return ScaleRule(x, p, None, tape.claim(p, None), tape.received, kept=kept)


def _expand(tape: Tape, input: Tensor, *sizes: Any) -> Rule:
    """A parameter (1, ...) repeated for every image."""
    wanted = list(sizes[0] if len(sizes) == 1 and not isinstance(sizes[0], int) else sizes)
    lead = len(wanted) - input.ndim
    shape = [n if n != -1 else input.shape[i - lead] for i, n in enumerate(wanted)]
    images = shape[0] if shape else 0
    if input.ndim != len(shape) or input.shape[0] != 1 or images % len(tape.received):
        raise Unsupported("expand of a parameter along something else than the images")
    return ShiftRule(None, input, shape, tape.claim(input, None)[0], tape.received)


def _broadcast(p: Tensor, x: Tensor) -> torch.Size | None:
    """The shape of p + x where p is the same for every image, else None."""
    if not isinstance(x, Tensor) or x.ndim < 2 or p.ndim > x.ndim:
        return None
    if p.ndim == x.ndim and p.shape[0] != 1:
        return None
    try:
        shape: torch.Size = torch.broadcast_shapes(p.shape, x.shape)  # type: ignore[no-untyped-call]
    except RuntimeError:
        return None
    return shape


def _self_attention(
    tape: Tape,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    average_attn_weights: bool = True,
    **unused: Any,
) -> tuple[Tensor, Tensor | None]:
    """`nn.MultiheadAttention` of (tokens, images, width) with itself, without masks."""
    plain = query is key and key is value and query.ndim == 3
    odd = (bias_k, bias_v, key_padding_mask, attn_mask)
    flags = add_zero_attn, use_separate_proj_weight, training and dropout_p > 0
    if not plain or any(o is not None for o in odd) or any(flags):
        raise Unsupported("attention with masks or other keys")
    rows = query.transpose(0, 1)
    joined = tape.record(_linear(tape, rows, in_proj_weight, in_proj_bias))
    q, k, v = joined.view(*joined.shape[:2], 3, num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
    weights = (q @ k.transpose(2, 3) / math.sqrt(q.shape[3])).softmax(3)
    out = _linear(tape, (weights @ v).transpose(1, 2).flatten(2), out_proj_weight, out_proj_bias)
    shown = weights.mean(1) if average_attn_weights else weights
    return tape.record(out).transpose(0, 1), shown if need_weights else None


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
    torch.add: _add,
    torch.Tensor.add: _add,
    torch.mul: _multiply,
    torch.Tensor.mul: _multiply,
    torch.Tensor.expand: _expand,
}

_COMPOSITES: dict[Any, Callable[..., Any]] = {F.multi_head_attention_forward: _self_attention}
