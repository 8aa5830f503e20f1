"""The names users import, and what importing costs."""

from __future__ import annotations

import subprocess
import sys

import pytest

import gradleak


def test_every_public_name_resolves_and_there_are_few() -> None:
    assert len(gradleak.__all__) <= 25
    assert gradleak.__all__ == sorted(gradleak.__all__)
    for name in gradleak.__all__:
        assert getattr(gradleak, name, None) is not None, name
    assert set(dir(gradleak)) >= set(gradleak.__all__)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'atack'"):
        gradleak.atack  # noqa: B018


HEAVY = ("flwr", "ray", "transformers", "diffusers", "opacus", "tenseal", "phe", "torchvision")


def test_importing_loads_no_optional_world() -> None:
    code = (
        "import sys, gradleak, gradleak.attacks, gradleak.run, gradleak.cli;"
        f"print([m for m in {HEAVY} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_importing_the_package_alone_does_not_load_torch() -> None:
    code = "import sys, gradleak; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
