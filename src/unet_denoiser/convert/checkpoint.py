"""Read a checkpoint of any layout, and write one."""

import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Self

from torch import Tensor

from unet_denoiser.config.base import ForeignFormat, QKVOrder, check_choice, check_names
from unet_denoiser.config.paths import local_path
from unet_denoiser.config.unet import UNetConfig
from unet_denoiser.convert import architecture
from unet_denoiser.convert.checkpoint_files import CONFIG_NAME, find_config, read_state, save_state
from unet_denoiser.convert.diffusers_config import from_diffusers, has_linear_projections, to_diffusers
from unet_denoiser.convert.diffusers_weights import check_weights
from unet_denoiser.convert.key_maps import LAYOUTS
from unet_denoiser.convert.layout import BlockStructure, Layout, Packing, Shapes
from unet_denoiser.convert.state_dict import FormatVariant, to_foreign, to_internal
from unet_denoiser.utils.files import read_json

# layers that are replaced in a network, to give it other inputs or outputs: the axis of an option
_SHAPE_OPTIONS = {
    "input_conv.weight": (1, "in_channels"),
    "output.2.weight": (0, "out_channels"),
    "class_embedding.weight": (0, "num_classes"),
    "vector_embedding.0.weight": (1, "vector_dim"),
    "time_cond.weight": (1, "time_cond_dim"),
}
FOREIGN_OPTIONS = ("ema", "variant", "prefix", "qkv_order")  # of `ForeignCheckpoint.open`, beside the architecture's


@dataclass(frozen=True, eq=False)
class ForeignCheckpoint:
    """A checkpoint of other code, read and recognised by `open`.

    layout: "compvis", "diffusers", "ddpm" or "edm", a key of `LAYOUTS`. tensors: the U-Net's, under the file's names.
    kind: one of the kinds of files of the layout. diffusers_config: its `config.json`, if there is one.
    """

    path: Path
    layout: str
    config: UNetConfig
    tensors: dict[str, Tensor] = field(repr=False)
    kind: FormatVariant = field(repr=False)
    diffusers_config: dict[str, Any] | None = field(repr=False)

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        ema: bool = False,
        variant: str | None = None,
        prefix: str | None = None,
        torch_dtype: Any = None,
        qkv_order: QKVOrder | None = None,
        **options: Any,
    ) -> Self:
        """Read a checkpoint, and recognise its layout and architecture.

        Args:
            path: a diffusers folder, or a .safetensors, .ckpt, .pt, .pth or .bin file. The config.json beside a file
                of a diffusers folder is read too.
            ema: take the averaged weights of a file that has both.
            variant: the weights to take of a folder that has several, for example "fp16".
            prefix: the network to take of a file that has several, as the error names them.
            torch_dtype: the dtype of the weights; by default the file's, or the widest if it has several.
            qkv_order: the order in which an ADM file packs query, key and value, if its network is not a known one.
            options: fields of `UNetConfig` that names and shapes do not tell: `num_heads` or `head_dim`, `image_size`;
                for a diffusers file without config.json also those that the error names.

        Raises:
            FileNotFoundError, ValueError: a file that is missing, damaged, of another family, or not clear enough.
        """
        known = [*(field.name for field in fields(UNetConfig)), *FOREIGN_OPTIONS, "torch_dtype", "subfolder"]
        check_names("U-Net option", options, known)
        path, diffusers_config = local_path(path), None
        config_path = find_config(path)
        found = {} if config_path is None else read_json(config_path)
        if config_path is not None and (path.is_dir() or "_class_name" in found):
            diffusers_config = found
        elif path.is_dir():
            raise FileNotFoundError(f"{path} has no {CONFIG_NAME}")
        if diffusers_config is not None and path.is_dir():  # another class is told by its name, before its tensors
            from_diffusers(diffusers_config)
        tensors = read_state(path, ema=ema, variant=variant, prefix=prefix, torch_dtype=torch_dtype)
        layout = architecture.detect_layout(tensors)
        if layout != "diffusers":
            diffusers_config = None
        structure = architecture.detect_structure(layout, tensors)
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        inferred = architecture.infer_options(layout, shapes, structure)
        cosines_first, preset_name = LAYOUTS[layout].cosines_first, None
        if diffusers_config is not None:
            stated, cosines_first = from_diffusers(diffusers_config)
            check_weights(diffusers_config, inferred, structure)
            inferred |= stated
        image_size = options.get("image_size", (diffusers_config or {}).get("sample_size"))
        options = _place_attention(image_size, structure) | options
        if "num_heads" in inferred:
            config = _use_head_dim(UNetConfig(**inferred | options))
        else:
            untold = architecture.list_untold(layout, inferred)
            try:
                config, preset_name = architecture.fill_from_preset(inferred, options, untold)
            except ValueError:  # before asking for heads, say that they would not help
                architecture.check_complete(layout, shapes, structure, inferred)
                raise
            cosines_first = config.time_frequencies == "half" if untold else cosines_first
            if untold and preset_name:
                warnings.warn(
                    f"{path}: no {CONFIG_NAME} is beside it; its shapes are those of {preset_name}, from which "
                    f"the rest is taken: heads, {', '.join(untold)}",
                    stacklevel=2,
                )
        if layout == "diffusers":
            config = architecture.note_conventions(config, structure, cosines_first)
        packing = _choose_packing(LAYOUTS[layout], tensors, config, qkv_order, preset_name)
        kind = FormatVariant(LAYOUTS[layout], structure, config.heads, packing, cosines_first)
        return cls(path, layout, config, tensors, kind, diffusers_config)

    def parameters(self, shapes: Shapes) -> dict[str, Tensor]:
        """Return the parameters under our names; most share the memory of `tensors`.

        `shapes` are those of a `UNet` of this `config`. Raise ValueError for tensors that are missing, left over or of
        another shape, by name.
        """
        try:
            return to_internal(self.tensors, shapes, self.kind)
        except ValueError as error:
            raise ValueError(f"{architecture.describe(self.config)}, but {error}") from None


