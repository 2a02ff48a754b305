"""The U-Net of diffusion models: predicts the noise in x_t at timestep t (Ronneberger et al. 2015; Ho et al. 2020)."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from unet_denoiser.config.base import signature_of
from unet_denoiser.config.presets import preset
from unet_denoiser.config.unet import UNetConfig
from unet_denoiser.convert.checkpoint import ForeignCheckpoint
from unet_denoiser.convert.checkpoint_files import find_weights
from unet_denoiser.models.conditions import Conditions
from unet_denoiser.models.fetch import fetch
from unet_denoiser.models.input_checks import check_inputs
from unet_denoiser.models.layers.attention import ContextAttention, SelfAttention, SpatialTransformer
from unet_denoiser.models.layers.common import full_precision, input_device, input_dtype, join_graph, zero_init
from unet_denoiser.models.layers.context import Context, build_context
from unet_denoiser.models.layers.conv import CONV
from unet_denoiser.models.layers.embeddings import ClassEmbedding, TimeMLP, VectorEmbedding
from unet_denoiser.models.layers.norm import group_norm
from unet_denoiser.models.layers.resampling import AveragePool, Downsample, NearestUpsample, TransposedUpsample
from unet_denoiser.models.layers.resblock import Block, ResBlock
from unet_denoiser.models.layers.rules import preferred_layout
from unet_denoiser.models.pretrained import Pretrained, is_own, load_strictly


class UNet(Pretrained, nn.Module):
    """Predicts the noise in a noisy image, signal or volume at each timestep.

    `UNetConfig` describes the arguments and raises for those that cannot work; the instance keeps them as `config`.
    `UNet()` is the network of the specification. With L levels of n residual blocks, encoder[i * (n + 1) + j] is block
    j of level i, or its downsampling for j = n; decoder[(L - 1 - i) * (n + 1) + j] is the counterpart, and ends with
    the upsampling for j = n.
    """

    config_class = UNetConfig

    @signature_of(UNetConfig)
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        self.config, self.gradient_checkpointing = UNetConfig(*args, **kwargs), False
        c, build, last = self.config, _LayerBuilder(self.config), len(self.config.widths) - 1

        self.time_mlp = TimeMLP(c.model_channels, c.time_frequencies)
        self.time_cond = nn.Linear(c.time_cond_dim, c.model_channels, bias=False) if c.time_cond_dim else None
        self.class_embedding = ClassEmbedding(c.num_classes, c.time_dim) if c.num_classes else None
        self.vector_embedding = VectorEmbedding(c.vector_dim, c.time_dim) if c.vector_dim else None
        self.null_class = build.null(c.num_classes and c.time_dim)
        self.null_vector = build.null(c.vector_dim and c.time_dim)
        self.null_context = build.null(c.context_dim)

        self.input_conv = CONV[c.dims](c.in_channels, c.stem_width, 3, padding=1)
        ch, skips = c.stem_width, [channels for _, channels in c.skip_levels]
        self.encoder = nn.ModuleList()
        for level, width in enumerate(c.widths):
            for _ in range(c.num_res_blocks):
                self.encoder.append(Block(build.resblock(ch, width), *build.attention(level)))
                ch = width
            if level < last:
                self.encoder.append(build.downsample(ch))

        self.bottleneck = nn.ModuleList([build.resblock(ch, ch), *build.attention(last, always=True)])
        self.bottleneck.append(build.resblock(ch, ch))

        self.decoder = nn.ModuleList()
        for level, width in reversed(list(enumerate(c.widths))):
            for j in range(c.num_res_blocks + 1):
                block = Block(build.resblock(ch + skips.pop(), width), *build.attention(level))
                ch = width
                if level > 0 and j == c.num_res_blocks:
                    block.append(build.upsample(ch))
                self.decoder.append(block)

        conv_out = zero_init(CONV[c.dims](ch, c.out_channels, 3, padding=1))
        self.output = nn.Sequential(group_norm(ch, c.norm_groups, c.norm_eps), nn.SiLU(), conv_out)

        # accelerate wraps these classes for FSDP, which gathers and frees the parameters of each block at once
        self._no_split_modules = sorted({type(b).__name__ for b in [*self.encoder, *self.bottleneck, *self.decoder]})

    @classmethod
    def from_preset(cls, name: str, **options: Any) -> Self:
        """Build a published architecture with random weights; `options` replace fields of its configuration."""
        return cls.from_config(replace(preset(name), **options))

    @classmethod
    def from_checkpoint(cls, checkpoint: ForeignCheckpoint) -> Self:
        """Build the network of an opened checkpoint of other code, in evaluation mode; they share the weights.

        Raises:
            ValueError: tensors that do not fit the architecture exactly, by name.
        """
        model = cls._build_on_meta(checkpoint.config)
        shapes = {name: p.shape for name, p in model.state_dict().items()}
        load_strictly(model, checkpoint.parameters(shapes), checkpoint.path)
        return model.eval()

    @classmethod
    def _load(cls, source: str | Path, config_path: Path | None, hub: dict[str, Any], options: dict[str, Any]) -> Self:
        """Load our own format, or one that `ForeignCheckpoint` opens; `options` state what such a file leaves open."""
        if is_own(path := Path(source), config_path):
            return super()._load(source, config_path, hub, options)
        if not path.is_file():
            path = find_weights(lambda name: fetch(source, name, hub), options.get("variant"))[0].parent
        return cls.from_checkpoint(ForeignCheckpoint.open(path, **options))

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
        """Predict the noise in x, or what else the network was trained to predict: (B, out_channels, *spatial).

        Args:
            x: (B, in_channels, *spatial), any size of at least 1 per axis.
            t: (B,) timesteps, integer or float.
            context: (B, S, context_dim) tokens for cross-attention.
            context_mask: (B, S) bool, False at padding. A sample without any True has no context.
            class_labels: (B,) integers in [0, num_classes), or (B, num_classes) weights of the class embeddings.
            vector: (B, vector_dim).
            time_cond: (B, time_cond_dim); without it nothing is added to the sinusoids.
            drop: samples whose condition is replaced by its learned null: {"class_labels": (B,) bool, ...}.
            skip_residuals: tensors to add to the skips, from the input convolution on (ControlNet).
            bottleneck_residual: tensor to add to the bottleneck's output (ControlNet).

        Raises:
            ValueError, TypeError: a condition the network was not built for, one that is missing while
                learned_null=False, or a wrong shape, range or dtype; before anything is computed.
        """
        conditions = Conditions(class_labels, vector, context, context_mask, time_cond=time_cond)
        residuals: dict[str, Any] = {"skip_residuals": skip_residuals, "bottleneck_residual": bottleneck_residual}
        check_inputs(self.config, self.dtype, x, t, conditions, drop=drop, **residuals)
        with full_precision(x.device.type):
            emb = self.embed_time(t, time_cond)  # (B, time_dim)
            added, attended = self.embed_conditions(t.shape[0], conditions, drop or {})
            emb = sum(added, start=emb)

        skips = self.encode_shallow(x, emb, attended)  # (B, stem_width, *spatial) alone
        h = self.deep_features(skips[-1], emb, attended, **residuals)
        if skip_residuals is not None:
            skips = [skips[0] + skip_residuals[0]]
        out = self.decode_shallow(h, skips, emb, attended)
        return out.contiguous() if x.is_contiguous() else out  # inside, a CPU works with channels last

    @property
    def dtype(self) -> torch.dtype:
        """dtype of the input, and of the weights unless they are quantised, or stored in 8 bits."""
        return input_dtype(self, self.input_conv)

    @property
    def device(self) -> torch.device:
        """Device of the input, and of the weights unless accelerate offloads them."""
        return input_device(self, self.input_conv)

    def enable_gradient_checkpointing(self) -> None:
        """Keep only the blocks' inputs for the backward pass and compute the rest again: less memory, more time."""
        self.gradient_checkpointing = True

    def disable_gradient_checkpointing(self) -> None:
        """Keep all activations for the backward pass (the default)."""
        self.gradient_checkpointing = False

    # ---- the parts of forward, which sampling/cached_unet.py calls one by one ---------------------------------------

    def embed_time(self, t: Tensor, time_cond: Tensor | None = None) -> Tensor:
        """Embed timesteps (B,) as (B, time_dim), without the other conditions."""
        if self.time_cond is None or time_cond is None:
            unused = [] if self.time_cond is None else self.time_cond.parameters()
            return join_graph(self.time_mlp(t, dtype=self.dtype), unused)
        return self.time_mlp(t, self.time_cond(time_cond.to(self.dtype)), self.dtype)  # autocast may give float16

    def embed_conditions(
        self, batch: int, conditions: Conditions, drop: Mapping[str, Tensor]
    ) -> tuple[list[Tensor], Context | None]:
        """Return the terms (B, time_dim) that class and vector add to the time embedding, and the context."""
        c, added = conditions, []
        if self.class_embedding is not None:
            added.append(self._embed(self.class_embedding, c.class_labels, self.null_class, drop.get("class_labels")))
        if self.vector_embedding is not None:
            added.append(self._embed(self.vector_embedding, c.vector, self.null_vector, drop.get("vector")))
        if self.config.context_dim is None:
            return added, None
        return added, build_context(c.context, c.context_mask, drop.get("context"), self.null_context, batch)

    def _embed(self, embedding: nn.Module, value: Tensor | None, null: Tensor | None, dropped: Tensor | None) -> Any:
        """Embed a condition: (B, D), with `null` (D,) at the `dropped` samples (B,) or, without a value, alone."""
        if value is None:
            return None if null is None else join_graph(null, embedding.parameters())
        embedded = embedding(value.to(self.dtype) if value.is_floating_point() else value)
        if dropped is None or null is None:
            return join_graph(embedded, [null])
        return torch.where(dropped[:, None], null, embedded)

    def encode_shallow(self, x: Tensor, emb: Tensor, context: Context | None, depth: int = 1) -> list[Tensor]:
        """Compute the first `depth` skips, which the decoder's last `depth` blocks take."""
        skips = [self.input_conv(preferred_layout(x))]
        for block in list(self.encoder)[: depth - 1]:
            skips.append(self._run(block, skips[-1], emb, context))
        return skips

    def deep_features(
        self,
        h: Tensor,
        emb: Tensor,
        context: Context | None,
        depth: int = 1,
        *,
        skip_residuals: Sequence[Tensor] | None = None,
        bottleneck_residual: Tensor | None = None,
    ) -> Tensor:
        """Compute the input of the decoder's last `depth` blocks from the last shallow skip: most of the work."""
        size, skips = h.shape[2:], []
        for block in list(self.encoder)[depth - 1 :]:
            skips.append(h := self._run(block, h, emb, context))
        for block in self.bottleneck:  # h: (B, widths[-1], *coarsest)
            h = self._run(block, h, emb, context)
        if skip_residuals is not None:
            skips = [skip + residual for skip, residual in zip(skips, skip_residuals[depth:], strict=True)]
        if bottleneck_residual is not None:
            h = h + bottleneck_residual
        return self._decode(list(self.decoder)[:-depth], h, skips, emb, context, size=size)

    def decode_shallow(self, h: Tensor, skips: list[Tensor], emb: Tensor, context: Context | None) -> Tensor:
        """Compute the output from deep features and the shallow skips, one for each of the decoder's last blocks."""
        blocks, size = list(self.decoder)[-len(skips) :], skips[0].shape[2:]
        return self.output(self._decode(blocks, h, skips, emb, context, size=size))

    def _decode(
        self,
        blocks: list[nn.Module],
        h: Tensor,
        skips: list[Tensor],
        emb: Tensor,
        context: Context | None,
        *,
        size: Any,
    ) -> Tensor:
        """Run blocks with a skip each; each upsamples to the size of the next skip, the last one to `size`."""
        sizes = [size, *(skip.shape[2:] for skip in skips)]
        for i, block in zip(reversed(range(len(skips))), blocks, strict=True):
            h = self._run(block, torch.cat([h, skips[i]], dim=1), emb, context, sizes[i])
        return h

    def _run(self, block: nn.Module, *args: Any) -> Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *args, use_reentrant=False)
        return block(*args)


class _LayerBuilder:
    """Builds the layers of one network from its configuration."""

    def __init__(self, config: UNetConfig) -> None:
        self.config = config
        self.norm: dict[str, Any] = {"norm_groups": config.norm_groups, "norm_eps": config.norm_eps}

    def resblock(self, in_ch: int, out_ch: int, resample: Any = "none") -> ResBlock:
        c = self.config
        options: Any = {"dims": c.dims, "modulation": c.modulation, "resample": resample, **self.norm}
        return ResBlock(in_ch, out_ch, c.time_dim, c.dropout, **options)

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
            return self.resblock(ch, ch, "down")
        return AveragePool() if kind == "avgpool" else Downsample(ch, dims, asymmetric=kind == "conv_asymmetric")

    def upsample(self, ch: int) -> nn.Module:
        kind, dims = self.config.upsample, self.config.dims
        if kind == "resblock":
            return self.resblock(ch, ch, "up")
        return TransposedUpsample(ch, dims) if kind == "conv_transpose" else NearestUpsample(ch, dims)

    def null(self, width: int | None) -> nn.Parameter | None:
        return nn.Parameter(torch.zeros(width)) if width and self.config.learned_null else None
