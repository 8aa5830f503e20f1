"""Weights as safetensors."""

from __future__ import annotations

import pickle

import pytest
import torch
from safetensors.torch import save_file

from gradleak.errors import CorruptFile, GradleakError, InvalidInput
from gradleak.models import build, load_weights, save_weights
from gradleak.types import DataSpec, ModelState

SPEC = DataSpec.image((1, 4, 4), 2)


def small(*, seed: int = 0) -> torch.nn.Module:
    return build("mlp", SPEC, seed=seed)


def tensors() -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in small().state_dict().items()}


@pytest.mark.parametrize("name", ["mlp", "lenet-tiny", "resnet18"])
def test_what_is_saved_comes_back(tmp_path, name):
    saved = ModelState.of(build(name, SPEC, seed=0))
    save_weights(saved, tmp_path / "w.safetensors")
    model = build(name, SPEC, seed=1)
    untouched = next(model.parameters()).clone()
    state = load_weights(tmp_path / "w.safetensors", model)
    assert state.model is model
    assert torch.equal(next(model.parameters()), untouched)
    assert state.params.keys() == saved.params.keys()
    assert state.buffers.keys() == saved.buffers.keys()
    for mine, yours in ((state.params, saved.params), (state.buffers, saved.buffers)):
        assert all(torch.equal(mine[k], yours[k]) for k in yours)
    assert [p.name for p in tmp_path.iterdir()] == ["w.safetensors"]


def test_a_state_dict_saved_by_pytorch_users_fits(tmp_path):
    save_file({k: v.double() for k, v in tensors().items()}, tmp_path / "w.safetensors")
    state = load_weights(str(tmp_path / "w.safetensors"), small(seed=1))
    assert state.params["2.weight"].dtype == torch.float32
    assert torch.equal(state.params["2.weight"], tensors()["2.weight"])


def test_tied_weights_need_one_entry(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    model[1].weight = model[0].weight
    save_weights(ModelState.of(model), tmp_path / "w.safetensors")
    assert load_weights(tmp_path / "w.safetensors", model).params.keys() == {
        "0.weight",
        "0.bias",
        "1.bias",
    }


def test_wrong_names_shapes_and_numbers_are_refused(tmp_path):
    path = tmp_path / "w.safetensors"
    right = tensors()
    weight = right["2.weight"]
    cases = [
        ({k: v for k, v in right.items() if k != "2.weight"}, "missing 2.weight, unknown nothing"),
        ({**right, "extra": weight.clone()}, "unknown extra"),
        ({f"net.{k}": v for k, v in right.items()}, "and 3 more"),
        ({**right, "2.weight": weight.T.contiguous()}, "(16, 128), the model has (128, 16)"),
        ({**right, "2.weight": weight * torch.nan}, "non-finite"),
    ]
    for stored, words in cases:
        save_file(stored, path)
        with pytest.raises(InvalidInput) as caught:
            load_weights(path, small())
        assert words in str(caught.value)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)


class Planted:
    """Unpickling it would set `ran`."""

    ran = False

    def __reduce__(self):
        return (setattr, (Planted, "ran", True))


@pytest.mark.parametrize("save", ["zip", "legacy", "plain"])
def test_a_pickle_posing_as_safetensors_is_never_opened(tmp_path, save):
    path = tmp_path / "w.safetensors"
    if save == "plain":
        path.write_bytes(pickle.dumps(Planted()))
    else:
        torch.save(Planted(), path, _use_new_zipfile_serialization=save == "zip")
    with pytest.raises(CorruptFile, match="pickle"):
        load_weights(path, small())
    assert not Planted.ran


def test_damaged_files_are_refused(tmp_path):
    path = tmp_path / "w.safetensors"
    save_weights(ModelState.of(small()), path)
    whole = path.read_bytes()
    lengths = [0, 1, 4, 7, 8, 9, 100, len(whole) // 2, len(whole) - 1]
    for content in [*(whole[:n] for n in lengths), whole + b"\x00", b"\xff" * 64, b"text"]:
        path.write_bytes(content)
        with pytest.raises(CorruptFile) as caught:
            load_weights(path, small())
        assert "\n" not in str(caught.value)
    for position in range(0, 700, 3):
        damaged = bytearray(whole)
        damaged[position] ^= 0xFF
        path.write_bytes(damaged)
        try:
            load_weights(path, small())
        except GradleakError as error:
            message = str(error)
        else:
            message = "read"
        assert "\n" not in message


def test_files_that_cannot_be_read_or_written(tmp_path):
    with pytest.raises(InvalidInput, match="no weights file"):
        load_weights(tmp_path / "lost.safetensors", small())
    with pytest.raises(InvalidInput, match="cannot read"):
        load_weights(tmp_path, small())
    with pytest.raises(InvalidInput, match="cannot write"):
        save_weights(ModelState.of(small()), tmp_path / "no" / "such" / "w.safetensors")