def import_checkpoint(path: str | Path, shapes: Shapes, **options: Any) -> tuple[UNetConfig, dict[str, Tensor]]:
    """Return the architecture of a foreign checkpoint, and its parameters under our names.

    Args:
        path, options: as for `ForeignCheckpoint.open`, which tells the architecture and raises the same errors.
        shapes: names and shapes of the parameters of a `UNet` of that architecture; ValueError if they do not fit.
    """
    checkpoint = ForeignCheckpoint.open(path, **options)
    return checkpoint.config, checkpoint.parameters(shapes)


def export_state_dict(
    state: Mapping[str, Tensor], config: UNetConfig, layout: str, *, qkv_order: QKVOrder | None = None
) -> dict[str, Tensor]:
    """Return our parameters under the names of a layout.

    Args:
        layout: "compvis" (ADM, LDM, Stable Diffusion), "diffusers", "ddpm" or "edm".
        qkv_order: the order of packed attention (default: as in the published network, "legacy" for most).

    Raises:
        ValueError: a parameter that the layout has no place for, or that has another shape than `config` says.
    """
    for name, (axis, option) in _SHAPE_OPTIONS.items():
        if name in state and (found := state[name].shape[axis]) != (stated := getattr(config, option)):
            raise ValueError(
                f"{name} is {tuple(state[name].shape)}, and {option}={stated}; give the configuration of the network "
                f"as it is: dataclasses.replace(model.config, {option}={found})"
            )
    # DDPM's spacing comes with DDPM's order in the other layouts
    cosines_first = config.cosines_first if layout == "diffusers" else config.time_frequencies == "half"
    packing = LAYOUTS[layout].packing or qkv_order or architecture.published_order(config)
    structure, linear = BlockStructure.from_config(config), has_linear_projections(config)
    return to_foreign(state, FormatVariant(LAYOUTS[layout], structure, config.heads, packing, cosines_first, linear))


def export_checkpoint(
    state: Mapping[str, Tensor], config: UNetConfig, path: Path, to: ForeignFormat, *, qkv_order: QKVOrder | None = None
) -> None:
    """Write our parameters as other tools read them.

    Args:
        to: "diffusers" (a folder), or a .safetensors file: "adm" (ADM, improved-diffusion), "ldm" (the same names below
            model.diffusion_model: LDM, Stable Diffusion) or "ddpm" (the PyTorch port of DDPM).

    Raises:
        ValueError: an option or a parameter that the format has no counterpart for, by name.
    """
    check_choice("to", to, ForeignFormat)
    if to == "diffusers":
        diffusers_config = to_diffusers(config)
        return save_state(export_state_dict(state, config, "diffusers"), path, diffusers_config)
    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: the format {to!r} is one file; give a name that ends in .safetensors")
    theirs = export_state_dict(state, config, "ddpm" if to == "ddpm" else "compvis", qkv_order=qkv_order)
    save_state({f"model.diffusion_model.{n}" if to == "ldm" else n: t for n, t in theirs.items()}, path)


def _choose_packing(
    layout: Layout, names: Collection[str], config: UNetConfig, qkv_order: QKVOrder | None, preset_name: str | None
) -> Packing:
    """Return how a file packs query, key and value; ValueError if that is not known, or `qkv_order` is of no use."""
    is_open = layout.packing is None and any(".qkv." in name for name in names)
    if qkv_order is not None and not is_open:
        raise ValueError(f"qkv_order={qkv_order!r}: this file does not leave the order open; leave it out")
    has_heads = any(config.heads(level) > 1 for level in range(len(config.widths)))
    if is_open and has_heads and qkv_order is None and preset_name is None:
        raise ValueError("the file does not tell how it packs query, key and value; give qkv_order='legacy' or 'new'")
    return layout.packing or qkv_order or architecture.published_order(config)


def _use_head_dim(config: UNetConfig) -> UNetConfig:
    """Give heads that are as wide at every level by their width, as the presets do."""
    if not isinstance(config.num_heads, tuple):
        return config
    head_dims = {width // heads for width, heads in zip(config.widths, config.num_heads, strict=True)}
    return replace(config, num_heads=None, head_dim=head_dims.pop()) if len(head_dims) == 1 else config


def _place_attention(size: Any, structure: BlockStructure) -> dict[str, Any]:
    """Return the options that put attention where the checkpoint has it, in a network for images of this size."""
    sizes = [size] if isinstance(size, int) else size
    if not isinstance(sizes, list | tuple) or not sizes or not all(type(n) is int and n > 0 for n in sizes):
        return {}  # not told, or for `UNetConfig` to refuse
    resolutions = [-(-max(sizes) // 2**level) for level in range(structure.levels)]
    attended = tuple(r for r, has in zip(resolutions, structure.attended, strict=True) if has)
    # two levels of one resolution cannot differ in attention; then the size says less than the layout
    agrees = tuple(r in attended for r in resolutions) == structure.attended
    return {"image_size": size, "attention_resolutions": attended} if agrees else {}
