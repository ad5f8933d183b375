"""`reshape_and_cache`: new keys and values, each to a slot of paged caches of its own."""

from __future__ import annotations

import torch
from torch import Tensor

from fa2gen.errors import InvalidInput
from fa2gen.ops.flash_kvcache import run_cached
from fa2gen.ops.validate import describe, refuse_non_tensors, refuse_tensor_kinds
from fa2gen.ops.validate_cache import CACHE_DTYPES, Cached
from fa2gen.options import Options

__all__ = ["reshape_and_cache"]


def reshape_and_cache(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:
    """Write token i of key and value to slot slot_mapping[i] of the caches, in place.

    key, value    (tokens, heads_kv, head_dim), fp16 or bf16.
    caches        (pages, page_size, heads_kv, head_dim) in key's dtype, or 8-bit numbers, of any strides but the last.
    slot_mapping  (tokens,) int32 or int64: page * page_size + row. What lies outside of the caches, as -1 does, is not
                  written.
    k_scale       () or (heads_kv,) fp32: what numbers of an 8-bit key_cache are to be multiplied with; None: 1. v_scale
                  likewise.

    Does not wait for the device. Two tokens with one slot: undefined which of them is there. Raises InvalidInput or
    UnsupportedProblem.
    """
    given = {"key": key, "value": value, "slot_mapping": slot_mapping}
    given |= {"key_cache": key_cache, "value_cache": value_cache}
    refuse_non_tensors(**given)
    refuse_tensor_kinds(given, given.values())
    if key.dim() != 3 or slot_mapping.shape != key.shape[:1] or slot_mapping.dtype not in (torch.int32, torch.int64):
        raise InvalidInput(
            f"key is {describe(key)}, slot_mapping {describe(slot_mapping)}; they must be (tokens, heads_kv, head_dim) "
            "and (tokens,), int32 or int64"
        )
    if value.shape != key.shape:
        raise InvalidInput(f"key has shape {tuple(key.shape)}, value {tuple(value.shape)}; they must be equal")
    if key_cache.dim() != 4 or 0 in key_cache.shape[:2]:
        raise InvalidInput(f"key_cache is {describe(key_cache)}; it must be (pages, page_size, heads_kv, head_dim)")
    for name, x, cache in (("key", key, key_cache), ("value", value, value_cache)):
        is_same = cache.dtype == x.dtype or cache.dtype in CACHE_DTYPES
        if x.shape[1:] != cache.shape[2:] or x.device != cache.device or not is_same:
            raise InvalidInput(
                f"{name} is {describe(x)}, {name}_cache {describe(cache)}; they must have the same heads, head_dim, "
                "device and dtype, of which the cache's may be of 8 bits"
            )
    none = key.new_empty((key.shape[0], 0, *key.shape[1:]))  # no query
    rows, pages = _places(slot_mapping, key_cache)
    places = {"cache_seqlens": rows, "block_table": pages}
    for name, scale in (("k", k_scale), ("v", v_scale)):
        if scale is not None:
            refuse_non_tensors(**{f"{name}_scale": scale})
            refuse_tensor_kinds([f"{name}_scale"], [scale])
            if tuple(scale.shape) not in ((), (1,), (key.shape[1],)):
                raise InvalidInput(f"{name}_scale is {describe(scale)}; it must be () or ({key.shape[1]},), fp32")
            places[f"{name}_descale"] = scale.expand(key.shape[0], key.shape[1])
    cached = Cached(none, key_cache, value_cache, key.unsqueeze(1), value.unsqueeze(1), **places)
    run_cached(cached, Options(softmax_scale=1.0), True, 0)


def _places(slots: Tensor, cache: Tensor) -> tuple[Tensor, Tensor]:
    """(rows, pages) of slots: a token is a sequence of one page, whose keys end at its row."""
    pages, size = cache.shape[:2]
    inside = (slots >= 0) & (slots < pages * size)
    page = torch.where(inside, slots.div(size, rounding_mode="floor"), -1)
    return slots.remainder(size).to(torch.int32), page.to(torch.int32).unsqueeze(1)
