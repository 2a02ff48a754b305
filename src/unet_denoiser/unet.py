"""The U-Net: predicts the noise in x_t at timestep t (Ronneberger et al. 2015; Ho et al. 2020, DDPM)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from unet_denoiser.attention import ContextAttention, SelfAttention, SpatialTransformer
from unet_denoiser.config import UNetConfig
from unet_denoiser.conv import CONV, channels_last
from unet_denoiser.convert import read
from unet_denoiser.convert.files import weight_files
from unet_denoiser.files import read_json
from unet_denoiser.inputs import check_inputs
from unet_denoiser.layers import (
    AveragePool,
    Block,
    ClassEmbedding,
    Context,
    Downsample,
    NearestUpsample,
    ResBlock,
    TimeMLP,
    TransposedUpsample,
    full_precision,
    group_norm,
    zero,
)
from unet_denoiser.presets import preset
from unet_denoiser.pretrained import Pretrained, fetch, signature_of


class UNet(Pretrained, nn.Module):
    """Predicts the noise in a noisy image, signal or volume at each timestep.

    The arguments are `UNetConfig`'s, described there; `UNet()` is the network of the specification. The instance keeps
    them as `config`. With L levels of n residual blocks, encoder[i * (n + 1) + j] is block j of level i (j = n is the
    downsampling after it), and decoder[(L - 1 - i) * (n + 1) + j] its counterpart, whose last entry j = n ends with the
    upsampling to level i - 1.

    Raises:
        ValueError, TypeError: an option that cannot work.
    """

    config_class = UNetConfig

    @signature_of(UNetConfig)
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        self.config = c = UNetConfig(*args, **kwargs)
        self.gradient_checkpointing = False
        build, last = _Builder(c), len(c.widths) - 1

        self.time_mlp = TimeMLP(c.model_channels, c.time_frequencies)
        self.time_cond = nn.Linear(c.time_cond_dim, c.model_channels, bias=False) if c.time_cond_dim else None
        self.class_embedding = ClassEmbedding(c.num_classes, c.time_dim) if c.num_classes else None
        self.vector_embedding = build.vector_embedding() if c.vector_dim else None
        self.null_class = build.null(c.num_classes and c.time_dim)
        self.null_vector = build.null(c.vector_dim and c.time_dim)
        self.null_context = build.null(c.context_dim)

        self.input_conv = CONV[c.dims](c.in_channels, c.stem_width, 3, padding=1)
        ch, skips = c.stem_width, [channels for _, channels in c.skip_levels]
        self.encoder = nn.ModuleList()
        for level, width in enumerate(c.widths):
            for _ in range(c.num_res_blocks):
                self.encoder.append(Block([build.res(ch, width), *build.attention(level)]))
                ch = width
            if level < last:
                self.encoder.append(build.downsample(ch))

        self.bottleneck = nn.ModuleList([build.res(ch, ch), *build.attention(last, always=True), build.res(ch, ch)])

        self.decoder = nn.ModuleList()
        for level, width in reversed(list(enumerate(c.widths))):
            for j in range(c.num_res_blocks + 1):
                block = Block([build.res(ch + skips.pop(), width), *build.attention(level)])
                ch = width
                if level > 0 and j == c.num_res_blocks:
                    block.append(build.upsample(ch))
                self.decoder.append(block)

        # what FSDP gathers and frees as one
        parts = [*self.encoder, *self.bottleneck, *self.decoder]
        self._no_split_modules = sorted({type(part).__name__ for part in parts})

        conv_out = zero(CONV[c.dims](ch, c.out_channels, 3, padding=1))
        self.output = nn.Sequential(group_norm(ch, c.norm_groups, c.norm_eps), nn.SiLU(), conv_out)

    @classmethod
    def from_preset(cls, name: str, **options: Any) -> Self:
        """A randomly initialised network of a published architecture, `options` changing single fields.

        Raises:
            ValueError: a name that `list_presets` does not have.
        """
        return cls.from_config(replace(preset(name), **options))

    @classmethod
    def _read(
        cls, source: str | Path, config_path: Path | None, hub: dict[str, Any], options: dict[str, Any]
    ) -> tuple[Self, dict[str, Tensor]]:
        """Our own format, or any that `unet_denoiser.convert` reads; `options` then say what a file does not tell."""
        if config_path is not None and "_class_name" not in read_json(config_path):
            return super()._read(source, config_path, hub, options)
        path = Path(source)
        if config_path is not None:
            path = weight_files(lambda name: fetch(source, name, hub), options.get("variant"))[0].parent
        empty: list[Self] = []

        def shapes_of(config: UNetConfig) -> dict[str, torch.Size]:
            empty.append(cls._empty(config))
            return {name: p.shape for name, p in empty[0].state_dict().items()}

        _, state = read(path, shapes_of, **options)
        return empty[0], state

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        context: Tensor | None = None,
        *,
        context_mask: Tensor | None = None,
        class_labels: Tensor | None = None,
        vector: Tensor | None = None,
        time_cond: Tensor | None = None,
        drop: Mapping[str, Tensor] | None = None,
        skip_residuals: Sequence[Tensor] | None = None,
        bottleneck_residual: Tensor | None = None,
    ) -> Tensor:
        """Predict, for every sample of a batch, what the noisy input hides (the noise, unless trained otherwise).

        Args:
            x: (B, in_channels, *spatial), any size of at least 1 per axis.
            t: (B,) timesteps, integer or float.
            context: (B, S, context_dim) tokens for cross-attention.
            context_mask: (B, S) bool, False at padding. A row without any True counts as an absent context.
            class_labels: (B,) integers in [0, num_classes), or (B, num_classes) weights of the classes' embeddings.
            vector: (B, vector_dim).
            time_cond: (B, time_cond_dim); without it nothing is added to the sinusoids.
            drop: which samples have a condition replaced by its learned null: {"class_labels": (B,) bool, ...}.
            skip_residuals: added to the skips, one tensor each, from the input convolution on (control networks).
            bottleneck_residual: added to the bottleneck's output.

        Returns:
            (B, out_channels, *spatial).

        Raises:
            ValueError, TypeError: a condition the network was not built for, one that is missing while
                learned_null=False, or a wrong shape, range or dtype; before anything is computed.
        """
        conditions = {"class_labels": class_labels, "vector": vector, "context": context}
        residuals = (skip_residuals, bottleneck_residual)
        check_inputs(self.config, self.dtype, x, t, conditions, context_mask, time_cond, drop, *residuals)
        with full_precision(x.device.type):
            emb, attended = self._embed(t, conditions, context_mask, time_cond, drop or {})

        h = self.input_conv(channels_last(x))
        skips = [h]
        for block in self.encoder:
            h = self._run(block, h, emb, attended)
            skips.append(h)

        for block in self.bottleneck:
            h = self._run(block, h, emb, attended)

        if skip_residuals is not None:
            skips = [skip + residual for skip, residual in zip(skips, skip_residuals, strict=True)]
        if bottleneck_residual is not None:
            h = h + bottleneck_residual

        for block in self.decoder:
            h = torch.cat([h, skips.pop()], dim=1)
            h = self._run(block, h, emb, attended, (skips[-1] if skips else h).shape[2:])

        out = self.output(h)
        return out.contiguous() if x.is_contiguous() else out

    @property
    def dtype(self) -> torch.dtype:
        """dtype of the weights, and of the input that goes with them."""
        return self.input_conv.weight.dtype

    def enable_gradient_checkpointing(self) -> None:
        """Keep only the blocks' inputs for the backward pass and compute the rest again: less memory, more time."""
        self.gradient_checkpointing = True

    def disable_gradient_checkpointing(self) -> None:
        """Keep all activations for the backward pass (the default)."""
        self.gradient_checkpointing = False

    def _run(self, block: nn.Module, *args: Any) -> Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *args, use_reentrant=False)
        return block(*args)

    def _embed(
        self,
        t: Tensor,
        conditions: Mapping[str, Tensor | None],
        mask: Tensor | None,
        time_cond: Tensor | None,
        drop: Mapping[str, Tensor],
    ) -> tuple[Tensor, Context | None]:
        """The embedding (B, time_dim) that all blocks share, and the context that cross-attention sees."""
        shift = None
        if self.time_cond is not None and time_cond is not None:
            shift = self.time_cond(time_cond.to(self.dtype))  # in half precision it may come, under autocast
        emb = self.time_mlp(t, shift)
        for name, embed, null in (
            ("class_labels", self.class_embedding, self.null_class),
            ("vector", self.vector_embedding, self.null_vector),
        ):
            if embed is not None:
                given = conditions[name]
                if given is not None and given.is_floating_point():
                    given = given.to(self.dtype)
                emb = emb + (null if given is None else _replace(embed(given), null, drop.get(name)))
        if self.config.context_dim is None:
            return emb, None
        return emb, _context(conditions["context"], mask, drop.get("context"), self.null_context, t.shape[0])


