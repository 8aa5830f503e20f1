"""What the auditor of this app holds: every recorded client's images, for scoring alone.

python truth.py RECORDING TRUTH.safetensors
"""

import sys
from pathlib import Path

from quickstart.task import load_partition

from gradleak.run.recordings import read_recording, write_truth
from gradleak.types import Batch


def main(recording: Path, target: Path) -> None:
    batches = {}
    for entry in read_recording(recording):
        partition = int(entry.metrics["partition-id"])  # told by the clients of this app
        batches[entry.round, entry.node] = Batch(*load_partition(partition, examples=1))
    write_truth(target, batches)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
