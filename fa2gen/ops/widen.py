"""Pages of 8-bit numbers as rows of 16-bit ones: each sequence's first keys and values, times their scales.

Kernels of prefill take no 8-bit numbers. So what a call sees is converted once, where each block of its queries would
convert the same keys again. Lengths and the table are read on the device.

The operator is `fa2gen::widen`, registered with the others in `fa2gen.ops.library`. It has no gradient, no rule for
vmap, and counts as no product.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fa2gen.errors import InvalidInput
from fa2gen.ops.call import (
    Call,
    address_of,
    contiguous,
    dense,
    kernel_for_rows,
    launch_with_scratch,
    prepared,
    signature_of,
)
from fa2gen.ops.forward_only import forward_only, is_direct
from fa2gen.ops.kvcache_reference import keys_of
from fa2gen.ops.validate import DTYPES
from fa2gen.ops.validate_cache import Cached, cache_dtype_of, capacity_of, validate_cached
from fa2gen.options import CacheShape, Options

__all__ = ["WIDEN_SCHEMAS", "Narrow", "widen", "widen_kernels"]

_NAME = "widen"
WIDEN_SCHEMAS = {
    _NAME: "(Tensor k, Tensor v, Tensor seqlens, Tensor block_table, Tensor? k_descale, Tensor? v_descale, "
    "SymInt rows, ScalarType dtype) -> (Tensor k_wide, Tensor v_wide)"
}


class Narrow(NamedTuple):
    """Sequences whose keys lie in pages of 8-bit numbers.

    k            (pages, page_size, heads_kv, head_dim), and v.
    seqlens      (batch,) int32: the keys of each.
    block_table  (batch, pages of a sequence) int32; there may be more rows.
    k_descale    (batch, heads_kv) fp32, of any strides: what numbers of k are to be multiplied with; None: 1.
    """

    k: Tensor
    v: Tensor
    seqlens: Tensor
    block_table: Tensor
    k_descale: Tensor | None = None
    v_descale: Tensor | None = None

    def cached(self, dtype: torch.dtype) -> Cached:
        """As a call over a cache has them, with no query of this dtype."""
        q = torch.empty((self.seqlens.shape[0], 0, *self.k.shape[2:]), dtype=dtype, device=self.k.device)
        lengths = {"cache_seqlens": self.seqlens, "block_table": self.block_table}
        return Cached(q, self.k, self.v, **lengths, k_descale=self.k_descale, v_descale=self.v_descale)


def widen(given: Narrow, rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(k, v), each (batch, rows, heads_kv, head_dim) in fp16 or bf16: the first keys of each sequence, and values.

    Rows behind a sequence's keys are of any content. Of a sequence with more keys than rows all are NaN, so that it
    shows. By the operator where others look at the call.
    """
    if is_direct(*given):
        return _widen_cuda(given, rows, dtype)
    try:
        k, v = getattr(torch.ops.fa2gen, _NAME).default(*given, rows, dtype)
    except NotImplementedError:  # ours, or torch's two pages about a backend that has no kernel
        _validate(given, rows, dtype)
        raise
    return k, v


def _validate(given: Narrow, rows: int, dtype: torch.dtype) -> Cached:
    """The call over a cache. Raises InvalidInput or UnsupportedProblem unless it can be made."""
    cached = given.cached(dtype)
    validate_cached(cached)
    if given.k.element_size() != 1:
        raise InvalidInput(f"k is {given.k.dtype}; pages of 8-bit numbers are widened")
    if rows < 1 or 0 in given.k.shape[:3]:
        raise InvalidInput(
            f"rows is {rows}, k {tuple(given.k.shape)}; there must be a page, and room for a key of each"
        )
    return cached


def _results(given: Narrow, rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    size = (given.seqlens.shape[0], rows, *given.k.shape[2:])
    return given.k.new_empty(size, dtype=dtype), given.k.new_empty(size, dtype=dtype)


def _widen_cuda(given: Narrow, rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    call = prepared((_NAME, *map(signature_of, given), rows, dtype), _prepare, given, rows, dtype)
    k, v = _results(given, rows, dtype)
    if call.launch is None:  # no sequence
        return k, v
    if (given.k.data_ptr() | given.v.data_ptr()) & 15:
        raise InvalidInput(
            "pages lie on an address that is no multiple of 16 bytes, and are never copied: begin a slice of a cache "
            "on a multiple of 16 elements"
        )
    at = {name: address_of(x) for name, x in given._asdict().items()}
    at |= {"cache_seqlens": at["seqlens"], "k_wide": k.data_ptr(), "v_wide": v.data_ptr()}
    launch_with_scratch(call, k, tuple(at.get(name, 0) for name in call.operands))
    return k, v


def _prepare(given: Narrow, rows: int, dtype: torch.dtype) -> Call:
    """Validate a signature; choose, load and pack its kernel, one that decodes the same cache."""
    cached = _validate(given, rows, dtype)
    k, table, capacity = given.k, given.block_table, capacity_of(cached)
    batch, _, heads_kv, head_dim = cached.q.shape
    steps = {
        f"{name}_scale_{step}": x.stride(dim)
        for name, x in (("k", given.k_descale), ("v", given.v_descale))
        if x is not None
        for dim, step in enumerate(("batch", "head"))
    }
    shape = CacheShape(
        batch=batch,
        seqlen_q=0,
        seqlen_k=capacity,
        num_heads=heads_kv,
        num_heads_kv=heads_kv,
        entries=k.shape[0],
        page_size=k.shape[1],
        table_rows=table.shape[0],
        table_stride=table.stride(0),
        seqlen_wide=rows,
        **steps,
    )
    options = Options(softmax_scale=1.0)
    problem = options.problem("decode", head_dim, DTYPES[dtype], paged=True, cache_dtype=cache_dtype_of(cached))
    kernel = kernel_for_rows(problem, k.get_device(), capacity, 0)
    strides = {"k": k.stride()[:3], "v": given.v.stride()[:3], "q": dense(0, heads_kv, head_dim)}
    nothing = contiguous((0,))
    return Call(
        device=k.get_device(),
        out=nothing,
        lse=nothing,
        num_rows=0,
        launch=kernel.prepare(shape, strides, options) if batch else None,
        misaligned=False,
        operands=tuple(operand.name for operand in kernel.plan.operands),
    )


def _widen_reference(given: Narrow, rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """On any device; lengths are read."""
    cached = _validate(given, rows, dtype)
    wide = _results(given, rows, dtype)
    for b, length in enumerate(given.seqlens.tolist()):
        count = min(max(length, 0), capacity_of(cached))
        for x, of in zip(wide, (given.k, given.v), strict=True):
            if count > rows:
                x[b] = math.nan
            elif count:
                x[b, :count] = keys_of(cached, of, b, 0, count)[0].to(dtype)
    return wide


def _called(implementation: Callable[..., Any]) -> Callable[..., Any]:
    """An implementation that takes (Narrow, rows, dtype), as the dispatcher calls it."""
    return lambda *arguments: implementation(Narrow(*arguments[:-2]), *arguments[-2:])


def _fake(given: Narrow, rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    _validate(given, rows, dtype)
    return _results(given, rows, dtype)


def widen_kernels() -> Mapping[str, Callable[..., Any]]:
    """Dispatch key, or kind of rule -> what the operator has for it."""
    kernels = {
        "CPU": _called(_widen_reference),
        "CUDA": _called(_widen_cuda),
        "fake": _called(_fake),
        "flops": lambda *_, **__: 0,
    }
    return forward_only(_NAME, kernels, "pages is not built; what is mapped over is a longer batch")
