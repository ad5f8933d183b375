"""Between a whole tensor and the rows of it that each process has."""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise
from typing import Any, TypeAlias, get_args

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.utils.weak import WeakIdKeyDictionary

from fa2gen.distributed.plan import Layout, Split, pieces_of
from fa2gen.errors import InvalidInput
from fa2gen.ops.arguments import whole
from fa2gen.ops.validate import describe, refuse_non_tensors, refuse_tensor_kinds

__all__ = ["Group", "documents_of", "positions", "process_group", "refuse_layout", "shard", "split_of", "unshard"]

Group: TypeAlias = Any
"""A ProcessGroup, a DeviceMesh of one dimension, or None: all processes."""

_documents: WeakIdKeyDictionary = WeakIdKeyDictionary()  # cu_seqlens -> (its version, what it says)


def shard(x: Tensor, group: Group = None, dim: int = 1, layout: Layout = "zigzag") -> Tensor:
    """This process's rows of x, which all processes have whole; a copy, differentiable.

    dim  of the sequence: 1 of (batch, seqlen, ...), 0 of packed rows (total, ...).

    Raises InvalidInput where the rows can not be divided: by W, or by 2 W with layout "zigzag".
    """
    dim, rows = _along(x, dim)
    group = process_group(group)
    refuse_layout(layout, rows, group)
    pieces = pieces_of(group.rank(), group.size(), rows, layout)
    return torch.cat([x.narrow(dim, piece.start, piece.end - piece.start) for piece in pieces], dim)


def unshard(x: Tensor, group: Group = None, dim: int = 1, layout: Layout = "zigzag") -> Tensor:
    """The whole tensor, in every process, of what `shard` or a result of attention has here. To look at, not to train
    with: it has no gradient, and raises InvalidInput for a tensor that wants one."""
    dim, rows_here = _along(x, dim)
    if torch.is_grad_enabled() and x.requires_grad:
        raise InvalidInput("unshard has no gradient, and x requires one: pass x.detach(), or train with the shards")
    group = process_group(group)
    world, rows = group.size(), rows_here * group.size()
    refuse_layout(layout, rows, group)
    every = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(world)]
    dist.all_gather(every, x.contiguous(), group=group)
    split = Split(group.rank(), world, rows, layout, (), (-1, -1))
    return torch.cat([every[rank].narrow(dim, p.at, p.end - p.start) for rank, p in split.in_order], dim)


def _along(x: Any, dim: Any) -> tuple[int, int]:
    """(dim, rows of x along it). Raises InvalidInput or UnsupportedProblem where there is no such dimension."""
    refuse_non_tensors(x=x)
    refuse_tensor_kinds("x", [x])
    at = whole(dim)
    if at is None or not -x.dim() <= at < x.dim():
        raise InvalidInput(f"dim is {describe(dim)}; it must be one of the {x.dim()} dimensions of x, {tuple(x.shape)}")
    return at, x.shape[at]


def positions(
    seqlen: int,
    group: Group = None,
    layout: Layout = "zigzag",
    *,
    cu_seqlens: Tensor | None = None,
    device: Any = None,
) -> Tensor:
    """Where in the sequence of `seqlen` rows each of this process's rows stands: (seqlen / W,) int64, as rotary
    embeddings need it. With cu_seqlens, `seqlen` are all rows, and each counts from its document's first."""
    if cu_seqlens is not None:
        _refuse_bounds(cu_seqlens)
        device = cu_seqlens.device if device is None else device
    rows = whole(seqlen)
    if rows is None or rows < 0:
        raise InvalidInput(f"seqlen must be a whole number of rows, not {describe(seqlen)}")
    every = torch.arange(rows, device=device)
    if cu_seqlens is not None and cu_seqlens.numel() > 1:
        bounds = cu_seqlens.to(every.dtype)
        every = every - bounds[torch.searchsorted(bounds, every, right=True) - 1]
    return shard(every, group, 0, layout)


def process_group(group: Group) -> ProcessGroup:
    """The ProcessGroup that is meant. Raises InvalidInput where there is none."""
    if not (dist.is_available() and dist.is_initialized()):
        raise InvalidInput(
            "torch.distributed is not initialised: call torch.distributed.init_process_group first, in each process "
            "that torchrun starts (one process alone calls fa2gen.attention)"
        )
    if group is None:
        return dist.group.WORLD
    if isinstance(group, ProcessGroup):
        return group
    if hasattr(group, "get_group") and getattr(group, "ndim", 0) == 1:
        return group.get_group()
    raise InvalidInput(
        f"group is {describe(group)}; it must be a ProcessGroup that this process is in, a DeviceMesh of one "
        'dimension (mesh["cp"] of several), or None: all processes'
    )


def refuse_layout(layout: object, rows: int, group: ProcessGroup) -> None:
    """Raise InvalidInput unless `rows` of a whole sequence can be spread so."""
    if not isinstance(layout, str) or layout not in get_args(Layout):
        raise InvalidInput(f"layout is {layout!r}; it must be one of {', '.join(map(repr, get_args(Layout)))}")
    parts = group.size() * (2 if layout == "zigzag" else 1)
    if rows % parts:
        hint = ', or take layout="contiguous"' if layout == "zigzag" and rows % group.size() == 0 else ""
        raise InvalidInput(
            f"{rows} rows over {group.size()} processes: with layout {layout!r} they must be a multiple of {parts}. "
            f"Pad them to {-(-rows // parts) * parts}{hint}"
        )


@lru_cache(maxsize=64)
def split_of(
    rank: int,
    world: int,
    rows: int,
    layout: Layout,
    documents: tuple[tuple[int, int], ...],
    window: tuple[int, int],
) -> Split:
    """The same one for the same question: what it derives is derived once."""
    return Split(rank, world, rows, layout, documents, window)


def documents_of(cu_seqlens: Tensor, rows: int) -> tuple[tuple[int, int], ...]:
    """[start, end) of each document with rows, of cu_seqlens (documents + 1,) int32, the same in every process.

    Read once of a tensor, which the device is waited for: every layer that is given the same tensor has them then.
    Raises InvalidInput where they do not rise from 0 to `rows` at most.
    """
    _refuse_bounds(cu_seqlens)
    version = None if cu_seqlens.is_inference() else cu_seqlens._version  # inference tensors have none
    found = _documents.get(cu_seqlens)
    if found is None or version is None or found[0] != version:
        found = _documents[cu_seqlens] = (version, cu_seqlens.tolist())
    bounds = found[1]
    if not bounds or bounds[0] != 0 or bounds[-1] > rows or sorted(bounds) != bounds:
        raise InvalidInput(
            f"cu_seqlens must rise from 0 to at most {rows}, the rows of all processes; it is {_shortened(bounds)}"
        )
    return tuple((start, end) for start, end in pairwise(bounds) if end > start)


def _refuse_bounds(cu_seqlens: Any) -> None:
    refuse_non_tensors(cu_seqlens=cu_seqlens)
    refuse_tensor_kinds(["cu_seqlens"], [cu_seqlens])
    if cu_seqlens.dim() != 1 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise InvalidInput(f"cu_seqlens is {describe(cu_seqlens)}; it must be (documents + 1,) torch.int32")


def _shortened(numbers: list[int]) -> str:
    return str(numbers) if len(numbers) <= 8 else f"[{', '.join(map(str, numbers[:6]))}, ..., {numbers[-1]}]"
