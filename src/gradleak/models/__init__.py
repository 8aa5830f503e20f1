"""Networks that clients train: those built in, and the user's own by `module:factory`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from gradleak.defenses.cvb import cvb
from gradleak.defenses.precode import precode
from gradleak.errors import InvalidInput, nearest
from gradleak.mechanisms import Denoising, DenoisingAvg, Diffusing
from gradleak.models.cafe import cafe, cafe_small
from gradleak.models.cnn6 import cnn6
from gradleak.models.convnet import convnet, convnet_bn
from gradleak.models.denoisers import DiffusersUNet, unet, unet_wide
from gradleak.models.factory import Factory, check_outputs, user_factory
from gradleak.models.lenet import lenet, lenet_tiny
from gradleak.models.mlp import mlp
from gradleak.models.resnet import resnet18
from gradleak.models.seeding import seeded
from gradleak.models.training import STAGES, accuracy, stage_steps, train
from gradleak.models.vit import vit_tiny
from gradleak.models.weights import load_weights, save_weights
from gradleak.types import DataSpec, Mechanism

__all__ = [
    "MODELS",
    "STAGES",
    "ModelAbout",
    "accuracy",
    "build",
    "check_task",
    "load_weights",
    "save_weights",
    "stage_steps",
    "train",
]


@dataclass(frozen=True, slots=True)
class ModelAbout:
    """What a reader needs to know about a built-in network."""

    id: str
    title: str
    factory: Factory
    batch_norm: bool = False
    denoiser: bool = False


MODELS: dict[str, ModelAbout] = {
    about.id: about
    for about in (
        ModelAbout("mlp", "One hidden layer of 128 ReLU units", mlp),
        ModelAbout("lenet", "DLG's LeNet: sigmoids, weights U(-0.5, 0.5)", lenet),
        ModelAbout("lenet-tiny", "Two sigmoid convolutions for 8x8 digits", lenet_tiny),
        ModelAbout("convnet", "Four ReLU convolutions without batch normalisation", convnet),
        ModelAbout(
            "convnet-bn", "Four ReLU convolutions, batch-normalised", convnet_bn, batch_norm=True
        ),
        ModelAbout("cnn6", "R-GAP's six LeakyReLU convolutions, no biases", cnn6),
        ModelAbout("cafe", "CAFE's four parties, a quadrant of the image each", cafe),
        ModelAbout("cafe-small", "The same a quarter as wide", cafe_small),
        ModelAbout(
            "resnet18", "ResNet-18 with a 3x3 stem for small images", resnet18, batch_norm=True
        ),
        ModelAbout("vit-tiny", "Patches, positions, two attention blocks, no residuals", vit_tiny),
        ModelAbout("unet", "U-Net of diffusion models, 16 channels wide", unet, denoiser=True),
        ModelAbout("unet-wide", "The same, 32 channels wide", unet_wide, denoiser=True),
        ModelAbout("unet-diffusers", "UNet2DModel of diffusers", DiffusersUNet, denoiser=True),
    )
}

_ALTERED: dict[str, Callable[[nn.Module, DataSpec], nn.Module]] = {
    "+precode": lambda model, spec: precode(model),
    "+cvb": lambda model, spec: cvb(model, spec.shape),
}
"""Protections that change the network, by what its name ends in."""


def check_task(name: str, core: Mechanism) -> None:
    """Refuse a built-in network that does not do what clients train, by its name alone.

    Raises:
        InvalidInput: a classifier for clients that denoise, or the other way round.
    """
    about = MODELS.get(name.partition("+")[0])
    if about is None or about.denoiser == isinstance(core, Diffusing):
        return
    if isinstance(core, Diffusing):
        known = [each.id for each in MODELS.values() if each.denoiser]
        raise InvalidInput(
            f"--model {name} is a classifier and {core.id} trains denoisers: expected one of "
            f"{', '.join(known)}, or your own MODULE:FACTORY"
        )
    raise InvalidInput(
        f"--model {name} is a denoiser: expected --mechanism {Denoising.id} or {DenoisingAvg.id}, "
        "or a classifier such as lenet"
    )


def build(name: str, spec: DataSpec, *, seed: int) -> nn.Module:
    """Build the network called `name` for data of form `spec`.

    Args:
        name: an identifier of `MODELS`, or `package.module:factory` for the user's own network;
            either may end in "+precode" or "+cvb", which puts a variational bottleneck before
            its head or behind its first convolution.
        spec: form of the data; the network maps (b, *spec.shape) to (b, spec.classes) logits, or
            images with times (b,) to images.
        seed: fixes the initial weights; torch's global random state is left as it was.

    Raises:
        InvalidInput: unknown name, or a network that does not fit the data.
    """
    for ending, alter in _ALTERED.items():
        if name.endswith(ending):
            model = build(name.removesuffix(ending), spec, seed=seed)
            with seeded(seed):
                return alter(model, spec)
    if name in MODELS:
        if spec.modality != "image":
            raise InvalidInput(f"model {name!r} takes images: the data are {spec.modality}")
        with seeded(seed):
            return MODELS[name].factory(spec)
    if ":" not in name:
        raise InvalidInput(f"unknown model {name!r}: {nearest(name, [*MODELS, 'module:factory'])}")
    if name.partition(":")[0] in MODELS:
        raise InvalidInput(f"model {name!r}: {name.partition(':')[0]!r} has no fields")
    with seeded(seed):  # a module may draw numbers when it is imported, which happens once
        factory = user_factory(name)
    with seeded(seed):
        model = factory(spec)
        check_outputs(model, spec, name=name)
    return model
