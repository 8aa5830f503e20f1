"""A user's own network, named as `package.module:factory`."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from gradleak.data.files import one_line
from gradleak.denoising import denoises
from gradleak.errors import InvalidInput, nearest
from gradleak.types import DataSpec

Factory = Callable[[DataSpec], nn.Module]


def user_factory(name: str) -> Factory:
    """Import `package.module:factory` from the working directory or the import path.

    A factory with a required argument, or a first argument called `spec`, receives the `DataSpec`;
    any other is called without arguments.

    Raises:
        InvalidInput: the module cannot be imported, or has no such callable.
    """
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute or ":" in attribute:
        raise InvalidInput(f"model {name!r}: expected MODULE:FACTORY, e.g. mynets:small")
    here = os.getcwd()
    if here not in sys.path and "" not in sys.path:
        # Stays on the path: the factory may import its neighbours when it is called.
        sys.path.insert(0, here)
    importlib.invalidate_caches()
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # a script may call sys.exit when imported
        raise InvalidInput(
            f"model {name!r}: cannot import {module_name!r} from {here} or the import path "
            f"({type(error).__name__}: {one_line(error)})"
        ) from error
    made_by = getattr(module, attribute, None)
    if made_by is None:
        known = [key for key, value in vars(module).items() if callable(value)]
        raise InvalidInput(
            f"model {name!r}: {module_name!r} has no {attribute!r}, {nearest(attribute, known)}"
        )
    if isinstance(made_by, nn.Module) or not callable(made_by):
        raise InvalidInput(
            f"model {name!r} is a {type(made_by).__name__}: expected a function that returns a "
            "torch.nn.Module"
        )
    return lambda spec: call(made_by, spec, name=name)


def call(made_by: Callable[..., Any], spec: DataSpec, *, name: str) -> nn.Module:
    """Call a user's factory and insist on a `torch.nn.Module`."""
    try:
        model = made_by(spec) if takes_spec(made_by) else made_by()
    except Exception as error:
        raise InvalidInput(
            f"model {name!r}: the factory raised {type(error).__name__}: {one_line(error)}"
        ) from error
    if not isinstance(model, nn.Module):
        raise InvalidInput(
            f"model {name!r} returned a {type(model).__name__}: expected a torch.nn.Module"
        )
    return model


def takes_spec(made_by: Callable[..., Any]) -> bool:
    """Whether the first positional parameter is required, or is called `spec`."""
    try:
        parameters = list(inspect.signature(made_by).parameters.values())
    except (TypeError, ValueError):
        return False
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return bool(positional) and (
        positional[0].default is inspect.Parameter.empty or positional[0].name == "spec"
    )


def check_outputs(model: nn.Module, spec: DataSpec, *, name: str) -> None:
    """Run two grey examples through the model and insist on finite outputs of the right form.

    A model called with images and times is a denoiser: it returns images; any other (2, classes).

    Raises:
        InvalidInput: the model cannot take (b, *spec.shape) or does not return what it should.
    """
    training = {module: module.training for module in model.modules()}
    first = next(model.parameters(), None)
    if first is None or not any(p.requires_grad for p in model.parameters()):
        raise InvalidInput(f"model {name!r} has no trainable parameter")
    inputs = torch.full((2, *spec.shape), sum(spec.bounds) / 2, dtype=first.dtype).to(first.device)
    form = f"(b, {', '.join(map(str, spec.shape))})"
    given: tuple[torch.Tensor, ...]
    size: tuple[int, ...]
    if denoises(model):
        given, size = (inputs, torch.tensor([0, 1], device=first.device)), tuple(inputs.shape)
        wanted = f"expected {form} and times (b,) to {form}, as of a denoiser"
    else:
        given, size = (inputs,), (2, spec.classes)
        wanted = f"expected {form} to (b, {spec.classes})"
    try:
        with torch.no_grad():
            outputs = model.eval()(*given)
    except Exception as error:
        raise InvalidInput(
            f"model {name!r} fails on a batch of two ({type(error).__name__}: "
            f"{one_line(error)}): {wanted}"
        ) from error
    finally:
        for module, mode in training.items():
            module.training = mode
    if not isinstance(outputs, torch.Tensor) or outputs.shape != size:
        got = tuple(outputs.shape) if isinstance(outputs, torch.Tensor) else type(outputs).__name__
        raise InvalidInput(f"model {name!r} returns {got} for a batch of two: {wanted}")
    if not bool(outputs.isfinite().all()):
        raise InvalidInput(f"model {name!r} returns non-finite outputs at initialisation")
