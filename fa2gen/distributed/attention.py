"""The functions: what they take, and which scheme a call gets."""

from __future__ import annotations

import math
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from fa2gen.distributed.gather import AllGather
from fa2gen.distributed.layout import Group, documents_of, process_group, refuse_layout, split_of
from fa2gen.distributed.plan import Layout, Split
from fa2gen.distributed.ring import Ring
from fa2gen.distributed.ulysses import Ulysses
from fa2gen.errors import InvalidInput, UnsupportedProblem
from fa2gen.ops.arguments import NO_WINDOW, Window, options_of, whole, window_sides
from fa2gen.ops.operator import autocasted
from fa2gen.ops.validate import describe, refuse_non_tensors, refuse_tensor_kinds, validate, validate_options

__all__ = ["context_parallel_attention", "context_parallel_varlen_attention"]

Scheme: TypeAlias = Literal["auto", "ring", "allgather", "ulysses"]

_GROUPS = 4
"""In how many parts heads travel at most: but for the first of them, while others are computed."""
_BLOCKS = 4096
"""Of 128 keys that a call should have. With a quarter as many, gradients took 1.14 times half of one GPU's time (two
H100s); that the number of blocks is why was not tried by itself."""
_SHARE_OF_MEMORY = 8
"""allgather may hold keys of an eighth of the device's memory."""


@torch.compiler.disable  # type: ignore[untyped-decorator]  # collectives that are waited for later
def context_parallel_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    group: Group = None,
    causal: bool = False,
    softmax_scale: float | None = None,
    window_size: Window = NO_WINDOW,
    s_aux: Tensor | None = None,
    layout: Layout = "zigzag",
    scheme: Scheme = "auto",
    head_stride: int | None = None,
    deterministic: bool = False,
) -> tuple[Tensor, Tensor]:
    """(out, lse) of this process's rows, both differentiable, once. All processes of the group call it together.

    q (batch, seqlen / W, heads, head_dim); k, v (batch, seqlen / W, heads_kv, head_dim), v's head dim its own if need
    be; out as q, with that; lse (batch, heads, seqlen / W) fp32, the natural logarithm of the softmax sums over all
    keys. fp16 or bf16.

    group          a ProcessGroup, a DeviceMesh of one dimension, or None: all processes.
    causal, softmax_scale, window_size, deterministic
                   as of `fa2gen.attention`, in rows of the whole sequence.
    s_aux          (heads,): attention sinks, logits of a key without value that each query of a head sees. Its gradient
                   is a part in each process: its sum over the group is the whole.
    layout         how rows lie: see `fa2gen.distributed.shard`.
    scheme         "ulysses" needs heads_kv to be a multiple of W. "auto" takes it if so; else "ring" where at most half
                   of the processes have keys that a process sees (a window, contiguous), or where the keys of some
                   heads would take an eighth of the device's memory; else "allgather".
    head_stride    how many key heads travel at a time, of those that a process computes. By default a quarter, or as
                   many as keep a GPU busy. Of no meaning to the ring.

    Raises InvalidInput or UnsupportedProblem, in every process where what they were given agrees.
    """
    options = (softmax_scale, causal, window_size, deterministic)
    return _attention(q, k, v, None, group, options, s_aux, layout, scheme, head_stride)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def context_parallel_varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    *,
    group: Group = None,
    causal: bool = False,
    softmax_scale: float | None = None,
    window_size: Window = NO_WINDOW,
    s_aux: Tensor | None = None,
    layout: Layout = "zigzag",
    scheme: Scheme = "auto",
    head_stride: int | None = None,
    deterministic: bool = False,
) -> tuple[Tensor, Tensor]:
    """`context_parallel_attention` of packed documents, which do not see each other, wherever they are cut.

    q (total / W, heads, head_dim); k, v (total / W, heads_kv, head_dim); lse (heads, total / W).

    cu_seqlens  (documents + 1,) int32: 0, and where each document ends in the rows of all processes together, the same
                in each. Rows behind the last are padding: out and gradients 0, lse -inf. It is read on the host, once a
                tensor: give every layer the same one.

    Raises as that does.
    """
    refuse_non_tensors(q=q, k=k, v=v)
    refuse_tensor_kinds("qkv", (q, k, v))
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 3:
            raise InvalidInput(
                f"{name} has {x.dim()} dimensions, {tuple(x.shape)}; packed it must have 3, (total / W, heads, "
                "head_dim)" + (f": {name}.flatten(0, 1) packs sequences of equal lengths" if x.dim() == 4 else "")
            )
    options = (softmax_scale, causal, window_size, deterministic)
    q, k, v = (x.unsqueeze(0) for x in (q, k, v))
    out, lse = _attention(q, k, v, cu_seqlens, group, options, s_aux, layout, scheme, head_stride)
    return out.squeeze(0), lse.squeeze(0)


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None,
    group: Group,
    said: tuple[Any, ...],
    s_aux: Tensor | None,
    layout: Layout,
    scheme: Scheme,
    head_stride: int | None,
) -> tuple[Tensor, Tensor]:
    """Either function: packed documents are a batch of one."""
    refuse_non_tensors(q=q, k=k, v=v)
    group = process_group(group)
    q, k, v = autocasted(q, k, v)
    validate(q, k, v)
    if q.shape[1] != k.shape[1]:
        raise InvalidInput(
            f"q has {q.shape[1]} rows here, k has {k.shape[1]}; they must be as many: context parallel is for "
            "self-attention. For other keys that every process has whole, call fa2gen.attention"
        )
    scale, causal, window, deterministic = said
    options = options_of(q, scale, causal, window_sides(window), 0, deterministic)
    validate_options(options)
    world, rows = group.size(), q.shape[1] * group.size()
    refuse_layout(layout, rows, group)
    documents = ((0, rows),) if cu_seqlens is None else documents_of(cu_seqlens, rows)
    sides = (options.window_left, 0 if options.causal else options.window_right)
    split = split_of(group.rank(), world, rows, layout, documents, sides)
    if 0 in (*q.shape, *k.shape):
        raise InvalidInput(f"q is {tuple(q.shape)} and k {tuple(k.shape)}: each process must have rows, heads and keys")
    _validate_sinks(s_aux, q.shape[2])
    chosen = _scheme(scheme, q, k, v, split)
    if chosen == "ring":
        out, lse = Ring.apply(q, k, v, s_aux, options, split, group)
    else:
        computed = k.shape[2] // world if chosen == "ulysses" else k.shape[2]
        stride = _stride(head_stride, computed, k.shape[0] * math.ceil(rows / 128))
        out, lse = (Ulysses if chosen == "ulysses" else AllGather).apply(q, k, v, s_aux, options, split, group, stride)
    return out, lse


