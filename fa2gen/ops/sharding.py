"""How the operators run on DTensors: rules for torch.distributed.tensor, which is imported here and nowhere else.

A call is independent in each batch element, and in each key head together with the query heads that share it. Both may
lie on several devices; everything else must be whole on each.
"""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import torch
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding

from fa2gen.errors import UnsupportedProblem
from fa2gen.ops.validate import LENGTHS

__all__ = ["register"]

_BATCH = 0  # dimension of all tensors of a batch that is not ragged
_NUM_LENGTHS = len(LENGTHS)
_OF_NO_TENSORS = None  # in the place of a list, which is empty


def register() -> None:
    """Tell DTensor the rules of all operators."""
    register_sharding(torch.ops.fa2gen.fwd.default)(partial(_forward, False))
    register_sharding(torch.ops.fa2gen.bwd.default)(partial(_backward, False))
    register_sharding(torch.ops.fa2gen.fwd_varlen.default)(partial(_forward, True))
    register_sharding(torch.ops.fa2gen.bwd_varlen.default)(partial(_backward, True))
    register_sharding(torch.ops.fa2gen.fwd_general.default)(_forward_general)
    general = torch.ops.fa2gen.bwd_general.default
    register_sharding(general)(_backward_general)
    strategies = DTensor._op_dispatcher.sharding_propagator.op_strategy_funcs
    strategies[general] = partial(_with_a_list, strategies[general])


def _with_a_list(strategy: Any, schema: Any) -> Any:
    """A strategy whose last result is a list, of no tensors: `register_sharding` has no word for one."""
    found = strategy(schema)
    for one in found.strategies:
        one.output_specs = (*one.output_specs[:-1], [])
    return found


def _forward(ragged: bool, q: Any, k: Any, v: Any, *others: Any) -> list[tuple[list[Any], list[Any]]]:
    """Placements of (out, lse), and of (q, k, v, lengths if ragged, and None for each option), that go together."""
    rest = _of_others(ragged, others)
    return [([of_q, rows], [of_q, of_k, of_k, *rest]) for of_q, of_k, rows in _placements(ragged, q, k)]


def _backward(
    ragged: bool, dout: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, dlse: Any, *others: Any
) -> list[tuple[list[Any], list[Any]]]:
    """The same of (dq, dk, dv), and of (dout, q, k, v, out, lse, dlse, lengths if ragged, options)."""
    rest = _of_others(ragged, others)
    return [
        ([of_q, of_k, of_k], [of_q, of_q, of_k, of_k, of_q, rows, None if dlse is None else rows, *rest])
        for of_q, of_k, rows in _placements(ragged, q, k)
    ]


def _forward_general(q: Any, k: Any, v: Any, *others: Any) -> list[tuple[list[Any], list[Any]]]:
    """`_forward` with lengths, or None in their places, and s_aux, rng_state and tensors behind them."""
    *lengths, s_aux, rng_state, tensors = others[: _NUM_LENGTHS + 3]
    options = others[_NUM_LENGTHS + 3 :]
    _refuse_own_places(tensors, options)
    found = []
    for results, inputs in _forward(any(x is not None for x in lengths), q, k, v, *lengths, *options):
        of_head = _of_heads(s_aux, results[1], len(q.shape))
        at = 3 + _NUM_LENGTHS
        of_bits = None if rng_state is None else Replicate()
        found.append((results, [*inputs[:at], of_head, of_bits, _OF_NO_TENSORS, *inputs[at:]]))
    return found if rng_state is None else found[:1]  # heads and sequences are numbered in each shard from 0


def _backward_general(
    dout: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, dlse: Any, *others: Any
) -> list[tuple[list[Any], list[Any]]]:
    """`_backward` likewise; ds_aux is a sum over the batch."""
    *lengths, s_aux, rng_state, inputs_of_expression = others[: _NUM_LENGTHS + 3]
    options = others[_NUM_LENGTHS + 3 :]
    _refuse_own_places(inputs_of_expression, options)
    tensors = (dout, q, k, v, out, lse, dlse)
    found = []
    for results, inputs in _backward(any(x is not None for x in lengths), *tensors, *lengths, *options):
        rows, at = inputs[5], 7 + _NUM_LENGTHS
        of_head = _of_heads(s_aux, rows, len(q.shape))
        of_gradient = Partial() if s_aux is not None and of_head == Replicate() != rows else of_head or Replicate()
        of_bits = None if rng_state is None else Replicate()
        found.append(
            ([*results, of_gradient, _OF_NO_TENSORS], [*inputs[:at], of_head, of_bits, _OF_NO_TENSORS, *inputs[at:]])
        )
    return found if rng_state is None else found[:1]


def _refuse_own_places(tensors: Any, options: tuple[Any, ...]) -> None:
    """Raise UnsupportedProblem for an expression that tells heads or batch entries apart: a shard counts its own."""
    texts = [x for x in options if isinstance(x, str)]
    if tensors or any(re.search(r"\b(b|h|hk)\b", text) for text in texts):
        raise UnsupportedProblem(
            f"expressions of heads, batch entries or tensors run on no DTensors ({' '.join(texts)}); nearest: one of "
            "s, i, j and numbers, or the local tensors, to_local()"
        )


def _of_heads(s_aux: Any, rows: Any, rank: int) -> Any:
    """Where a tensor of one number a head is, when rows (batch, heads, seqlen), or (heads, total), are so."""
    if s_aux is None:
        return None
    return Shard(0) if rows == Shard(rank - 3) else Replicate()


def _of_others(ragged: bool, others: tuple[Any, ...]) -> list[Any]:
    """Lengths are the same everywhere; options are no tensors."""
    lengths = others[:_NUM_LENGTHS] if ragged else ()
    return [*(None if x is None else Replicate() for x in lengths), *[None] * (len(others) - len(lengths))]


def _placements(ragged: bool, q: Any, k: Any) -> list[tuple[Any, Any, Any]]:
    """Of tensors like q, of k and v, and of rows."""
    found: list[tuple[Any, Any, Any]] = [(Replicate(), Replicate(), Replicate())]
    if not ragged:
        found.append((Shard(_BATCH), Shard(_BATCH), Shard(_BATCH)))
    of_q, of_k = len(q.shape) - 2, len(k.shape) - 2  # (..., heads, head_dim), and rows (batch, heads, seqlen)
    if _heads_stay_together(q.shape[of_q], k.shape[of_k], q.mesh):
        found.append((Shard(of_q), Shard(of_k), Shard(0 if ragged else 1)))
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
