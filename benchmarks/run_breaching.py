"""Run breaching's own `invertinggradients` on a case; only for breaching's environment.

breaching normalises outside the network and searches in normalised units; gradleak's networks hold
the normalisation as their first layer. Both views of the same function can be run:

    pixels        the network as it is, metadata mean 0 and standard deviation 1
    normalised    breaching's usual one: first layer removed, metadata mean 0.5 and deviation 0.25
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from dataclasses import dataclass
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
from cases import Case, slug  # noqa: E402

from gradleak.models.layers import Normalize  # noqa: E402
from gradleak.types import Batch  # noqa: E402

SETUP = {"dtype": torch.float, "device": torch.device("cpu")}
DEFAULT_ITERATIONS = 24_000
LARGEST_RELATIVE_DIFFERENCE = 1e-4
COST_ROUNDS = 3


class Network(nn.Module):
    """breaching calls a model with its whole data block."""

    def __init__(self, layers: nn.Module) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, inputs: Tensor, **block: Tensor) -> Tensor:
        outputs: Tensor = self.layers(inputs)
        return outputs


@dataclass(frozen=True)
class Peer:
    """breaching, ready to attack the targets of a case in one view.

    Attributes:
        case: what is attacked.
        network: as breaching calls it.
        payload: what its server sends.
        mean, std: of the view; its inputs are (pixels − mean) / std.
    """

    case: Case
    network: Network
    payload: dict[str, Any]
    mean: float
    std: float

    @classmethod
    def of(cls, case: Case, *, view: str) -> Peer:
        layers, mean, std = case.network, 0.0, 1.0
        if view == "normalised":
            if not isinstance(layers, nn.Sequential) or not isinstance(layers[0], Normalize):
                raise SystemExit("the first layer does not normalise: expected --view pixels")
            mean, std = float(layers[0].mean), float(layers[0].std)
            layers = layers[1:]
        network = Network(layers).eval()
        payload = {
            "parameters": [p.detach() for p in network.parameters()],
            "buffers": list(network.buffers()),
            "metadata": SimpleNamespace(
                shape=case.spec.shape,
                mean=[mean] * case.spec.shape[0],
                std=[std] * case.spec.shape[0],
                modality="vision",
                classes=case.spec.classes,
            ),
        }
        return cls(case, network, payload, mean, std)

    def check_gradient(self, target: int) -> None:
        """Let breaching's own user compute the gradient, and insist that it is the case's."""
        settings = SimpleNamespace(
            num_data_points=self.case.batch_size,
            provide_labels=True,
            provide_num_data_points=True,
            provide_buffers=False,
            local_diff_privacy={
                "gradient_noise": 0.0,
                "input_noise": 0.0,
                "distribution": "gaussian",
            },
        )
        loader = SimpleNamespace(name="case")
        user = UserSingleStep(self.network, nn.CrossEntropyLoss(), loader, SETUP, 0, settings)
        user.data_key = "inputs"
        truth = self.case.batch(target)
        block = {"inputs": (truth.inputs - self.mean) / self.std, "labels": truth.labels}
        shared, _ = user.compute_local_updates(self.payload, block)
        if any(module.training for module in user.model.modules()):
            raise SystemExit("breaching's user is in training mode: expected evaluation mode")
        got = torch.cat([g.flatten() for g in shared["gradients"]])
        expected = torch.cat([g.flatten() for g in self.case.gradient(target).values()])
        difference = float((got - expected).norm() / expected.norm())
        if difference > LARGEST_RELATIVE_DIFFERENCE:
            raise SystemExit(f"breaching's gradient differs from the case's by {difference:.1e}")
        print(f"same gradient in breaching's user, evaluation mode (difference {difference:.1e})")

    def attack(self, target: int, *, iterations: int) -> tuple[Batch, float]:
        """One trial with breaching's published settings, labels given: claim and CPU seconds."""
        settings = breaching.get_attack_config("invertinggradients")
        settings.optim.max_iterations = iterations
        settings.optim.callback = iterations
        labels = self.case.labels[target]
        shared = {
            "gradients": list(self.case.gradient(target).values()),
            "buffers": None,
            "metadata": {
                "num_data_points": self.case.batch_size,
                "labels": labels,
                "local_hyperparams": None,
            },
        }
        torch.manual_seed(target)
        loss = nn.CrossEntropyLoss()
        attacker = breaching.attacks.prepare_attack(self.network, loss, settings, SETUP)
        before = time.process_time()
        claim, _ = attacker.reconstruct([self.payload], [shared], {})
        seconds = time.process_time() - before
        if any(m.training for model in attacker._rec_models for m in model.modules()):
            raise SystemExit("breaching's attacker is in training mode: expected evaluation mode")
        return Batch(claim["data"] * self.std + self.mean, labels), seconds


def attack_case(peer: Peer, *, title: str, iterations: int, targets: list[int]) -> None:
    """Attack each target by itself."""
    warm = False
    for target in targets:
        if peer.case.done(title, "labels", target):
            continue
        peer.check_gradient(target)
        if not warm:  # the first call pays for compiling the objective
            peer.attack(target, iterations=2)
            warm = True
        claim, seconds = peer.attack(target, iterations=iterations)
        peer.case.append(title, "labels", target, claim, seconds, iterations=iterations)


def write_cost(peer: Peer, *, title: str, iterations: int) -> None:
    """Measure CPU seconds per iteration on the first target, and keep them beside the case."""
    peer.check_gradient(0)
    peer.attack(0, iterations=2)
    spent = [peer.attack(0, iterations=iterations)[1] / iterations for _ in range(COST_ROUNDS)]
    cost = statistics.median(spent)
    record = {
        "attack": title,
        "iterations": iterations,
        "rounds": spent,
        "cpu_seconds_per_iteration": cost,
        "default_iterations": DEFAULT_ITERATIONS,
        "default_cpu_seconds": cost * DEFAULT_ITERATIONS,
        "torch": torch.__version__,
    }
    file = peer.case.folder / f"cost-{slug(title)}.json"
    file.write_text(json.dumps(record, indent=1) + "\n")
    print(f"{title}: {1e3 * cost:.2f} ms an iteration, {cost * DEFAULT_ITERATIONS:.0f} CPU s")


def main() -> None:
    """Parse the command line; attack the case, or measure what an iteration costs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--iterations", type=int, default=DEFAULT_ITERATIONS)
    parser.add_argument("--view", choices=("pixels", "normalised"), default="pixels")
    parser.add_argument("--targets", help="such as 0,3; all by default")
    parser.add_argument("--cost", action="store_true", help="only measure so many iterations")
    given = parser.parse_args()
    torch.set_num_threads(1)
    case = Case.read(given.folder)
    peer = Peer.of(case, view=given.view)
    title = "breaching" if given.view == "pixels" else "breaching normalised"
    if given.cost:
        write_cost(peer, title=title, iterations=given.iterations)
    else:
        attack_case(
            peer,
            title=f"{title}:iterations={given.iterations}",
            iterations=given.iterations,
            targets=case.chosen(given.targets),
        )


if __name__ == "__main__":
    main()
