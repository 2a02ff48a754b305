"""Captions as tokens, kept on disk."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from unet_denoiser.data.dataset import DatasetWrapper, ImageDataset
from unet_denoiser.utils.cache import MappedArray, compute_once, digest
from unet_denoiser.utils.files import read_json, write_json

if TYPE_CHECKING:
    from unet_denoiser.models.text_encoder import TextEncoder

ENCODE_BATCH_SIZE = 64  # captions


class CaptionedDataset(DatasetWrapper):
    """Replaces "caption" by "context" (S, D) and "context_mask" (S,); S is the longest caption's length in tokens.

    Raises:
        ValueError: data without captions.
    """

    def __init__(self, data: ImageDataset, encoder: TextEncoder) -> None:
        super().__init__(data)
        if not data.captions:
            raise ValueError(f"text_encoder={encoder.name}: the data have no captions; add them, or leave it out")
        self.store = TokenStore(encoder, data.captions)
        self.context_dim = encoder.context_dim

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._replace_caption(self.data[index])

    def conditions(self, index: int) -> dict[str, Any]:
        return self._replace_caption(self.data.conditions(index))

    def _replace_caption(self, item: dict[str, Any]) -> dict[str, Any]:
        item = dict(item)
        item["context"], item["context_mask"] = self.store[item.pop("caption")]
        return item


class TokenStore:
    """The tokens of all captions, kept on disk under a hash of the encoder and the captions; each is encoded once."""

    def __init__(self, encoder: TextEncoder, captions: Sequence[str]) -> None:
        unique = sorted(set(captions))
        self.indices = {caption: i for i, caption in enumerate(unique)}
        self.context_dim = encoder.context_dim
        key = digest([encoder.key, *unique])
        folder = compute_once("text", key, lambda folder: _write_tokens(encoder, unique, folder))
        self.tokens, self.starts = MappedArray(folder / "tokens.npy"), MappedArray(folder / "starts.npy")
        encoder.warn_cut(read_json(folder / "about.json").get("cut", 0), len(unique))
        self.length = int(np.diff(self.starts.array).max())

    def __getitem__(self, caption: str) -> tuple[Tensor, Tensor]:
        """Return `context` (S, D) and `context_mask` (S,), padded to the longest of all captions."""
        start, stop = self.starts.array[(i := self.indices[caption]) : i + 2]
        context = torch.zeros(self.length, self.context_dim)
        context[: stop - start] = torch.from_numpy(self.tokens.array[start:stop].astype(np.float32))
        return context, torch.arange(self.length) < int(stop - start)


def _write_tokens(encoder: TextEncoder, captions: list[str], folder: Path) -> None:
    """Write tokens.npy (sum of lengths, D) float16, and starts.npy (N + 1,): where each caption begins and ends."""
    from tqdm import tqdm

    # captions of similar length share a batch, which saves padding; so they are written in another order first
    order = sorted(range(len(captions)), key=lambda i: len(captions[i]))
    lengths = np.zeros(len(captions), np.int64)
    unsorted = folder / "unsorted"
    with unsorted.open("wb") as file:
        batches = range(0, len(order), ENCODE_BATCH_SIZE)
        for begin in tqdm(batches, "captions", unit_scale=ENCODE_BATCH_SIZE, disable=None):
            batch = order[begin : begin + ENCODE_BATCH_SIZE]
            for i, tokens in zip(batch, encoder.tokens([captions[i] for i in batch]), strict=True):
                lengths[i] = len(tokens)
                file.write(tokens.half().numpy().tobytes())
    starts = np.concatenate([[0], lengths.cumsum()])
    source = np.memmap(unsorted, np.float16, "r", shape=(int(starts[-1]), encoder.context_dim))
    target = np.lib.format.open_memmap(folder / "tokens.npy", "w+", np.float16, source.shape)
    position = 0
    for i in order:
        target[starts[i] : starts[i + 1]] = source[position : position + lengths[i]]
        position += lengths[i]
    target.flush()
    np.save(folder / "starts.npy", starts)
    write_json(folder / "about.json", {"encoder": encoder.name, "captions": len(captions), "cut": encoder.num_cut})
    del source  # Windows deletes no mapped file
    unsorted.unlink()
