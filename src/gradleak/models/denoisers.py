"""Networks that clients of a diffusion model train: (x_t (b, *shape), times (b,)) → (b, *shape)."""

from __future__ import annotations

from torch import Tensor, nn

from gradleak.denoising import UNet
from gradleak.errors import InvalidInput
from gradleak.types import DataSpec


def unet(spec: DataSpec) -> nn.Module:
    """The package's own U-Net, 16 channels wide."""
    return UNet(spec.shape[0], width=16)


def unet_wide(spec: DataSpec) -> nn.Module:
    """The same twice as wide."""
    return UNet(spec.shape[0], width=32)


class DiffusersUNet(nn.Module):
    """`diffusers.UNet2DModel` without attention, called as other denoisers are.

    Its attention would work, too (`sdpa_kernel` of plain operations is set where gradients are
    differentiated), at several times the cost.
    """

    def __init__(self, spec: DataSpec, *, width: int = 16) -> None:
        super().__init__()
        try:
            from diffusers.models.unets.unet_2d import UNet2DModel
        except ImportError as error:
            raise InvalidInput(
                f"model 'unet-diffusers' needs diffusers ({error}): expected "
                "pip install 'gradleak[diffusion]'"
            ) from error
        channels, *sides = spec.shape
        self.unet = UNet2DModel(
            sample_size=tuple(sides),
            in_channels=channels,
            out_channels=channels,
            layers_per_block=1,
            block_out_channels=(width, 2 * width, 2 * width),
            down_block_types=("DownBlock2D",) * 3,
            up_block_types=("UpBlock2D",) * 3,
            norm_num_groups=8,
            add_attention=False,
        )

    def forward(self, x: Tensor, times: Tensor) -> Tensor:
        found: Tensor = self.unet(x, times, return_dict=False)[0]
        return found
