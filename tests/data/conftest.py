"""Checks that every reader's tests share."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest

from gradleak.errors import GradleakError

Refusal = Callable[..., AbstractContextManager[None]]


@pytest.fixture
def refused() -> Refusal:
    """`with refused(error, *words)`: one clear line with these words, and no giant allocation."""

    @contextmanager
    def check(error: type[GradleakError], *words: str) -> Iterator[None]:
        tracemalloc.start()
        try:
            with pytest.raises(error) as caught:
                yield
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        message = str(caught.value)
        assert type(caught.value) is error
        assert message.strip()
        assert "\n" not in message
        assert all(word in message for word in words), message
        assert peak < 64 * 2**20

    return check


@pytest.fixture
def survives() -> Callable[[Callable[[], object]], bool]:
    """Run a reader on damaged input: whether it reads; any error but gradleak's own escapes."""

    def check(read: Callable[[], object]) -> bool:
        message = None
        try:
            read()
        except GradleakError as error:
            message = str(error)
        assert message is None or (message and "\n" not in message)
        return message is None

    return check
