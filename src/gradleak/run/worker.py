"""The worker's side of `gradleak.run.executor`: jobs in, trials out."""

from __future__ import annotations

import os
import queue
import signal
import sys
import threading
import time

import torch

from gradleak import jsonsafe
from gradleak.run.jobs import JobSpec
from gradleak.run.trial import run_trial

_SECONDS_BETWEEN_SHARES = 0.25


def main() -> None:
    """Run jobs from standard input until it ends, and die at once when it does."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what an interrupt means
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whatever a user's network prints

    jobs: queue.Queue[JobSpec] = queue.Queue()

    def read() -> None:
        for line in sys.stdin.buffer:
            jobs.put(JobSpec.from_json(jsonsafe.loads(line)))
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

        trial = run_trial(job, progress=progress)
        size = None if trial.tensors is None else len(trial.tensors)
        say({"record": trial.record, "tensors": size}, tensors=trial.tensors or b"")
