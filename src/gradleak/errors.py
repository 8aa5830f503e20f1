"""Everything gradleak raises on purpose derives from `GradleakError`."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class GradleakError(Exception):
    """Root of gradleak's own errors; its message is one line a user can act on."""


class InvalidInput(GradleakError, ValueError):
    """A request, an option, a tensor or a file is not what was expected (exit status 2)."""


class CorruptFile(InvalidInput):
    """A file is truncated, of another format, or would need a pickle to be read."""


class NotApplicable(GradleakError):
    """An attack needs a fact, a modality or a server behaviour that the observation lacks."""


class IntractableLikelihood(GradleakError):
    """A mechanism has no density, or none that can be computed exactly."""


class Diverged(GradleakError):
    """A numerical procedure produced non-finite values and has no iterate to return."""


def nearest(word: str, known: Iterable[str]) -> str:
    """Return a clause naming the valid word nearest to `word`, or listing the valid words."""
    words = sorted(known)
    close = difflib.get_close_matches(word, words, n=1, cutoff=0.5)
    if close:
        return f"did you mean {close[0]!r}?"
    return f"expected one of: {', '.join(words)}" if words else "none is known"
