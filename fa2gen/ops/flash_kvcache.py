"""flash_attn 2.8's `flash_attn_with_kvcache`: same name, argument order, defaults and shapes."""

from __future__ import annotations

from operator import index
from typing import Any, Literal, overload

import torch
from torch import Tensor

from fa2gen.errors import InvalidInput
from fa2gen.ops import library  # noqa: F401  (registers the operators)
from fa2gen.ops.arguments import NO_WINDOW, Window, flag, modified, options_of, sinks, whole, window_sides
from fa2gen.ops.autograd import is_plain, wants_gradient
from fa2gen.ops.forward_only import is_direct
from fa2gen.ops.kvcache import cached_cuda, read_out
from fa2gen.ops.validate import describe, refuse_non_tensors, refuse_tensor_kinds
from fa2gen.ops.validate_cache import Cached, capacity_of, validate_cached
from fa2gen.options import Expression, Options

__all__ = ["flash_attn_with_kvcache", "parts_of", "run_cached", "same_lengths"]

_INT32_MAX = 2**31 - 1
_READ = torch.ops.fa2gen.decode.default
_APPEND = torch.ops.fa2gen.decode_append.default


@overload
def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = NO_WINDOW,
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: Literal[False] = False,
    *,
    s_aux: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
) -> Tensor: ...


@overload
def flash_attn_with_kvcache(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, *args: Any, return_softmax_lse: Literal[True], **options: Any
) -> tuple[Tensor, Tensor]: ...


@overload
def flash_attn_with_kvcache(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, *args: Any, return_softmax_lse: bool, **options: Any
) -> Tensor | tuple[Tensor, Tensor]: ...


