"""The functions of flash_attn 2.8 for ragged batches: same names, argument order, defaults and shapes.

Longest lengths may be left out, and are never read from the device. Options that flash_attn does not have are
keyword-only, behind its own.
"""

from __future__ import annotations

from typing import Any, Literal, TypeAlias, overload

import torch
from torch import Tensor

from fa2gen.errors import InvalidInput, UnsupportedProblem
from fa2gen.ops.arguments import (
    NO_WINDOW,
    Modified,
    Window,
    flag,
    modified,
    new_rng_state,
    options_of,
    probability,
    sinks,
    whole,
    window_sides,
)
from fa2gen.ops.autograd import attend, attend_for_ragged_out, is_plain, wants_gradient
from fa2gen.ops.call import AnyOptions
from fa2gen.ops.flash import Result, WithLse, unpacked
from fa2gen.ops.operator import run_general, run_ragged
from fa2gen.ops.paged_operator import run_paged
from fa2gen.ops.ragged import are_plain, forward_ragged, forward_ragged_out
from fa2gen.ops.validate import (
    describe,
    refuse_non_lengths,
    refuse_non_tensors,
    refuse_tensor_kinds,
    validate_ragged,
)
from fa2gen.ops.validate_cache import Paged
from fa2gen.options import Options, Queries
from fa2gen.reference import dropout_mask

__all__ = [
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "longest_known",
    "over_pages",
    "paged",
]

MaxSeqlen: TypeAlias = int | Tensor | None


@overload
def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: MaxSeqlen = None,
    max_seqlen_k: MaxSeqlen = None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = NO_WINDOW,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: Literal[False] = False,
    block_table: Tensor | None = None,
    *,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    attention_chunk: int = 0,
    s_aux: Tensor | None = None,
) -> Tensor: ...


@overload
def flash_attn_varlen_func(
    q: Tensor, k: Tensor, v: Tensor, *args: Any, return_attn_probs: Literal[True], **options: Any
) -> WithLse: ...


