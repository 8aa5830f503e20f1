"""A user's own network by `module:factory`."""

from __future__ import annotations

import itertools
import sys
import textwrap

import pytest
import torch

from gradleak.errors import InvalidInput
from gradleak.models import build
from gradleak.types import DataSpec

SPEC = DataSpec.image((1, 6, 6), 3)
NUMBERS = itertools.count()
SOURCE = """
import torch
from torch import nn

def net(classes=3, side=6):
    return nn.Sequential(nn.Flatten(), nn.Linear(side * side, classes))

def plain(): return net()
def for_data(data): return net(data.classes, data.shape[-1])
def named(spec=None): return net(spec.classes)
def with_defaults(width=3): return net(width)
class Small(nn.Sequential):
    def __init__(self, spec): super().__init__(nn.Flatten(), nn.Linear(36, spec.classes))
def normalised(): return nn.Sequential(nn.Flatten(), nn.BatchNorm1d(36), nn.Linear(36, 3))
def in_double(): return net().double()

made = net()
number = 3
def returns_text(): return "net"
def raises(): raise RuntimeError("first line\\nsecond line")
def too_few_classes(): return net(2)
def wrong_input(): return net(side=7)
def frozen(): return net().requires_grad_(False)
def empty(): return nn.Flatten()
def infinite():
    model = net()
    model[1].bias.data.fill_(float("inf"))
    return model
class Pair(nn.Module):
    def __init__(self): super().__init__(); self.net = net()
    def forward(self, x): return self.net(x), x
def two_arguments(a, b): return net()
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    name = f"networks_of_a_user_{next(NUMBERS)}"
    (tmp_path / f"{name}.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p != ""])
    yield name
    sys.modules.pop(name, None)


@pytest.mark.parametrize(
    "factory",
    ["plain", "for_data", "named", "with_defaults", "Small", "normalised", "in_double", "net"],
)
def test_factories_are_found_in_the_working_directory(module, factory):
    before = torch.get_rng_state()
    first, again, other = (build(f"{module}:{factory}", SPEC, seed=s) for s in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    weights = [next(p for p in m.parameters() if p.ndim == 2) for m in (first, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert first.training


def test_the_check_leaves_batch_statistics_alone(module):
    model = build(f"{module}:normalised", SPEC, seed=0)
    assert int(model[1].num_batches_tracked) == 0


@pytest.mark.parametrize(
    ("factory", "words"),
    [
        ("made", "expected a function"),
        ("number", "expected a function"),
        ("plane", "did you mean 'plain'"),
        ("returns_text", "returned a str"),
        ("raises", "RuntimeError: first line"),
        ("too_few_classes", "returns (2, 2)"),
        ("wrong_input", "fails on a batch of two"),
        ("frozen", "no trainable parameter"),
        ("empty", "no trainable parameter"),
        ("infinite", "non-finite"),
        ("Pair", "returns tuple"),
        ("two_arguments", "TypeError"),
        ("a:b", "expected MODULE:FACTORY"),
        ("", "expected MODULE:FACTORY"),
    ],
)
def test_what_cannot_be_audited_is_one_clear_line(module, factory, words):
    with pytest.raises(InvalidInput) as caught:
        build(f"{module}:{factory}", SPEC, seed=0)
    message = str(caught.value)
    assert words in message
    assert module in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (None, "No module named"),
        ("import a_package_that_is_missing", "a_package_that_is_missing"),
        ("def broken(:", "SyntaxError"),
        ("raise SystemError('at import')", "at import"),
        ("raise SystemExit(3)", "SystemExit"),
    ],
)
def test_modules_that_cannot_be_imported(tmp_path, monkeypatch, source, words):
    name = f"broken_networks_{next(NUMBERS)}"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    if source is not None:
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(source))
    with pytest.raises(InvalidInput) as caught:
        build(f"{name}:net", SPEC, seed=0)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
