"""The tokens that cross-attention attends to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Context(NamedTuple):
    """What cross-attention attends to.

    tokens: (B, S, context_dim). mask: (B, S) bool, True where a token counts, or None when all do; every row of it
    has at least one True (softmax over nothing is NaN): `UNet` sees to that. projected: keys and values of the tokens,
    for the layers whose are there already.
    """

    tokens: Tensor
    mask: Tensor | None = None
    projected: Mapping[nn.Module, tuple[Tensor, Tensor]] = {}  # nobody changes it

    def of(self, layer: nn.Module) -> tuple[Tensor, Tensor | None, tuple[Tensor, Tensor] | None]:
        """What `CrossAttention.forward` takes of it."""
        return self.tokens, self.mask, self.projected.get(layer)


def build_context(
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