def _scheme(asked: object, q: Tensor, k: Tensor, v: Tensor, split: Split) -> str:
    if not isinstance(asked, str) or asked not in get_args(Scheme):
        raise InvalidInput(f"scheme is {asked!r}; it must be one of {', '.join(map(repr, get_args(Scheme)))}")
    divides = k.shape[2] % split.world == 0
    if asked == "ulysses" and not divides:
        raise UnsupportedProblem(
            f'scheme "ulysses" gives each process as many key heads, and {k.shape[2]} are no multiple of '
            f'{split.world} processes: take "allgather", or "auto", which does'
        )
    if asked != "auto":
        return str(asked)
    if divides:
        return "ulysses"
    few_steps = 2 * len(split.steps) <= split.world
    return "ring" if few_steps or _gathered_bytes(k, v, split) > _memory(q) // _SHARE_OF_MEMORY else "allgather"


def _gathered_bytes(k: Tensor, v: Tensor, split: Split) -> int:
    """Of K and V of the heads that are computed and of the next ones, and of the fp32 sums of both's gradients."""
    heads = _stride(None, k.shape[2], k.shape[0] * math.ceil(split.rows / 128))
    found: int = k.shape[0] * split.rows * heads * (k.shape[3] + v.shape[3]) * (2 * k.element_size() + 2 * 4)
    return found


def _memory(q: Tensor) -> int:
    """Of the device in bytes: all of it, as what is free differs from process to process, and all must choose alike."""
    if not q.is_cuda:
        return 1 << 62
    total: int = torch.cuda.get_device_properties(q.device).total_memory
    return total


def _stride(given: Any, heads: int, blocks: int) -> int:
    """How many key heads travel at a time, of `heads` with so many blocks of keys each."""
    if given is None:
        return min(heads, max(math.ceil(heads / _GROUPS), math.ceil(_BLOCKS / blocks)))
    stride = whole(given)
    if stride is None or stride < 1:
        raise InvalidInput(f"head_stride must be a whole number of key heads from 1, or None, not {describe(given)}")
    return min(stride, heads)


def _validate_sinks(s_aux: Any, heads: int) -> None:
    of_floats = isinstance(s_aux, Tensor) and not s_aux.is_nested and s_aux.is_floating_point()
    if s_aux is not None and (not of_floats or s_aux.shape != (heads,)):
        raise InvalidInput(f"s_aux is {describe(s_aux)}; it must be ({heads},), a number for each head of q")