def flash_attn_with_kvcache(  # type: ignore[misc]  # the later overloads leave out what the first says
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = NO_WINDOW,
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
    *,
    s_aux: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of a few queries of each sequence over a cache of its keys and values, to which new ones may be added.

    q (batch, seqlen_q, heads, head_dim). k_cache, v_cache (entries, rows, heads_kv, head_dim), of any strides but the
    last: they are never copied, and written to in place. A backward pass through the results is refused, by name.

    k, v                (batch, seqlen_new, heads_kv, head_dim): written behind the keys of each sequence, then seen.
                        What a full cache has no place for is dropped.
    rotary_cos, _sin    (positions, rotary_dim / 2) in q's dtype: new key i is turned by position cache_seqlens + i, and
                        query i too if causal or a window is given, else by cache_seqlens. Needs k.
    cache_seqlens       keys in each sequence's cache, its left padding included: (batch,) int32 on q's device, or one
                        number for all. None: all rows. Beyond the cache's end it counts as that, below 0 as 0.
    cache_batch_idx     (batch,) int32: the cache's entry, or the table's row, of each sequence.
    cache_leftpad       (batch,) int32: rows before a sequence's first key.
    block_table         (batch, pages) int32: caches are pages then, (pages, page_size, ...) of any page_size. Numbers
                        behind a sequence's last page are not looked at.
    softmax_scale, causal, window_size  as in `flash_attn_func`, over the keys that are there.
    rotary_interleaved  whether pairs are neighbouring columns, or else half of rotary_dim apart.
    num_splits          0: the keys of all sequences are dealt out evenly to the device, the same way each time; of many
                        queries they are read by kernels of prefill, and split where sequences are few. n: a sequence's
                        are in at most n parts, which depend on the cache's size alone, so that no row's bits depend on
                        the batch; up to 256.
    return_softmax_lse  return (out, lse), lse (batch, heads, seqlen_q) fp32.

    softcap, alibi_slopes  as in `flash_attn_func`, over the keys that are there.
    k_descale, v_descale  (batch, heads_kv) fp32, of any strides: what k_cache and v_cache are to be multiplied with
                        where they hold 8-bit numbers, torch.float8_e4m3fn or torch.int8; None: 1. New keys and values
                        are divided by it. Queries are multiplied in fp16: those beyond 65504 give NaN. Other caches
                        have no scale, and it is not looked at.
    s_aux               (heads,): the logit of each head's attention sink, which LSE has in it.

    Lengths and tables are read on the device, at each replay of a CUDA graph anew; they must not change meanwhile. CPU
    tensors run a reference. Raises InvalidInput, or UnsupportedProblem for what is not built.
    """
    # What most calls are, in as few steps as will do; what follows may raise.
    if (
        (k is v is rotary_cos is rotary_sin is alibi_slopes is s_aux is k_descale is v_descale is None)
        and (softmax_scale is None or softmax_scale.__class__ is float)
        and softcap.__class__ is float
        and not softcap
        and (causal is True or causal is False)
        and (rotary_interleaved is True or rotary_interleaved is False)
        and (return_softmax_lse is True or return_softmax_lse is False)
        and num_splits.__class__ is int
        and is_plain(q, k_cache, v_cache)
        and (cache_seqlens is None or cache_seqlens.__class__ is Tensor or cache_seqlens.__class__ is int)
        and (block_table is None or block_table.__class__ is Tensor)
        and (cache_batch_idx is None or cache_batch_idx.__class__ is Tensor)
        and (cache_leftpad is None or cache_leftpad.__class__ is Tensor)
        and q.stride()[-1:] == (1,)
        and not (torch.is_grad_enabled() and wants_gradient(q, k_cache, v_cache))
    ):
        lengths = cache_seqlens
        if lengths.__class__ is int:  # kernels keep it within the cache
            lengths = same_lengths(q, q.shape[0], lengths)
        of_call = (softmax_scale, causal, *window_sides(window_size), 0, False, False, False, None, 0.0, False)
        places = (lengths, cache_batch_idx, cache_leftpad, block_table)
        if return_softmax_lse:
            given = Cached(q, k_cache, v_cache, None, None, None, None, *places)
            return cached_cuda(given, of_call, rotary_interleaved, num_splits)
        return read_out(q, k_cache, v_cache, *places, of_call, rotary_interleaved, num_splits)
    optional = {
        "k": k,
        "v": v,
        "rotary_cos": rotary_cos,
        "rotary_sin": rotary_sin,
        "cache_batch_idx": cache_batch_idx,
        "cache_leftpad": cache_leftpad,
        "block_table": block_table,
        "k_descale": k_descale,
        "v_descale": v_descale,
    }
    refuse_non_tensors(q=q, k_cache=k_cache, v_cache=v_cache, **{n: x for n, x in optional.items() if x is not None})
    refuse_tensor_kinds(("q", "k", "v"), (q, k, v))
    q, k, v = (x if x is None or x.dim() == 0 or x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    given = Cached(q, k_cache, v_cache, k, v, rotary_cos, rotary_sin, None, cache_batch_idx, cache_leftpad, block_table)
    given = given._replace(cache_seqlens=_lengths(cache_seqlens, given))
    expression, tensors = modified(softcap, alibi_slopes)
    given = given._replace(s_aux=sinks(s_aux), k_descale=k_descale, v_descale=v_descale, tensors=tensors)
    options = options_of(q, softmax_scale, causal, window_sides(window_size), expression=expression)
    out, lse = run_cached(given, options, flag("rotary_interleaved", rotary_interleaved), parts_of(num_splits))
    return (out, lse) if flag("return_softmax_lse", return_softmax_lse) else out


def run_cached(
    given: Cached, options: Options, interleaved: bool, splits: int, into: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(out, lse), by an operator where others look at the call; `into` as in `cached_cuda`."""
    if is_direct(*given.all):
        return cached_cuda(given, options, interleaved, splits, into)
    score, allow, inputs, numbers = (options.expression or Expression())[:4]
    said = (
        *(options.softmax_scale, options.causal, options.window_left, options.window_right, splits, interleaved),
        *(given.s_aux, given.k_descale, given.v_descale, [*given.tensors], score, allow, inputs, [*numbers]),
    )
    q, k_cache, v_cache, k, v, cos, sin, *places = given[:-4]
    try:
        if k is None and v is None and cos is None and sin is None:
            out, lse = _READ(q, k_cache, v_cache, *places, *said)
        else:
            validate_cached(given, splits)  # k or v may be missing, which the operator has no words for
            out, lse = _APPEND(q, k_cache, v_cache, k, v, cos, sin, *places, *said)
        return (out if into is None else into.copy_(out)), lse
    except NotImplementedError:  # ours, or torch's two pages about a backend that has no kernel
        validate_cached(given, splits)
        raise


def _lengths(lengths: Any, given: Cached) -> Tensor | None:
    """cache_seqlens as a tensor: one number is that of each sequence."""
    if lengths is None or isinstance(lengths, Tensor):
        return lengths
    q = given.q
    if isinstance(lengths, torch.SymInt):
        return q.new_full((q.shape[0],), lengths, dtype=torch.int32)
    if torch.compiler.is_compiling() and isinstance(lengths, int) and not isinstance(lengths, bool):
        # It may be symbolic: index() would make a constant of it, and a graph for each length.
        return same_lengths(q, q.shape[0], lengths)
    try:
        number = None if isinstance(lengths, bool) else index(lengths)
    except TypeError:
        number = None
    if number is None:
        raise InvalidInput(
            f"cache_seqlens must be a whole number, an int32 tensor (batch,), or None, not {describe(lengths)}"
        )
    validate_cached(given._replace(k=None, v=None, rotary_cos=None, rotary_sin=None))  # else there is no capacity
    return same_lengths(q, q.shape[0], min(number, capacity_of(given)))


def same_lengths(q: Tensor, batch: int, number: int) -> Tensor:
    """(batch,) int32 on q's device, all this number, or the nearest that a length may be."""
    return q.new_full((batch,), min(max(number, 0), _INT32_MAX), dtype=torch.int32)


def parts_of(num_splits: Any) -> int:
    """num_splits as a number. Raises InvalidInput for what is none."""
    if isinstance(num_splits, torch.SymInt):
        return num_splits  # type: ignore[no-any-return]
    number = whole(num_splits)
    if number is None:
        raise InvalidInput(f"num_splits must be a whole number, or 0 as suits the device, not {describe(num_splits)}")
    return number
