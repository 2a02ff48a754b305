"""Our network inside diffusers' pipelines: the call, names and configuration of their U-Nets."""

import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch import Tensor, nn

from unet_denoiser.convert.checkpoint import export_checkpoint
from unet_denoiser.convert.diffusers_config import to_diffusers
from unet_denoiser.models.conditions import join_text_and_sizes
from unet_denoiser.models.unet import UNet


class DiffusersUNet(nn.Module):
    """A `UNet` with the call and `.config` of UNet2DConditionModel or UNet2DModel, for `DiffusionPipeline(unet=...)`.

    Raises:
        ValueError: an option of the `model` that diffusers' networks do not have.
    """

    def __init__(self, model: UNet) -> None:
        super().__init__()
        self.model = model
        config = to_diffusers(model.config)
        parameters = inspect.signature(getattr(diffusers, config["_class_name"]).__init__).parameters
        defaults = {name: p.default for name, p in parameters.items() if name != "self"}
        self.config = FrozenDict(defaults | config | {"_diffusers_version": diffusers.__version__})
        self.encoder_hid_proj = None

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        encoder_hidden_states: Tensor | None = None,
        class_labels: Tensor | None = None,
        timestep_cond: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        added_cond_kwargs: dict[str, Tensor] | None = None,
        down_block_additional_residuals: tuple[Tensor, ...] | None = None,
        mid_block_additional_residual: Tensor | None = None,
        down_intrablock_additional_residuals: tuple[Tensor, ...] | None = None,
        encoder_attention_mask: Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        """Predict as UNet2DConditionModel does: (B, C, H, W) in `.sample`, or in a tuple with return_dict=False.

        Raises:
            ValueError: arguments that this network does not take (T2I adapters, attention arguments).
        """
        refused: dict[str, Any] = {"attention_mask": attention_mask, "cross_attention_kwargs": cross_attention_kwargs}
        refused["down_intrablock_additional_residuals"] = down_intrablock_additional_residuals
        for name, value in refused.items():
            if value is not None and len(value):
                raise ValueError(f"{name} has no counterpart in this network")
        vector = self._vector(added_cond_kwargs) if added_cond_kwargs else None
        if self.config.get("class_embed_type") == "projection":
            class_labels, vector = None, class_labels
        out = self.model(
            sample,
            torch.as_tensor(timestep, device=sample.device).expand(len(sample)),
            encoder_hidden_states,
            context_mask=_context_mask(encoder_attention_mask),
            class_labels=class_labels,
            vector=vector,
            time_cond=timestep_cond,
            skip_residuals=down_block_additional_residuals,
            bottleneck_residual=mid_block_additional_residual,
        )
        return UNet2DConditionOutput(sample=out) if return_dict else (out,)

    def _vector(self, added: dict[str, Tensor]) -> Tensor:
        """Join SDXL's pooled text and its sizes, each of 128 cosines and 128 sines: (B, vector_dim)."""
        if set(added) != {"text_embeds", "time_ids"}:
            other = [name for name in added if name not in ("text_embeds", "time_ids")]
            found = f"has {other[0]!r}" if other else f"has {', '.join(added)} alone"
            raise ValueError(f"added_cond_kwargs {found}; this network takes text_embeds with time_ids, or nothing")
        return join_text_and_sizes(self.model.config, added["text_embeds"], added["time_ids"])

    @property
    def add_embedding(self) -> Any:
        """Return what the SDXL pipelines read to check the vector's width."""
        embedding = None if self.config.get("class_embed_type") == "projection" else self.model.vector_embedding
        return None if embedding is None else SimpleNamespace(linear_1=embedding.get_submodule("0"))

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of the weights."""
        return self.model.dtype

    @property
    def device(self) -> torch.device:
        """Return the device of the weights."""
        return self.model.device

    def enable_gradient_checkpointing(self) -> None:
        """Keep only the blocks' inputs for the backward pass."""
        self.model.enable_gradient_checkpointing()

    def disable_gradient_checkpointing(self) -> None:
        """Keep all activations for the backward pass."""
        self.model.disable_gradient_checkpointing()

    def save_pretrained(self, save_directory: str | Path, **_: Any) -> None:
        """Write a folder that diffusers loads as its own class; pipelines call it."""
        export_checkpoint(self.model.state_dict(), self.model.config, Path(save_directory), "diffusers")

    def __getattr__(self, name: str) -> Any:
        """Find parameters and modules; for what else diffusers' networks have, say what to do instead."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if not hasattr(diffusers.UNet2DConditionModel, name):
                raise
            about = next((advice for key, advice in _ADVICE.items() if key in name), _OTHERWISE)
            raise AttributeError(f"DiffusersUNet has no {name}; {about}") from None


_OTHERWISE = "for this, load the weights into diffusers' own class: unet.save_pretrained(folder) writes them for it"
_ADVICE = {
    "lora": "merge_lora(unet.model, file) merges a LoRA into the weights",
    "adapter": "merge_lora(unet.model, file) merges a LoRA into the weights; IP-Adapters are not supported",
    "attn_procs": "merge_lora(unet.model, file) merges a LoRA into the weights",
}


def _context_mask(mask: Tensor | None) -> Tensor | None:
    """Turn a mask of ones and zeros into bools; a sample of zeros alone attends to all tokens, as in diffusers."""
    if mask is None:
        return None
    keep = mask.bool()
    return keep | ~keep.any(dim=1, keepdim=True)
