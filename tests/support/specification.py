"""The specification's components as it prints them, as oracles; a line that had to change is marked `repaired`."""

import math

import torch
import torch.nn.functional as F
from torch import nn


class ResBlock(nn.Module):
    def __init__(self, in_ch, out_ch, time_emb_dim, dropout=0.1):
        super().__init__()
        self.norm1 = nn.GroupNorm(32, in_ch)
        self.conv1 = nn.Conv2d(in_ch, out_ch, 3, padding=1)

        self.time_mlp = nn.Linear(time_emb_dim, out_ch)

        self.norm2 = nn.GroupNorm(32, out_ch)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_ch, out_ch, 3, padding=1)

        if in_ch != out_ch:
            self.skip = nn.Conv2d(in_ch, out_ch, 1)
        else:
            self.skip = nn.Identity()

    def forward(self, x, t_emb):
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.time_mlp(F.silu(t_emb))[:, :, None, None]
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return h + self.skip(x)


class SinusoidalPosEmb(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.dim = dim

    def forward(self, t):
        half_dim = self.dim // 2
        emb = math.log(10000) / (half_dim - 1)
        emb = torch.exp(torch.arange(half_dim, device=t.device) * -emb)
        emb = t[:, None] * emb[None, :]
        return torch.cat([torch.sin(emb), torch.cos(emb)], dim=-1)


class SelfAttention(nn.Module):
    def __init__(self, channels, num_heads=8):
        super().__init__()
        self.norm = nn.GroupNorm(32, channels)
        self.attn = nn.MultiheadAttention(channels, num_heads, batch_first=True)

    def forward(self, x):
        b, c, h, w = x.shape
        x_norm = self.norm(x.view(b, c, -1)).view(b, c, h * w).transpose(1, 2)
        attn_out, _ = self.attn(x_norm, x_norm, x_norm)
        return x + attn_out.transpose(1, 2).view(b, c, h, w)


class CrossAttention(nn.Module):
    def __init__(self, query_dim, context_dim, num_heads=8):
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = query_dim // num_heads

        self.to_q = nn.Linear(query_dim, query_dim)
        self.to_k = nn.Linear(context_dim, query_dim)
        self.to_v = nn.Linear(context_dim, query_dim)
        self.to_out = nn.Linear(query_dim, query_dim)

    def forward(self, x, context):
        # x: image features (B, H*W, C)
        # context: text embeddings (B, seq_len, context_dim)
        q = self.to_q(x)
        k = self.to_k(context)
        v = self.to_v(context)

        # Reshape for multi-head attention
        q = q.view(q.shape[0], -1, self.num_heads, self.head_dim).transpose(1, 2)
        k = k.view(k.shape[0], -1, self.num_heads, self.head_dim).transpose(1, 2)
        v = v.view(v.shape[0], -1, self.num_heads, self.head_dim).transpose(1, 2)

        # Attention
        attn = torch.softmax(q @ k.transpose(-2, -1) / math.sqrt(self.head_dim), dim=-1)
        out = attn @ v

        # Reshape back
        out = out.transpose(1, 2).reshape(x.shape[0], -1, self.num_heads * self.head_dim)  # repaired: was q.shape[2]
        return self.to_out(out)


class ContextAttention(nn.Module):
    """repaired: the specification builds no layer around CrossAttention; this is SelfAttention's form around it."""

    def __init__(self, channels, context_dim, num_heads=8):
        super().__init__()
        self.norm = nn.GroupNorm(32, channels)
        self.attn = CrossAttention(channels, context_dim, num_heads)

    def forward(self, x, context):
        b, c, h, w = x.shape
        tokens = self.norm(x).view(b, c, h * w).transpose(1, 2)
        return x + self.attn(tokens, context).transpose(1, 2).view(b, c, h, w)


class UNet(nn.Module):
    """The specification's network; an entry of `encoder` and `decoder` is a list, for attention to follow its block."""

    def __init__(
        self,
        in_channels=3,
        model_channels=128,
        out_channels=3,
        num_res_blocks=2,
        attention_resolutions=[16, 8],  # noqa: B006
        channel_mult=[1, 2, 4, 8],  # noqa: B006
        num_heads=8,
        context_dim=768,  # For text conditioning
    ):
        super().__init__()
        time_dim = model_channels * 4
        self.time_mlp = nn.Sequential(
            SinusoidalPosEmb(model_channels),
            nn.Linear(model_channels, time_dim),
            nn.SiLU(),
            nn.Linear(time_dim, time_dim),
        )
        self.input_conv = nn.Conv2d(in_channels, model_channels, 3, padding=1)

        def block(in_ch, out_ch, attend):  # repaired: attention is called, and cross-attention exists
            layers = [ResBlock(in_ch, out_ch, time_dim)]
            if attend:
                layers += [SelfAttention(out_ch, num_heads), ContextAttention(out_ch, context_dim, num_heads)]
            return nn.ModuleList(layers)

        self.encoder = nn.ModuleList()
        ch = model_channels
        skip_chs = [ch]
        for level, mult in enumerate(channel_mult):
            out_ch = model_channels * mult
            for _ in range(num_res_blocks):
                self.encoder.append(block(ch, out_ch, 64 // (2**level) in attention_resolutions))
                ch = out_ch
                skip_chs.append(ch)
            if level < len(channel_mult) - 1:
                self.encoder.append(nn.ModuleList([nn.Conv2d(ch, ch, 3, stride=2, padding=1)]))
                skip_chs.append(ch)

        self.bottleneck = nn.ModuleList([*block(ch, ch, True), ResBlock(ch, ch, time_dim)])

        self.decoder = nn.ModuleList()
        for level, mult in reversed(list(enumerate(channel_mult))):
            for i in range(num_res_blocks + 1):
                out_ch = model_channels * mult
                layers = block(ch + skip_chs.pop(), out_ch, 64 // (2**level) in attention_resolutions)  # repaired
                ch = out_ch
                if level > 0 and i == num_res_blocks:
                    layers.append(nn.ConvTranspose2d(ch, ch, 4, stride=2, padding=1))
                self.decoder.append(layers)

        self.output = nn.Sequential(nn.GroupNorm(32, ch), nn.SiLU(), nn.Conv2d(ch, out_channels, 3, padding=1))

    def forward(self, x, t, context=None):
        t_emb = self.time_mlp(t)

        def run(layers, h):
            for layer in layers:
                if isinstance(layer, ResBlock):
                    h = layer(h, t_emb)
                elif isinstance(layer, ContextAttention):
                    h = layer(h, context)
                else:
                    h = layer(h)
            return h

        h = self.input_conv(x)
        skips = [h]
        for layers in self.encoder:
            h = run(layers, h)
            skips.append(h)
        h = run(self.bottleneck, h)
        for layers in self.decoder:
            h = torch.cat([h, skips.pop()], dim=1)
            h = run(layers, h)
        return self.output(h)
