"""A network as exported files hold it: float32 inputs by name, one float32 output, and nothing optional."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from unet_denoiser.config.unet import UNetConfig
from unet_denoiser.diffusion.process import Diffusion
from unet_denoiser.models.unet import UNet

AXES = {1: ("length",), 2: ("height", "width"), 3: ("depth", "height", "width")}


class InputSpec(NamedTuple):
    """One input of an exported network.

    Args:
        shape: a name stands for an axis of any length.
        meaning: for its README.
        classes: the number of values of an integer input.
    """

    dtype: torch.dtype
    shape: tuple[int | str, ...]
    meaning: str
    classes: int = 0


def input_specs(config: UNetConfig, process: Diffusion) -> dict[str, InputSpec]:
    """Return the inputs of an exported network by name, in the order of its arguments."""
    space, channels = AXES[config.dims], process.data_channels(config)
    image = lambda count: ("batch", count, *space)  # noqa: E731
    specs = {
        "x": InputSpec(torch.float32, image(channels), "c_in x_t"),
        "t": InputSpec(torch.float32, ("batch",), "the time of the noise level"),
    }
    if process.self_conditioning:
        specs["x0_estimate"] = InputSpec(torch.float32, image(channels), "x0 of the step before, zero in the first")
    if (count := process.concat_channels(config)) > 0:
        specs["concat"] = InputSpec(torch.float32, image(count), "the image that the network sees")
    if config.num_classes:
        specs["class_labels"] = InputSpec(
            torch.int64, ("batch",), f"classes 0 to {config.num_classes - 1}", config.num_classes
        )
    if config.vector_dim:
        specs["vector"] = InputSpec(torch.float32, ("batch", config.vector_dim), "the numbers")
    if config.context_dim:
        specs["context"] = InputSpec(torch.float32, ("batch", "tokens", config.context_dim), "tokens of the captions")
        specs["context_mask"] = InputSpec(torch.bool, ("batch", "tokens"), "False at padding")
    if config.time_cond_dim:
        specs["time_cond"] = InputSpec(torch.float32, ("batch", config.time_cond_dim), "the embedded guidance scale")
    if config.learned_null:
        for name in config.conditions:
            specs[f"drop_{name}"] = InputSpec(torch.bool, ("batch",), f"True to go without {name}")
    return specs


def least_size(config: UNetConfig) -> int:
    """Return the least length of an axis in a file of any size: two positions at the coarsest level."""
    return 2 ** (len(config.widths) - 1) + 1


class ExportedNetwork(nn.Module):
    """A `UNet` with the arguments of `input_specs`, in their order.

    Args:
        model: in the precision of the export; it is called in evaluation mode.
        names: of the inputs.
    """

    def __init__(self, model: UNet, names: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *inputs: Tensor) -> Tensor:
        return call_network(self.model, dict(zip(self.names, inputs, strict=True)))


def call_network(model: UNet, inputs: Mapping[str, Tensor]) -> Tensor:
    """Call a network with the inputs of its exported form; return its output in float32."""
    given = dict(inputs)
    parts = [given.pop(name) for name in ("x", "x0_estimate", "concat") if name in given]
    drop = {name: given.pop(f"drop_{name}") for name in model.config.conditions if f"drop_{name}" in given}
    t = given.pop("t")
    given = {name: value.to(model.dtype) if value.is_floating_point() else value for name, value in given.items()}
    x = torch.cat(parts, dim=1).to(model.dtype)
    return model(x, t, **given, drop=drop).float()
