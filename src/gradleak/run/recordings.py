"""Recordings: what a server saw of real clients, on disk.

    DIR/recording.json                             one entry per reply, `schema_version`
    DIR/broadcast-DIGEST.safetensors               a state that was sent out
    DIR/reply-RUN-ROUND-NODE.safetensors           what a client answered

Files are whole or absent, and are there before the manifest names them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from gradleak import jsonsafe, models
from gradleak.errors import CorruptFile, InvalidInput
from gradleak.run.store import read_json, write_whole
from gradleak.types import Batch, DataSpec, ModelState, UpdateKind, View

MANIFEST = "recording.json"
SCHEMA_VERSION = 1

_KINDS = {
    "run": str, "round": int, "node": str, "kind": str, "message_type": str,
    "num_examples": int | float | None, "metrics": dict, "broadcast": str, "reply": str,
    "view": str, "clients": int,
}  # fmt: skip
_LATER = {"view": "client", "clients": 1}
"""What manifests of earlier versions leave out."""


@dataclass(frozen=True)
class Entry:
    """One reply of one client.

    Attributes:
        run: of the app.
        round: of the server.
        node: of the client.
        kind: "delta" where the reply holds weights, "gradient" where it holds gradients.
        message_type: of the server's message.
        view: "client" for one client's reply, "aggregate" for the weighted mean of several.
        clients: how many replies it is the mean of.
        num_examples: what the client says it trained on, or the clients together.
        metrics: numbers beside the reply.
        broadcast: file of the state that the reply answers.
        reply: its file.
    """

    run: str
    round: int
    node: str
    kind: UpdateKind
    message_type: str = "train"
    view: View = "client"
    clients: int = 1
    num_examples: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    broadcast: str = ""
    reply: str = ""


Reply = tuple[Entry, Mapping[str, Tensor], Mapping[str, Tensor]]
"""An entry without its files, the state broadcast and the reply."""


def keep(
    directory: Path, replies: Sequence[Reply], *, rounds: int | None, clients: int | None
) -> None:
    """Add replies to a recording, as far as its bounds allow; several processes may.

    Args:
        directory: of the recording.
        replies: what was seen.
        rounds: most rounds of a run.
        clients: most replies of a round.

    Raises:
        InvalidInput: the directory cannot be written.
        CorruptFile: its manifest is no manifest.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with _alone(directory):
            known = read_recording(directory) if (directory / MANIFEST).exists() else []
            for entry, broadcast, reply in replies:
                same = [e for e in known if e.run == entry.run]
                visited = {e.round for e in same} | {entry.round}
                present = [e for e in same if e.round == entry.round and e.node != entry.node]
                if rounds is not None and len(visited) > rounds:
                    continue
                if clients is not None and len(present) >= clients:
                    continue
                image = _image(broadcast)
                digest = hashlib.sha256(image).hexdigest()[:16]
                entry = dataclasses.replace(
                    entry,
                    broadcast=f"broadcast-{digest}.safetensors",
                    reply=f"reply-{entry.run}-{entry.round}-{entry.node}.safetensors",
                )
                if not (directory / entry.broadcast).exists():
                    write_whole(directory / entry.broadcast, image)
                write_whole(directory / entry.reply, _image(reply))
                known = [e for e in known if e.reply != entry.reply] + [entry]
            _write_manifest(directory, known)
    except OSError as error:
        raise InvalidInput(
            f"cannot write to {str(directory)!r}: {error.strerror or error}"
        ) from None


def read_recording(directory: Path) -> list[Entry]:
    """Read the manifest of a recording, by round and node.

    Raises:
        InvalidInput: there is none, or it is empty.
        CorruptFile: it is not one that this version reads.
    """
    path = directory / MANIFEST
    if not path.is_file():
        raise InvalidInput(f"no recording in {str(directory)!r}: expected a {MANIFEST} there")
    content = read_json(path)
    if not isinstance(content, dict) or not isinstance(content.get("entries"), list):
        raise CorruptFile(f"{str(path)!r} is not the manifest of a recording")
    if content.get("schema_version") != SCHEMA_VERSION:
        raise CorruptFile(
            f"{str(path)!r} has schema_version {content.get('schema_version')!r}: this gradleak "
            f"reads {SCHEMA_VERSION}"
        )
    if not content["entries"]:
        raise InvalidInput(f"{str(path)!r} holds no reply of any client")
    entries = [_entry(path, position, raw) for position, raw in enumerate(content["entries"])]
    return sorted(entries, key=lambda e: (e.run, e.round, e.node))


