"""Run breaching's own `invertinggradients` on a case folder; only for breaching's environment.

breaching normalises outside the network and searches in normalised units; gradleak's networks hold
the normalisation as their first layer. Both views of the same function are run:

    breaching           its usual one: first layer removed, metadata mean 0.5 and std 0.25
    breaching pixels    the network as it is, metadata mean 0 and std 1
"""

from __future__ import annotations

import argparse
import time
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

# torchvision's compiled operators need its own torch build; declaring them lets it import.
OPERATORS = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
OPERATORS.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")  # type: ignore[no-untyped-call]
OPERATORS.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")  # type: ignore[no-untyped-call]
warnings.filterwarnings("ignore", category=DeprecationWarning)
warnings.filterwarnings("ignore", category=FutureWarning)
warnings.filterwarnings("ignore", category=UserWarning)

import breaching  # noqa: E402
from breaching.cases.users import UserSingleStep  # noqa: E402
from case_folder import append, done, gradient_file, read_case  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from gradleak.models.layers import Normalize  # noqa: E402

SETUP = {"dtype": torch.float, "device": torch.device("cpu")}
LARGEST_RELATIVE_DIFFERENCE = 1e-4


class Network(nn.Module):
    """breaching calls a model with its whole data block."""

    def __init__(self, layers: nn.Module) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, inputs: Tensor, **block: Tensor) -> Tensor:
        outputs: Tensor = self.layers(inputs)
        return outputs


def check_gradient(
    network: Network, payload: dict[str, Any], inputs: Tensor, label: Tensor, want: list[Tensor]
) -> None:
    """Let breaching's own user compute the gradient, and insist that it is the case's."""
    settings = SimpleNamespace(
        num_data_points=1,
        provide_labels=True,
        provide_num_data_points=True,
        provide_buffers=False,
        local_diff_privacy={"gradient_noise": 0.0, "input_noise": 0.0, "distribution": "gaussian"},
    )
    loader = SimpleNamespace(name="case")
    user = UserSingleStep(network, nn.CrossEntropyLoss(), loader, SETUP, 0, settings)
    user.data_key = "inputs"
    shared, _ = user.compute_local_updates(payload, {"inputs": inputs, "labels": label})
    if any(module.training for module in user.model.modules()):
        raise SystemExit("breaching's user is in training mode: expected evaluation mode")
    got = torch.cat([g.flatten() for g in shared["gradients"]])
    expected = torch.cat([g.flatten() for g in want])
    difference = float((got - expected).norm() / expected.norm())
    if difference > LARGEST_RELATIVE_DIFFERENCE:
        raise SystemExit(f"breaching's gradient differs from the case's by {difference:.1e}")
    print(f"same gradient in breaching's user, evaluation mode (difference {difference:.1e})")


def attack_case(folder: Path, *, iterations: int, pixels: bool) -> None:
    """Attack each gradient by itself, labels known, one trial, breaching's published settings."""
    layers, spec, truth = read_case(folder)
    normalize = layers[0]
    if not isinstance(normalize, Normalize):
        raise SystemExit("the first layer does not normalise: expected convnet or resnet18")
    mean, std = (0.0, 1.0) if pixels else (float(normalize.mean), float(normalize.std))
    network = Network(layers if pixels else layers[1:]).eval()
    names = [name for name, _ in layers.named_parameters()]
    payload = {
        "parameters": [p.detach() for p in network.parameters()],
        "buffers": list(network.buffers()),
        "metadata": SimpleNamespace(
            shape=spec.shape,
            mean=[mean] * 3,
            std=[std] * 3,
            modality="vision",
            classes=spec.classes,
        ),
    }
    settings = breaching.get_attack_config("invertinggradients")
    settings.optim.max_iterations = iterations
    settings.optim.callback = iterations
    title = "breaching pixels" if pixels else "breaching"
    warm = False
    for i in range(len(truth["images"])):
        if done(folder, title, iterations, i):
            continue
        stored = load_file(gradient_file(folder, i))
        gradient = [stored[name] for name in names]
        label = truth["labels"][i : i + 1]
        check_gradient(network, payload, (truth["images"][i : i + 1] - mean) / std, label, gradient)
        shared = {
            "gradients": gradient,
            "buffers": None,
            "metadata": {"num_data_points": 1, "labels": label, "local_hyperparams": None},
        }
        torch.manual_seed(i)
        attacker = breaching.attacks.prepare_attack(network, nn.CrossEntropyLoss(), settings, SETUP)
        if not warm:  # the first call pays for compiling the objective
            attacker.reconstruct([payload], [shared], {}, dryrun=True)
            torch.manual_seed(i)
            warm = True
        before = time.process_time()
        claim, _ = attacker.reconstruct([payload], [shared], {})
        seconds = time.process_time() - before
        if any(m.training for model in attacker._rec_models for m in model.modules()):
            raise SystemExit("breaching's attacker is in training mode: expected evaluation mode")
        append(folder, title, iterations, i, claim["data"] * std + mean, truth["images"], seconds)


def main() -> None:
    """Parse the command line and attack the case in one view or both."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--iterations", type=int, required=True)
    parser.add_argument("--view", choices=("normalised", "pixels", "both"), default="both")
    given = parser.parse_args()
    torch.set_num_threads(1)
    for view in ("normalised", "pixels"):
        if given.view in (view, "both"):
            attack_case(given.folder, iterations=given.iterations, pixels=view == "pixels")


if __name__ == "__main__":
    main()
