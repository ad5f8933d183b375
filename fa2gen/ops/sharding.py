"""How the operators run on DTensors: rules for torch.distributed.tensor, which is imported here and nowhere else.

A call is independent in each batch element, and in each key head together with the query heads that share it. Both may
lie on several devices; everything else must be whole on each.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding

__all__ = ["register"]

# Dimensions of (batch, seqlen, heads, head_dim) tensors, and of (batch, heads, seqlen) rows.
_BATCH, _HEADS, _ROW_HEADS = 0, 2, 1


def register() -> None:
    """Tell DTensor the rules of both operators."""
    register_sharding(torch.ops.fa2gen.fwd.default)(_forward)
    register_sharding(torch.ops.fa2gen.bwd.default)(_backward)


def _forward(q: Any, k: Any, v: Any, *options: Any) -> list[tuple[list[Any], list[Any]]]:
    """Placements of (out, lse), and of (q, k, v, and None for each option), that go together."""
    none = [None] * len(options)
    return [([of_q, rows], [of_q, of_k, of_k, *none]) for of_q, of_k, rows in _placements(q, k)]


def _backward(
    dout: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, dlse: Any, *options: Any
) -> list[tuple[list[Any], list[Any]]]:
    """The same of (dq, dk, dv), and of (dout, q, k, v, out, lse, dlse, options)."""
    none = [None] * len(options)
    return [
        ([of_q, of_k, of_k], [of_q, of_q, of_k, of_k, of_q, rows, None if dlse is None else rows, *none])
        for of_q, of_k, rows in _placements(q, k)
    ]


def _placements(q: Any, k: Any) -> list[tuple[Any, Any, Any]]:
    """Of tensors like q, of k and v, and of rows."""
    found = [(Replicate(), Replicate(), Replicate()), (Shard(_BATCH), Shard(_BATCH), Shard(_BATCH))]
    if _heads_stay_together(q.shape[_HEADS], k.shape[_HEADS], q.mesh):
        found.append((Shard(_HEADS), Shard(_HEADS), Shard(_ROW_HEADS)))
    return found


def _heads_stay_together(num_heads: int, num_heads_kv: int, mesh: Any) -> bool:
    """Whether each shard of the query heads has its key heads in the same shard of those.

    Where lengths do not divide evenly, DTensor makes the first shards longer: of 12 query and 3 key heads on two
    devices, query head 3 would be with key heads 0 and 1, in a group of 3 in place of 4. A mesh may spread the heads
    over several of its dimensions, unless there are fewer key heads than devices.
    """
    if num_heads == num_heads_kv:
        return True
    over_all = num_heads_kv < mesh.size() or num_heads_kv % mesh.size() == 0
    return over_all and all(num_heads_kv % size == 0 for size in mesh.shape)
