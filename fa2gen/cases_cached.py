"""Cases over caches and pages: lengths, places and pages drawn, and NaN wherever no key of a sequence is."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from random import Random
from typing import Any

from fa2gen.options import CacheShape, Shape
from fa2gen.spec import SAME, Problem

__all__ = ["cached_tensors", "gathered", "paged_tensors", "sequences"]

_PAGE_SIZES = (16, 1, 64, 3, 48)
_NO_PAGE = 1 << 30
_UNITS = {"e4m3": 16.0, "int8": 32.0}
"""In an 8-bit cache, what stands for 1."""


def cached_tensors(
    problem: Problem, shape: Shape, dtype: Any, seed: int, device: str, plain: bool
) -> tuple[CacheShape, dict[str, Any]]:
    """(sizes, inputs by operand) of a call with shape.seqlen_q queries of each sequence.

    shape  seqlen_k is the longest sequence's length; the others' are drawn, and so are left padding, the order of
           entries and, in pages, their size.
    plain  for timing: all sequences are as long, in order, in pages of 16, and numbers are drawn on the device.
    """
    torch = import_module("torch")
    random = Random(seed)
    batch, _, longest, _, heads_kv = shape
    place = device if plain else "cpu"
    generator = torch.Generator(place).manual_seed(seed)
    size = _PAGE_SIZES[0 if plain else seed % len(_PAGE_SIZES)] if problem.paged else longest
    pages = -(-longest // size)  # of a sequence
    lengths = [longest, *(longest if plain else random.randint(0, longest) for _ in range(batch - 1))]
    padding = [0] * batch if plain or seed % 2 else [random.randint(0, longest // 4) for _ in range(batch)]
    spare = 0 if plain else 3
    entries = batch * (pages if problem.paged else 1) + spare
    size_of = (entries, size, heads_kv, problem.head_dim)
    k, v = (_random(torch, problem, size_of, dtype, generator, place) for _ in range(2))
    numbers = torch.arange(entries) if plain else torch.randperm(entries, generator=torch.Generator().manual_seed(seed))
    numbers = numbers[: entries - spare].view(batch, -1)
    found: dict[str, Any] = {"cache_seqlens": lengths, "cache_leftpad": padding}
    if problem.paged:
        table = torch.full((batch, pages + 1), _NO_PAGE)
        for b, length in enumerate(lengths):
            used = -(-length // size)
            table[b, :used] = numbers[b, :used]
        found["block_table"] = table
    else:
        found["cache_batch_idx"] = numbers.flatten().tolist()
    if not plain:
        exists = torch.zeros(size_of[:2], dtype=torch.bool)
        for b, (first, end) in enumerate(zip(padding, lengths, strict=True)):
            rows = torch.arange(first, end)
            exists[numbers[b, rows // size], rows % size] = True
        for x in (k, v):
            if x.dtype == torch.int8:
                x[~exists] = -128
            elif problem.cache_dtype != SAME:
                x.view(torch.uint8)[~exists] = 0x7F  # NaN
            else:
                x[~exists] = math.nan
    more = {} if problem.cache_dtype == SAME else _scales(torch, problem, batch, heads_kv, device, generator)
    tensors = {name: torch.as_tensor(x).to(torch.int32).to(device) for name, x in found.items()}
    if problem.paged:
        tensors["block_table"] = tensors["block_table"][:, :pages]
    table = tensors.get("block_table")
    sizes = CacheShape(
        *shape._replace(seqlen_k=pages * size),
        entries=entries,
        page_size=size if problem.paged else 0,
        table_rows=0 if table is None else batch,
        table_stride=0 if table is None else table.stride(0),
        k_scale_batch=heads_kv if more else 0,  # V has one scale for all
        k_scale_head=int(bool(more)),
    )
    return sizes, tensors | more | {"k": k.to(device), "v": v.to(device)}


def _random(torch: Any, problem: Problem, size: tuple[int, ...], dtype: Any, generator: Any, device: str) -> Any:
    """Of a cache: normally distributed once they are multiplied with `_scales`."""
    x = torch.randn(size, generator=generator, device=device)
    if problem.cache_dtype == SAME:
        return x.to(dtype)
    from fa2gen.ops.kvcache_reference import narrowed

    return narrowed(
        x * _UNITS[problem.cache_dtype], {"e4m3": torch.float8_e4m3fn, "int8": torch.int8}[problem.cache_dtype]
    )


def _scales(torch: Any, problem: Problem, batch: int, heads_kv: int, device: str, generator: Any) -> dict[str, Any]:
    """Powers of two, so that 16 bits hold what kernels are held to."""
    one = 1.0 / _UNITS[problem.cache_dtype]
    powers = torch.randint(-1, 2, (batch, heads_kv), generator=generator, device=generator.device)
    scales = {"k_descale": one * 2.0**powers, "v_descale": torch.tensor(one).expand(batch, heads_kv)}
    return {name: x.to(torch.float32).to(device) for name, x in scales.items()}


def paged_tensors(
    problem: Problem, shape: Shape, keys: Sequence[int], least: int, dtype: Any, seed: int, device: str
) -> tuple[CacheShape, dict[str, Any]]:
    """(sizes, inputs by operand) of a ragged batch whose sequences have so many keys each, in pages.

    shape  that of the batch; how many keys there are together is of no use.
    least  a page's rows are a multiple of it.

    How many rows a page has is drawn, and whether lengths are given by their bounds or one by one.
    """
    torch = import_module("torch")
    generator = torch.Generator().manual_seed(seed)
    size = _PAGE_SIZES[seed % len(_PAGE_SIZES)] * least
    pages = max(1, -(-max(keys) // size))  # of a row of the table
    entries = len(keys) * pages + 3
    k, v = (
        torch.randn((entries, size, shape.num_heads_kv, head_dim), generator=generator).to(dtype)
        for head_dim in problem.head_dims
    )
    numbers = torch.randperm(entries, generator=generator)[: len(keys) * pages].view(-1, pages)
    table = torch.full((len(keys), pages + 1), _NO_PAGE)
    exists = torch.zeros((entries, size), dtype=torch.bool)
    for b, length in enumerate(keys):
        used, rows = -(-length // size), torch.arange(length)
        table[b, :used] = numbers[b, :used]
        exists[numbers[b, rows // size], rows % size] = True
    k[~exists] = v[~exists] = math.nan
    bounds = [0, *itertools.accumulate(keys)]
    lengths = {"cu_seqlens_k": bounds} if seed % 2 else {"seqused_k": [*keys]}
    found = {
        name: torch.as_tensor(x).to(torch.int32).to(device) for name, x in {**lengths, "block_table": table}.items()
    }
    found["block_table"] = found["block_table"][:, :pages]
    sizes = CacheShape(
        *shape._replace(seqlen_k=pages * size),
        entries=entries,
        page_size=size,
        table_rows=len(keys),
        table_stride=found["block_table"].stride(0),
    )
    return sizes, found | {"k": k.to(device), "v": v.to(device)}


def gathered(tensors: Mapping[str, Any], sequence: int, num_keys: int) -> dict[str, Any]:
    """k and v of a sequence of a ragged batch, (1, num_keys, heads_kv, head_dim), out of its pages."""
    size = tensors["k"].shape[1]
    pages = tensors["block_table"][sequence, : -(-num_keys // size)].long()
    return {name: tensors[name][pages].flatten(0, 1)[None, :num_keys] for name in ("k", "v")}


def sequences(tensors: Mapping[str, Any], inputs: Sequence[Any]) -> Iterator[dict[str, Any]]:
    """Views of q, o and lse of each sequence that has keys, or sinks, with its keys and values as k and v; and as
    `place` what an expression looks up in its inputs."""
    from fa2gen.ops.kvcache_reference import keys_of
    from fa2gen.ops.validate_cache import Cached
    from fa2gen.reference import Place

    given = Cached(
        tensors["q"],
        tensors["k"],
        tensors["v"],
        cache_batch_idx=tensors.get("cache_batch_idx"),
        block_table=tensors.get("block_table"),
        k_descale=tensors.get("k_descale"),
        v_descale=tensors.get("v_descale"),
    )
    ends = tensors["cache_seqlens"].tolist()
    starts = tensors["cache_leftpad"].tolist()
    for b, (first, end) in enumerate(zip(starts, ends, strict=True)):
        if first < end or "s_aux" in tensors:
            rows = {name: keys_of(given, tensors[name], b, first, end) for name in ("k", "v")}
            keys = {name: x.to(tensors["q"].dtype) for name, x in rows.items()}  # exact: see `_scales`
            own = {name: tensors[name][b : b + 1] for name in ("q", "o", "lse")}
            yield {**own, **keys, "s_aux": tensors.get("s_aux"), "place": Place(inputs, b)}
