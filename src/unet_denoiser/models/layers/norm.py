"""GroupNorm (Wu and He 2018, arXiv 1803.08494) for inputs that torch's own refuses or crashes on."""

import torch
from torch import Tensor, nn

from unet_denoiser.models.layers.traced import group_norm_by_sums, is_generated

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


class GroupNorm(nn.GroupNorm):
    """nn.GroupNorm that also accepts a single value per group (one sample of one position)."""

    def forward(self, x: Tensor) -> Tensor:
        if is_generated(x) and x.ndim > 2:
            return group_norm_by_sums(x, self)
        trained = torch.is_grad_enabled() and (self.weight.requires_grad or self.bias.requires_grad)
        last = _CHANNELS_LAST.get(x.ndim)
        if trained and not x.requires_grad and x.device.type == "cpu" and last and x.is_contiguous(memory_format=last):
            # torch 2.13 crashes if weight or bias, but not the input, need a gradient while the channels are last
            out = torch.group_norm(x.contiguous(), self.num_groups, self.weight, self.bias, self.eps)
            return out.contiguous(memory_format=last)
        return torch.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)


def group_norm(channels: int, groups: int = 32, eps: float = 1e-5) -> GroupNorm:
    """Return a GroupNorm with the largest number of groups that divides `channels` and is at most `groups`.

    Outputs of trained networks depend on this rule; a test pins it.
    """
    return GroupNorm(max(g for g in range(1, min(groups, channels) + 1) if channels % g == 0), channels, eps=eps)