def flash_attn_varlen_func(  # type: ignore[misc]  # the second overload leaves out what the first says
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: MaxSeqlen = None,
    max_seqlen_k: MaxSeqlen = None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = NO_WINDOW,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
    *,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    attention_chunk: int = 0,
    s_aux: Tensor | None = None,
) -> Result:
    """`flash_attn_func` of a ragged batch: sequences of their own lengths, packed one behind the other.

    q (total_q, heads, head_dim); k, v (total_k, heads_kv, head_dim); fp16 or bf16. v may have a head dim of its own,
    which out has then. Sequence i has queries cu_seqlens_q[i] to cu_seqlens_q[i + 1], or the first seqused_q[i] of
    them, and keys likewise; masks are aligned to the bottom right of each. Rows that no sequence has are padding:
    whatever they hold reaches no result, and there out and gradients are 0, LSE -inf.

    cu_seqlens_q, _k   (batch + 1,) int32, on q's device. None: that side is dense, (batch, seqlen, heads, head_dim),
                       its rows evenly spaced.
    max_seqlen_q, _k   may be left out. A tensor is not read; a number of keys helps to choose the quickest kernel.
    return_attn_probs  return (out, lse, None) rather than out; lse (heads, total_q) fp32, differentiable. With dropout
                       the third is a mask (batch, heads, max_seqlen_q, max_seqlen_k), as `flash_attn_func` says.
    seqused_q, _k      (batch,) int32: how many rows of each sequence count; None: all.
    block_table        (batch, pages) int32: k and v are pages then, (pages, page_size, heads_kv, head_dim) of any
                       page_size and strides, never copied. Sequence i has as many keys as cu_seqlens_k or seqused_k
                       say, in the pages that row i names; entries behind its last page are not looked at. Forward only.

    The others are those of `flash_attn_func`. Lengths stay on the device, which nothing here waits for; ones that do
    not rise, or run past the tensors, give wrong numbers at worst. Raises InvalidInput, or UnsupportedProblem as
    `flash_attn_func` does.
    """
    if block_table is not None:
        if probability(dropout_p):
            raise UnsupportedProblem("dropout over pages is not built: pages are for inference; nearest: dropout_p=0.0")
        pages = paged(q, k, v, block_table, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, s_aux)
        said = options_of(q, softmax_scale, causal, window_sides(window_size), attention_chunk, varlen=True)
        out, lse = over_pages(pages, said, modified(softcap, alibi_slopes), max_seqlen_k)
        return (out, lse, None) if flag("return_attn_probs", return_attn_probs) else out
    if dropout_p.__class__ is not float or dropout_p:
        dropout_p = probability(dropout_p)
    expression, tensors = None, ()
    if softcap.__class__ is not float or softcap or alibi_slopes is not None:
        expression, tensors = modified(softcap, alibi_slopes)
    lengths = (cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k)
    left, right = window_sides(window_size)
    options: AnyOptions = (
        softmax_scale, causal, left, right, attention_chunk, deterministic, True, False, expression, 0.0, False
    )  # fmt: skip
    plain_numbers = (
        (softmax_scale is None or softmax_scale.__class__ is float)
        and (causal is True or causal is False)
        and (deterministic is False or deterministic is True)
        and attention_chunk.__class__ is int
        and 0 <= attention_chunk < 1 << 63
    )
    if (
        plain_numbers
        and s_aux is None
        and not tensors
        and not dropout_p
        and (return_attn_probs is False or return_attn_probs is True)
        and (max_seqlen_k is None or (max_seqlen_k.__class__ is int and max_seqlen_k >= 0))
        and (max_seqlen_q is None or (max_seqlen_q.__class__ is int and max_seqlen_q >= 0))
        and is_plain(q, k, v)
        and (
            (cu_seqlens_q.__class__ is cu_seqlens_k.__class__ is Tensor and seqused_q is seqused_k is None)
            or are_plain(lengths)
        )
    ):
        max_keys: int | None = max_seqlen_k
        learns = torch.is_grad_enabled() and wants_gradient(q, k, v)
        if not return_attn_probs:
            if learns:
                return attend_for_ragged_out(q, k, v, *lengths, options, max_keys)
            return forward_ragged_out(q, k, v, lengths, options, max_keys)
        given = (q, k, v, *lengths, options, max_keys)
        out, lse = attend(forward_ragged, *given) if learns else forward_ragged(*given)
        return out, lse, None
    if not (isinstance(q, Tensor) and isinstance(k, Tensor) and isinstance(v, Tensor)):
        refuse_non_tensors(q=q, k=k, v=v)
    refuse_tensor_kinds("qkv", (q, k, v))
    refuse_non_lengths(lengths)
    max_keys = None
    if not torch.compiler.is_compiling():  # there a number would be a constant of the graph, and another make a new one
        longest_known("max_seqlen_q", max_seqlen_q)
        max_keys = longest_known("max_seqlen_k", max_seqlen_k)
    if not plain_numbers:
        options = options_of(q, softmax_scale, causal, (left, right), attention_chunk, deterministic, True, expression)
    return_attn_probs = flag("return_attn_probs", return_attn_probs)
    if dropout_p and return_attn_probs:
        longest = longest_known("max_seqlen_q", max_seqlen_q), longest_known("max_seqlen_k", max_seqlen_k)
        if None in longest:
            raise InvalidInput(
                "with dropout, return_attn_probs gives a mask (batch, heads, max_seqlen_q, max_seqlen_k), and these "
                f"are {max_seqlen_q!r} and {max_seqlen_k!r}: pass whole numbers"
            )
        rng_state = new_rng_state(q)
        out, lse = run_general(q, k, v, lengths, options, max_keys, s_aux, dropout_p, rng_state, tensors)
        batch = validate_ragged(q, k, v, lengths)
        mask = dropout_mask(rng_state, dropout_p, batch, q.shape[-2], *longest, q.dtype)  # type: ignore[arg-type]
        return out, lse, mask
    out, lse = run_ragged(q, k, v, lengths, options, max_keys, s_aux, tensors, dropout_p)
    return (out, lse, None) if return_attn_probs else out


@overload
def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor | None,
    max_seqlen: MaxSeqlen = None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = NO_WINDOW,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: Literal[False] = False,
    *,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    attention_chunk: int = 0,
    s_aux: Tensor | None = None,
) -> Tensor: ...


