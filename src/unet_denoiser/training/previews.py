"""What the previews of a training are of."""

from __future__ import annotations

from itertools import islice
from typing import Any

import torch

from unet_denoiser.config.unet import CONDITIONS, UNetConfig
from unet_denoiser.data.dataset import ImageDataset, StreamDataset

PREVIEWED = 16  # samples, where the data do not say how many


def conditions_of_items(config: UNetConfig, data: ImageDataset | StreamDataset) -> dict[str, Any]:
    """The conditions of 16 items from all over the data; none for a network that has classes alone, or nothing."""
    names = [name for name, option in CONDITIONS.items() if getattr(config, option) is not None]
    names += ["concat"] * (data.concat_channels > 0)
    if names in ([], ["class_labels"]):
        return {}
    if isinstance(data, ImageDataset):
        pool = torch.arange(len(data)) if data.buckets is None else torch.as_tensor(data.buckets[0])
        chosen = torch.linspace(0, len(pool) - 1, min(PREVIEWED, len(pool))).long()
        items = [data[i] for i in pool[chosen].tolist()]
    else:
        items = list(islice(data, PREVIEWED))
    names += ["context_mask"] * ("context" in names and "context_mask" in items[0])
    return {name: torch.stack([torch.as_tensor(item[name]) for item in items]) for name in names}
