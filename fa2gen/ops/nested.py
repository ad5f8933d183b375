"""Nested tensors of layout jagged, as the ragged batches that they are: values packed one behind the other, offsets."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fa2gen.errors import InvalidInput, UnsupportedProblem
from fa2gen.ops.validate import Lengths, refuse_tensor_kinds

__all__ = ["jagged_like", "packed_jagged"]


def packed_jagged(q: Tensor, k: Tensor, v: Tensor) -> tuple[tuple[Tensor, Tensor, Tensor], Lengths]:
    """(q, k, v) packed, (total, heads, head_dim), and their lengths. Each is (batch, jagged, heads, head_dim).

    Raises UnsupportedProblem or InvalidInput where they are not, and where k and v do not share their offsets: whether
    other ones are equal only the device knows.
    """
    if not all(x.is_nested and x.layout == torch.jagged for x in (q, k, v)):
        refuse_tensor_kinds("qkv", (q, k, v))
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4:
            raise InvalidInput(
                f"{name} has {x.dim()} dimensions; nested it must have 4, (batch, jagged, heads, head_dim)"
            )
        if x._ragged_idx != 1:
            raise UnsupportedProblem(
                f"{name} is nested with its jagged dimension elsewhere than in (batch, jagged, heads, head_dim): pass "
                f"{name}.transpose(1, 2), if it is (batch, heads, jagged, head_dim)"
            )
    of_query, of_key, of_value = (_lengths(x) for x in (q, k, v))
    if any(x is not y for x, y in zip(of_key, of_value, strict=True)):
        raise InvalidInput(
            "k and v are nested with offsets of their own, which may differ; make them of one tensor of offsets: "
            "torch.nested.nested_tensor_from_jagged(v.values(), k.offsets(), k.lengths())"
        )
    (bounds_q, used_q), (bounds_k, used_k) = ([x if x is None else x.int() for x in of] for of in (of_query, of_key))
    assert bounds_q is not None and bounds_k is not None
    return (q.values(), k.values(), v.values()), (bounds_q, bounds_k, used_q, used_k)


def jagged_like(q: Tensor, values: Tensor) -> Tensor:
    """A nested tensor of these values, with the lengths of q."""
    nested: Tensor = torch.nested.nested_tensor_from_jagged(values, *_lengths(q))
    return nested


def _lengths(x: Any) -> tuple[Tensor, Tensor | None]:
    """(offsets, lengths): the second where sequences do not reach to the next offset."""
    return x.offsets(), x.lengths()