@overload
def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor, *args: Any, return_attn_probs: Literal[True], **options: Any
) -> WithLse: ...


def flash_attn_varlen_qkvpacked_func(  # type: ignore[misc]  # the second overload leaves out what the first says
    qkv: Tensor,
    cu_seqlens: Tensor | None,
    max_seqlen: MaxSeqlen = None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = NO_WINDOW,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    attention_chunk: int = 0,
    s_aux: Tensor | None = None,
) -> Result:
    """`flash_attn_varlen_func` of the slices of qkv (total, 3, heads, head_dim), which are not copied.

    Raises as that does, and InvalidInput for another shape.
    """
    q, k, v = unpacked("qkv", qkv, 3, "batch, seqlen" if cu_seqlens is None else "total")
    lengths = (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
    options = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs)
    return flash_attn_varlen_func(  # type: ignore[call-overload]
        *(q, k, v, *lengths, *options),
        seqused_q=seqused_q,
        seqused_k=seqused_k,
        attention_chunk=attention_chunk,
        s_aux=s_aux,
    )


@overload
def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: MaxSeqlen = None,
    max_seqlen_k: MaxSeqlen = None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = NO_WINDOW,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: Literal[False] = False,
    *,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    attention_chunk: int = 0,
    s_aux: Tensor | None = None,
) -> Tensor: ...


@overload
def flash_attn_varlen_kvpacked_func(
    q: Tensor, kv: Tensor, *args: Any, return_attn_probs: Literal[True], **options: Any
) -> WithLse: ...


def flash_attn_varlen_kvpacked_func(  # type: ignore[misc]  # the second overload leaves out what the first says
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: MaxSeqlen = None,
    max_seqlen_k: MaxSeqlen = None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = NO_WINDOW,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    attention_chunk: int = 0,
    s_aux: Tensor | None = None,
) -> Result:
    """`flash_attn_varlen_func` of q and the slices of kv (total_k, 2, heads_kv, head_dim), which are not copied.

    Raises as that does, and InvalidInput for another shape.
    """
    k, v = unpacked("kv", kv, 2, "batch, seqlen" if cu_seqlens_k is None else "total")
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    options = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs)
    return flash_attn_varlen_func(  # type: ignore[call-overload]
        *(q, k, v, *lengths, *options),
        seqused_q=seqused_q,
        seqused_k=seqused_k,
        attention_chunk=attention_chunk,
        s_aux=s_aux,
    )


def paged(*tensors: Any) -> Paged:
    """The tensors of a `Paged`, as a caller gives them. Raises InvalidInput for what is none."""
    given = dict(zip(Paged._fields, tensors, strict=True))
    refuse_non_tensors(**{name: x for name, x in given.items() if x is not None or name in Paged._fields[:4]})
    refuse_tensor_kinds("q", tensors[:1])
    return Paged(**{**given, "s_aux": sinks(given["s_aux"])})


def over_pages(
    given: Paged,
    options: Options,
    expression: Modified = (None, ()),
    max_keys: Any = None,
    into: tuple[Tensor, Tensor] | None = None,
    queries: Queries = "uneven",
) -> tuple[Tensor, Tensor]:
    """(out, lse) of a ragged batch over pages, whose scores become what the expression says; `into` if given, and
    `queries` as `paged_cuda` takes it."""
    found, tensors = expression
    if found:
        found = found._replace(shapes=tuple(tuple(x.shape) for x in tensors))
    longest = None if torch.compiler.is_compiling() else longest_known("max_seqlen_k", max_keys)
    return run_paged(given, tensors, options._replace(expression=found), longest, into, queries)


def longest_known(name: str, given: Any) -> int | None:
    """The rows of the longest sequence, as far as the host knows them; a tensor is not read."""
    if given.__class__ is int and given >= 0:
        return given
    if given is None or isinstance(given, Tensor | torch.SymInt):
        return None
    rows = whole(given)
    if rows is None or rows < 0:
        raise InvalidInput(
            f"{name} must be a whole number of rows, a tensor (which is not read) or None, not {describe(given)}"
        )
    return rows
