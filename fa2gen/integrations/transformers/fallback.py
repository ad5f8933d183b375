"""What fa2gen refuses, by transformers' sdpa: with the mask that the layer would have had there."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fa2gen.integrations.transformers.rows import Plan
from fa2gen.ops.arguments import NO_WINDOW

__all__ = ["by_sdpa", "pairs_of"]


def pairs_of(
    query: Tensor, key: Tensor, causal: bool, window: tuple[int, int], padding: Tensor | None, plan: Plan | None
) -> Tensor | None:
    """Which keys each query sees, (batch or 1, 1, q, keys) bool; None: all, or those that sdpa's is_causal shows."""
    (batch, _, seqlen_q, _), seqlen_k = query.shape, key.shape[2]
    square = seqlen_q == seqlen_k or seqlen_q == 1 or not causal
    if plan is None and padding is None and square and window == NO_WINDOW:
        return None
    of_query = torch.arange(seqlen_q, device=query.device) + seqlen_k - seqlen_q
    of_key = torch.arange(seqlen_k, device=query.device)
    seen: Any = True
    if plan is not None and plan.packed:
        bounds_q, bounds_k = plan.lengths[:2]
        assert bounds_q is not None
        (ids_q, of_query), (ids_k, of_key) = _places(bounds_q, batch, seqlen_q), _places(bounds_k, batch, seqlen_k)
        of_query = of_query + (bounds_k.diff() - bounds_q.diff())[ids_q]
        seen = ids_q[..., None] == ids_k[..., None, :]
    elif padding is not None:
        seen = padding[:, None, :seqlen_k]
    ahead = of_key[..., None, :] - of_query[..., None]
    left, right = window[0], 0 if causal else window[1]
    if left >= 0:
        seen = seen & (ahead >= -left)
    if right >= 0:
        seen = seen & (ahead <= right)
    return seen.expand(*seen.shape[:-2], seqlen_q, seqlen_k).reshape(-1, 1, seqlen_q, seqlen_k)


def _places(bounds: Tensor, batch: int, seqlen: int) -> tuple[Tensor, Tensor]:
    """(sequence, place in it) of the rows of a packed batch, both (batch, seqlen)."""
    rows = torch.arange(batch * seqlen, device=bounds.device).view(batch, seqlen)
    ids = torch.bucketize(rows, bounds[1:-1], right=True)
    return ids, rows - bounds[ids]


def by_sdpa(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pairs: Tensor | None,
    bias: Tensor | None,
    causal: bool,
    dropout: float,
    scaling: float | None,
) -> Tensor:
    """out (batch, q, heads, head_dim) of query, key and value (batch, heads, seqlen, head_dim).

    pairs  (batch or 1, 1, q, keys): bool, or added to scores; None: all, but for what causal hides.
    bias   (batch or 1, heads, q, keys), added to scores.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    causal = causal and pairs is None and query.shape[2] > 1
    if bias is not None:
        bias, least = bias.to(query.dtype), torch.finfo(query.dtype).min
        if causal:
            pairs = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
        if pairs is None:
            pairs = bias
        else:
            pairs = bias.masked_fill(~pairs, least) if pairs.dtype == torch.bool else bias + pairs
        causal = False
    said = {"dropout": dropout, "scaling": scaling, "is_causal": causal}
    out: Tensor = sdpa_attention_forward(module, query, key, value, pairs, **said)[0]
    return out
