"""unet-denoiser: the U-Net of diffusion models."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unet_denoiser.attention import CrossAttention as CrossAttention
    from unet_denoiser.attention import SelfAttention as SelfAttention
    from unet_denoiser.config import UNetConfig as UNetConfig
    from unet_denoiser.layers import ResBlock as ResBlock
    from unet_denoiser.layers import SinusoidalPosEmb as SinusoidalPosEmb
    from unet_denoiser.unet import UNet as UNet

__version__ = "0.1.0"

_WHERE = {
    "UNet": "unet",
    "UNetConfig": "config",
    "ResBlock": "layers",
    "SinusoidalPosEmb": "layers",
    "SelfAttention": "attention",
    "CrossAttention": "attention",
}
__all__ = ["__version__", *_WHERE]


def __getattr__(name: str) -> Any:
    """Import each public name when it is first used, so that `import unet_denoiser` costs next to nothing."""
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
