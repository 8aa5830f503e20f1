"""The worker's side of `gradleak.run.executor`: jobs in, trials out."""

from __future__ import annotations

import importlib
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from gradleak import jsonsafe

if TYPE_CHECKING:
    from gradleak.run.trial import Trial

_SECONDS_BETWEEN_SHARES = 0.25


def resolve(name: str) -> Any:
    """What is called "module:name"."""
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


def main(name: str) -> None:
    """Run jobs from standard input by the function `name` until it ends, and then die at once."""
    run: Callable[..., Trial] = resolve(name)
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what an interrupt means
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whatever a user's network prints

    jobs: queue.Queue[dict[str, Any]] = queue.Queue()

    def read() -> None:
        for line in sys.stdin.buffer:
            jobs.put(jsonsafe.loads(line))
        os._exit(0)

    def say(message: object, *, tensors: bytes = b"") -> None:
        answers.write(jsonsafe.dumps(message).encode() + b"\n" + tensors)
        answers.flush()

    threading.Thread(target=read, daemon=True).start()
    while True:
        job = jobs.get()
        said = 0.0
        say({"share": 0.0})

        def progress(share: float) -> None:
            nonlocal said
            if time.monotonic() - said > _SECONDS_BETWEEN_SHARES:
                said = time.monotonic()
                say({"share": share})

        trial = run(job, progress=progress)
        size = None if trial.tensors is None else len(trial.tensors)
        say({"record": trial.record, "tensors": size}, tensors=trial.tensors or b"")
