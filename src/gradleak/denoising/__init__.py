"""Diffusion models: how images are noised, a network that denoises them, and how it draws."""

from gradleak.denoising.networks import denoises
from gradleak.denoising.sampling import ddim, grid, guided_output
from gradleak.denoising.schedule import SCHEDULES, Prediction, Schedule
from gradleak.denoising.unet import UNet

__all__ = [
    "SCHEDULES",
    "Prediction",
    "Schedule",
    "UNet",
    "ddim",
    "denoises",
    "grid",
    "guided_output",
]
