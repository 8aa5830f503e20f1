"""Named things and the `ID:field=value,...` notation that configures them."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import pkgutil
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from gradleak.errors import InvalidInput, nearest

T = TypeVar("T")


def defined_in(package: types.ModuleType) -> Iterator[type[Any]]:
    """Every class that a file of a package defines, file by file."""
    for entry in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"{package.__name__}.{entry.name}")
        for _, thing in inspect.getmembers(module, inspect.isclass):
            if thing.__module__ == module.__name__:
                yield thing


def described_in(package: types.ModuleType, kind: type[Any]) -> dict[str, type[Any]]:
    """Every class of a package with an `about` of its own of this kind, by its id, sorted."""
    found = {}
    for thing in defined_in(package):
        about = thing.__dict__.get("about")
        if isinstance(about, kind):
            found[about.id] = thing
    return dict(sorted(found.items()))


def split_spec(spec: str) -> tuple[str, dict[str, str]]:
    """Split "id:field=value,field=value" into its id and its raw fields."""
    name, _, rest = spec.partition(":")
    fields: dict[str, str] = {}
    for part in filter(None, (p.strip() for p in rest.split(","))):
        key, equals, value = part.partition("=")
        if not equals or not key or not value:
            raise InvalidInput(f"{spec!r}: expected ID:field=value,... but found {part!r}")
        if key in fields:
            raise InvalidInput(f"{spec!r}: field {key!r} is given twice")
        fields[key] = value
    return name.strip(), fields


def build(kind: str, spec: str, known: Mapping[str, type[T]]) -> T:
    """Build the dataclass named by `spec` from `known`, converting its fields by their types.

    Raises:
        InvalidInput: unknown id, unknown field, or a value of the wrong type; names the nearest.
    """
    name, raw = split_spec(spec)
    if name not in known:
        raise InvalidInput(f"unknown {kind} {name!r}: {nearest(name, known)}")
    factory = known[name]
    hints = typing.get_type_hints(factory)
    options = {f.name: hints[f.name] for f in dataclasses.fields(factory) if f.init}  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for key, text in raw.items():
        if key not in options:
            raise InvalidInput(f"{kind} {name!r} has no field {key!r}: {nearest(key, options)}")
        values[key] = convert(text, options[key], where=f"{kind} {name!r}, field {key!r}")
    try:
        return factory(**values)
    except TypeError as error:
        missing = [
            f.name
            for f in dataclasses.fields(factory)  # type: ignore[arg-type]
            if f.init
            and f.default is dataclasses.MISSING
            and f.default_factory is dataclasses.MISSING
            and f.name not in values
        ]
        if not missing:
            raise
        raise InvalidInput(
            f"{kind} {name!r} needs a value for {', '.join(missing)}, e.g. {name}:{missing[0]}=1"
        ) from error


def convert(text: str, hint: Any, *, where: str) -> Any:
    """Convert the text of one field to the type its annotation asks for."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        choices = typing.get_args(hint)
        if type(None) in choices and text.lower() in ("none", ""):
            return None
        hint = next(c for c in choices if c is not type(None))
        origin = typing.get_origin(hint)
    if origin is typing.Literal:
        allowed = [str(v) for v in typing.get_args(hint)]
        if text not in allowed:
            raise InvalidInput(f"{where}: {text!r} is not valid, {nearest(text, allowed)}")
        return text
    if hint is bool:
        lowered = text.lower()
        if lowered not in ("true", "false", "yes", "no", "1", "0"):
            raise InvalidInput(f"{where}: {text!r} is not valid, expected true or false")
        return lowered in ("true", "yes", "1")
    if hint in (int, float):
        try:
            return hint(text)
        except (ValueError, OverflowError):
            expected = "a whole number" if hint is int else "a number"
            raise InvalidInput(f"{where}: {text!r} is not valid, expected {expected}") from None
    if hint is str:
        return text
    raise InvalidInput(f"{where}: cannot be set from the command line")


def describe(thing: Any) -> str:
    """Inverse of `build` for a dataclass that carries an `id`: id and all its fields."""
    about = getattr(thing, "about", None)
    name = about.id if about is not None else thing.id
    fields = [
        f"{f.name}={getattr(thing, f.name)}"
        for f in dataclasses.fields(thing)
        if f.init and isinstance(getattr(thing, f.name), (int, float, str, bool, type(None)))
    ]
    return f"{name}:{','.join(fields)}" if fields else name