class _Builder:
    """The layers of one network, with the arguments they share said once."""

    def __init__(self, config: UNetConfig) -> None:
        self.config = config
        self.norm: dict[str, Any] = {"norm_groups": config.norm_groups, "norm_eps": config.norm_eps}

    def res(self, in_ch: int, out_ch: int, resample: Any = "none") -> ResBlock:
        c = self.config
        return ResBlock(
            in_ch, out_ch, c.time_dim, c.dropout, dims=c.dims, modulation=c.modulation, resample=resample, **self.norm
        )

    def attention(self, level: int, always: bool = False) -> list[nn.Module]:
        c = self.config
        width, heads = c.widths[level], c.heads(level)
        if not (always or c.has_attention(level)):
            return []
        if c.attention == "transformer":
            options: dict[str, Any] = {"cross_only": c.cross_only(level), "norm_groups": c.norm_groups}
            return [SpatialTransformer(width, heads, c.context_dim, c.depth(level), **options)]
        if c.context_dim is None:
            return [SelfAttention(width, heads, **self.norm)]
        return [SelfAttention(width, heads, **self.norm), ContextAttention(width, c.context_dim, heads, **self.norm)]

    def downsample(self, ch: int) -> nn.Module:
        kind, dims = self.config.downsample, self.config.dims
        if kind == "resblock":
            return self.res(ch, ch, "down")
        return AveragePool() if kind == "avgpool" else Downsample(ch, dims, asymmetric=kind == "conv_asymmetric")

    def upsample(self, ch: int) -> nn.Module:
        kind, dims = self.config.upsample, self.config.dims
        if kind == "resblock":
            return self.res(ch, ch, "up")
        return TransposedUpsample(ch, dims) if kind == "conv_transpose" else NearestUpsample(ch, dims)

    def vector_embedding(self) -> nn.Module:
        c = self.config
        return nn.Sequential(nn.Linear(c.vector_dim or 0, c.time_dim), nn.SiLU(), nn.Linear(c.time_dim, c.time_dim))

    def null(self, width: int | None) -> nn.Parameter | None:
        return nn.Parameter(torch.zeros(width)) if width and self.config.learned_null else None


def _replace(value: Tensor, null: Tensor | None, where: Tensor | None) -> Tensor:
    """`value` (B, D), with `null` (D,) in the rows of `where` (B,)."""
    return value if where is None or null is None else torch.where(where[:, None], null, value)


def _context(
    tokens: Tensor | None, mask: Tensor | None, drop: Tensor | None, null: Tensor | None, batch: int
) -> Context:
    """The tokens with everything that does not count replaced by the null, and a mask that has no empty row.

    Padding is replaced as well, so that whatever it holds (NaN even) has no effect. A row with nothing left, because
    it was dropped or is all padding, attends to the null: the learned one, or zeros without learned_null.
    """
    if tokens is None:
        assert null is not None  # check_inputs
        return Context(null.expand(batch, 1, -1))
    if mask is None and drop is None:
        return Context(tokens)
    counts = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device) if mask is None else mask
    if drop is not None:
        counts = counts & ~drop[:, None]
    tokens = torch.where(counts[..., None], tokens, torch.zeros_like(tokens[0, 0]) if null is None else null)
    return Context(tokens, counts | ~counts.any(dim=1, keepdim=True))
