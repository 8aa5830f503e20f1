"""The store: append-only, torn lines tolerated, one writer."""

from pathlib import Path

import pytest

from gradleak.errors import CorruptFile, InvalidInput
from gradleak.run.store import Store, read_trials, write_whole


def record(key: str, **more: object) -> dict[str, object]:
    return {"key": key, "tensors": f"tensors/{key}.safetensors", **more}


def test_records_survive(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        store.append(record("a", value=float("nan")), tensors=b"numbers")
        store.append(record("b"))
        assert "a" in store
        assert "c" not in store
    with Store(tmp_path) as store:
        assert list(store.records) == ["a", "b"]
    assert (tmp_path / "tensors" / "a.safetensors").read_bytes() == b"numbers"


@pytest.mark.parametrize("kept", [0, 1, 7])
def test_a_torn_last_line_is_dropped(tmp_path: Path, kept: int) -> None:
    with Store(tmp_path) as store:
        store.append(record("a"))
    whole = (tmp_path / "trials.jsonl").read_bytes()
    (tmp_path / "trials.jsonl").write_bytes(whole + whole[:kept])
    (tmp_path / "tensors" / ".b.safetensors.tmp").write_bytes(b"half")
    with Store(tmp_path) as store:
        assert list(store.records) == ["a"]
        store.append(record("b"))
    assert not list((tmp_path / "tensors").glob("*.tmp"))
    assert list(read_trials(tmp_path / "trials.jsonl")[0]) == ["a", "b"]


def test_the_last_record_of_a_key_counts(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        store.append(record("a", state="error"))
        store.append(record("a", state="measured"))
    assert read_trials(tmp_path / "trials.jsonl")[0]["a"]["state"] == "measured"


@pytest.mark.parametrize("line", [b"{broken}\n", b"[1]\n", b'{"no": "key"}\n', b"\xff\xfe\n"])
def test_a_corrupt_line_is_named(tmp_path: Path, line: bytes) -> None:
    (tmp_path / "trials.jsonl").write_bytes(b'{"key": "a"}\n' + line)
    with pytest.raises(CorruptFile, match="line 2"):
        Store(tmp_path)


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    with Store(tmp_path), pytest.raises(InvalidInput, match="another gradleak process"):
        Store(tmp_path)
    with Store(tmp_path):
        pass


def test_a_file_is_whole_or_absent(tmp_path: Path) -> None:
    write_whole(tmp_path / "x", "one")
    write_whole(tmp_path / "x", "two")
    assert [p.name for p in tmp_path.iterdir()] == ["x"]
    assert (tmp_path / "x").read_text() == "two"
