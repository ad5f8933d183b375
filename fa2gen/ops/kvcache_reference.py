"""Queries over a cache of keys and values in plain PyTorch: what CPU tensors run, and what kernels are held to."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fa2gen.features import key_range
from fa2gen.ops.validate import validate_options
from fa2gen.ops.validate_cache import CACHE_DTYPES, Cached, capacity_of, validate_cached
from fa2gen.options import Options
from fa2gen.reference import Place, attention_tiled

__all__ = ["cached_reference", "keys_of", "narrowed", "turned"]


def cached_reference(
    given: Cached, options: Options, interleaved: bool = True, num_splits: int = 0
) -> tuple[Tensor, Tensor]:
    """(out, lse) of `fa2gen.ops.kvcache.cached_cuda`; new keys are in the caches then."""
    validate_options(options)
    validate_cached(given, num_splits, options)
    q, capacity = given.q, capacity_of(given)
    batch, seqlen_q, num_heads, _ = q.shape
    out, lse = q.new_zeros(q.shape), q.new_full((batch, num_heads, seqlen_q), -math.inf, dtype=torch.float32)
    if given.s_aux is not None:
        lse.copy_(given.s_aux[:, None].expand_as(lse))
    if not batch or not capacity or not given.k_cache.shape[0]:
        return out, lse
    before = [capacity] * batch
    if given.cache_seqlens is not None:
        before = [min(max(length, 0), capacity) for length in given.cache_seqlens.tolist()]
    new = 0 if given.k is None else given.k.shape[1]
    if given.k is not None and given.v is not None:
        q, k = given.q, given.k
        if given.rotary_cos is not None and given.rotary_sin is not None:
            steps = options.causal or options.window_left >= 0 or options.window_right >= 0
            angles = (given.rotary_cos, given.rotary_sin, interleaved)
            own = [[length + i for i in range(new)] for length in before]
            of_query = [[length + i * steps for i in range(seqlen_q)] for length in before]
            k, q = turned(k, own, *angles), turned(q, of_query, *angles)
        for cache, rows in ((given.k_cache, k), (given.v_cache, given.v)):
            scale = given.k_descale if cache is given.k_cache else given.v_descale
            _append(given, cache, rows, before, scale)
    first = [0] * batch if given.cache_leftpad is None else [max(x, 0) for x in given.cache_leftpad.tolist()]
    with torch.autocast("cpu", enabled=False):
        for b in range(batch):
            end = min(before[b] + new, capacity)
            if first[b] < end and seqlen_q and num_heads:
                k, v = (keys_of(given, cache, b, first[b], end) for cache in (given.k_cache, given.v_cache))
                hidden = max(key_range(options, seqlen_q, k.shape[1], 0)[0], 0)
                v = torch.cat([torch.zeros_like(v[:, :hidden]), v[:, hidden:]], dim=1)  # they may hold NaN
                more = options._asdict() | {"s_aux": given.s_aux, "place": Place(given.tensors, b)}
                out[b], lse[b] = (x[0] for x in attention_tiled(q[b : b + 1], k, v, **more))
    return out, lse


def keys_of(given: Cached, cache: Tensor, sequence: int, first: int, end: int) -> Tensor:
    """Rows [first, end) of a sequence's keys or values, (1, rows, heads_kv, head_dim); of 8-bit caches in fp32, times
    their scales."""
    if cache.dtype in CACHE_DTYPES:
        whole = given._replace(k_descale=None, v_descale=None)
        rows = keys_of(whole, cache.view(torch.uint8), sequence, first, end).contiguous().view(cache.dtype).float()
        scale = given.k_descale if cache is given.k_cache else given.v_descale
        return rows if scale is None else rows * scale[sequence].view(1, 1, -1, 1)
    entry = sequence if given.cache_batch_idx is None else int(given.cache_batch_idx[sequence])
    if given.block_table is None:
        return cache[min(max(entry, 0), cache.shape[0] - 1), first:end].unsqueeze(0)
    size = cache.shape[1]
    table = given.block_table[min(max(entry, 0), given.block_table.shape[0] - 1)]
    pages = table[first // size : -(-end // size)].long().clamp(0, cache.shape[0] - 1)
    skipped = first // size * size
    return cache[pages].flatten(0, 1)[first - skipped : end - skipped].unsqueeze(0)


def turned(x: Tensor, positions: list[list[int]], cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """x (batch, seqlen, heads, head_dim) with rotary embeddings of these positions in its first columns."""
    at = torch.tensor(positions, dtype=torch.long, device=cos.device).clamp(max=cos.shape[0] - 1)
    cosine, sine = (angles[at].float().unsqueeze(2) for angles in (cos, sin))  # (batch, seqlen, 1, rotary_dim / 2)
    half = cos.shape[1]
    part, rest = x[..., : 2 * half].float(), x[..., 2 * half :]
    a, b = (part[..., 0::2], part[..., 1::2]) if interleaved else (part[..., :half], part[..., half:])
    pair = (a * cosine - b * sine, a * sine + b * cosine)
    both = torch.stack(pair, dim=-1).flatten(-2) if interleaved else torch.cat(pair, dim=-1)
    return torch.cat([both.to(x.dtype), rest], dim=-1)


def narrowed(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Numbers as an 8-bit cache holds them: the nearest one, the greatest for what is beyond."""
    if dtype == torch.int8:
        return x.float().round().clamp(-128, 127).to(dtype)
    return x.float().clamp(-448, 448).to(dtype)


def _append(given: Cached, cache: Tensor, rows: Tensor, before: list[int], scale: Tensor | None) -> None:
    """Write new rows behind each sequence's own; those that have no place are dropped."""
    if cache.dtype in CACHE_DTYPES:
        rows = narrowed(rows if scale is None else rows.float() / scale[:, None, :, None], cache.dtype)
        cache, rows = cache.view(torch.uint8), rows.view(torch.uint8)
    capacity, entries, table = capacity_of(given), cache.shape[0], given.block_table
    for b, length in enumerate(before):
        entry = b if given.cache_batch_idx is None else int(given.cache_batch_idx[b])
        for i in range(min(rows.shape[1], capacity - length)):
            place, row = entry, length + i
            if table is not None:
                if not 0 <= entry < table.shape[0]:
                    continue
                place, row = int(table[entry, row // cache.shape[1]]), row % cache.shape[1]
            if 0 <= place < entries:
                cache[place, row] = rows[b, i]