def read_exchange(
    directory: Path, entry: Entry, model: nn.Module
) -> tuple[ModelState, dict[str, Tensor], dict[str, Tensor]]:
    """The state that a client was sent, its update, and its fixed tensors after training.

    Raises:
        InvalidInput: names, shapes or values do not fit the model, or a file is missing.
        CorruptFile: not safetensors, or truncated; a pickle is never opened.
    """
    state = models.load_weights(directory / entry.broadcast, model)
    if entry.kind == "gradient":
        return state, read_tensors(directory / entry.reply), {}
    after = models.load_weights(directory / entry.reply, model)
    update = {k: after.params[k] - before for k, before in state.params.items()}
    stored = model.state_dict().keys()
    return state, update, {k: v for k, v in after.buffers.items() if k in stored}


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file of any content.

    Raises:
        InvalidInput: no such file.
        CorruptFile: not a whole safetensors file; a pickle is never opened.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InvalidInput(f"cannot read {str(path)!r}: {error.strerror or error}") from None
    try:
        return safetensors.torch.load(content)
    except Exception:  # safetensors raises several kinds for damaged headers
        raise CorruptFile(
            f"{str(path)!r} is not a whole safetensors file (pickles are never opened): "
            "write it with safetensors.torch.save_file"
        ) from None


def write_truth(path: Path, batches: Mapping[tuple[int, str], Batch]) -> None:
    """Write what clients really trained on, for scoring alone: by (round, node)."""
    tensors = {
        f"{number}/{node}/{part}": value.contiguous()
        for (number, node), batch in batches.items()
        for part, value in (("inputs", batch.inputs), ("labels", batch.labels))
    }
    write_whole(path, safetensors.torch.save(tensors))


def read_truth(
    path: Path, entries: Sequence[Entry], spec: DataSpec, *, batch_size: int
) -> list[Batch]:
    """The batch behind every entry, from tensors ROUND/NODE/inputs and ROUND/NODE/labels.

    Raises:
        InvalidInput: one is missing, or of another form than the data or the batch size say.
    """
    stored = read_tensors(path)
    batches = []
    for entry in entries:
        name = f"{entry.round}/{entry.node}"
        inputs, labels = stored.get(f"{name}/inputs"), stored.get(f"{name}/labels")
        if inputs is None or labels is None:
            raise InvalidInput(
                f"{str(path)!r} lacks {name}/inputs or {name}/labels: expected both for every reply"
            )
        if tuple(inputs.shape) != (batch_size, *spec.shape) or not inputs.is_floating_point():
            raise InvalidInput(
                f"{str(path)!r}: {name}/inputs is {tuple(inputs.shape)} of {inputs.dtype}: "
                f"expected {(batch_size, *spec.shape)} of floating-point numbers"
            )
        low, high = spec.bounds
        if not bool(((inputs >= low) & (inputs <= high)).all()):
            raise InvalidInput(f"{str(path)!r}: {name}/inputs leave {low:g} to {high:g}")
        if tuple(labels.shape) != (batch_size,) or labels.is_floating_point():
            raise InvalidInput(f"{str(path)!r}: {name}/labels: expected ({batch_size},) classes")
        if int(labels.min()) < 0 or int(labels.max()) >= spec.classes:
            raise InvalidInput(f"{str(path)!r}: {name}/labels leave 0 to {spec.classes - 1}")
        batches.append(Batch(inputs.float(), labels.long()))
    return batches


def _entry(path: Path, position: int, raw: Any) -> Entry:
    where = f"{str(path)!r}, entry {position + 1}"
    if not isinstance(raw, dict):
        raise CorruptFile(f"{where}: expected an object")
    raw = _LATER | raw
    for name, kind in _KINDS.items():
        if name not in raw or not isinstance(raw[name], kind):
            raise CorruptFile(f"{where}: {name} is {raw.get(name)!r}, not what a recorder writes")
    for name in ("broadcast", "reply"):
        if Path(raw[name]).name != raw[name]:
            raise CorruptFile(f"{where}: {name} {raw[name]!r} lies outside the recording")
    if not raw["node"].isdecimal():
        raise CorruptFile(f"{where}: node {raw['node']!r}, expected digits")
    if raw["kind"] not in ("gradient", "delta"):
        raise CorruptFile(f"{where}: kind {raw['kind']!r}, expected 'gradient' or 'delta'")
    if raw["view"] not in ("client", "aggregate") or raw["clients"] < 1:
        raise CorruptFile(f"{where}: a {raw['view']!r} of {raw['clients']} clients")
    return Entry(**{name: raw[name] for name in _KINDS})


def _write_manifest(directory: Path, entries: Sequence[Entry]) -> None:
    if not entries:
        return
    content = {
        "schema_version": SCHEMA_VERSION,
        "entries": [dataclasses.asdict(entry) for entry in entries],
    }
    write_whole(directory / MANIFEST, jsonsafe.dumps(content, indent=1) + "\n")


def _image(tensors: Mapping[str, Tensor]) -> bytes:
    whole = {
        k: v.detach().cpu().clone(memory_format=torch.contiguous_format) for k, v in tensors.items()
    }
    return safetensors.torch.save(whole)


@contextlib.contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """Be the only process that writes here, where the system has file locks."""
    with (directory / ".lock").open("w") as file:
        try:
            import fcntl

            fcntl.flock(file.fileno(), fcntl.LOCK_EX)
        except (ImportError, OSError):  # Windows, or a file system without locks
            pass
        yield
