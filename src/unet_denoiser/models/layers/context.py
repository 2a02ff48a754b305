"""The context of cross-attention: tokens, their mask, and the null token."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from unet_denoiser.models.layers.common import join_graph


class Context(NamedTuple):
    """The tokens that cross-attention attends to, with their mask.

    Args:
        tokens: (B, S, context_dim).
        mask: (B, S) bool, False for tokens to ignore, or None. `build_context` ensures that each sample has at least
            one True, since softmax over nothing is NaN.
        projected: keys and values of the tokens for the layers that need not compute them (`project_context`).
    """

    tokens: Tensor
    mask: Tensor | None = None
    projected: Mapping[nn.Module, tuple[Tensor, Tensor]] = {}  # never modified

    def arguments_for(self, layer: nn.Module) -> tuple[Tensor, Tensor | None, tuple[Tensor, Tensor] | None]:
        """Return `context`, `mask` and `projected` of `CrossAttention.forward`."""
        return self.tokens, self.mask, self.projected.get(layer)


def build_context(
    tokens: Tensor | None, mask: Tensor | None, drop: Tensor | None, null: Tensor | None, batch: int
) -> Context:
    """Replace ignored tokens by the null token (context_dim,), and give each sample at least one token to attend to.

    Replacing padding makes its values irrelevant, NaN included. A sample that is dropped or all padding attends to the
    null token: the learned one, or zeros with learned_null=False.

    Args:
        tokens: (B, S, context_dim), or None for the null token alone.
        mask: (B, S) bool, False at padding.
        drop: (B,) bool, True for samples without context.
    """
    if tokens is None:
        assert null is not None  # check_inputs
        return Context(null.expand(batch, 1, -1))
    if mask is None and drop is None:
        return Context(join_graph(tokens, [null]))
    keep = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device) if mask is None else mask  # (B, S)
    if drop is not None:
        keep = keep & ~drop[:, None]
    tokens = torch.where(keep[..., None], tokens, torch.zeros_like(tokens[0, 0]) if null is None else null)
    return Context(tokens, keep | ~keep.any(dim=1, keepdim=True))
