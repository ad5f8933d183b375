"""The operator of ragged batches whose keys lie in pages, `fa2gen::fwd_paged`, and one call of it, or past it.

Registered with the others in `fa2gen.ops.library`. It has no gradient, no rule for vmap, and counts as the products
over all rows that the pages of a sequence hold.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fa2gen.ops.arguments import named
from fa2gen.ops.forward_only import forward_only, is_direct
from fa2gen.ops.paged import checked_paged, paged_cuda, paged_reference
from fa2gen.ops.validate import out_shape
from fa2gen.ops.validate_cache import Paged
from fa2gen.options import Expression, Options, Queries, expression_said

__all__ = ["PAGED_SCHEMAS", "paged_kernels", "run_paged"]

_NAME = "fwd_paged"
_FIELDS = ("softmax_scale", "causal", "window_left", "window_right", "chunk", "score", "allow", "inputs", "numbers")
_NAMED = (*_FIELDS, "queries")
_OPTIONS = (
    "float softmax_scale, bool causal=False, SymInt window_left=-1, SymInt window_right=-1, SymInt chunk=0, "
    'str score="", str allow="", str inputs="", float[] numbers=[], '
    'str queries="uneven"'
)
_OPTIONAL = Paged._fields[4:]
_TENSORS = ", ".join(f"Tensor{'?' if name in _OPTIONAL else ''} {name}" for name in Paged._fields)
PAGED_SCHEMAS = {_NAME: f"({_TENSORS}, Tensor[] tensors, {_OPTIONS}) -> (Tensor out, Tensor lse)"}


def run_paged(
    given: Paged,
    tensors: Sequence[Tensor],
    options: Options,
    max_keys: int | None = None,
    into: tuple[Tensor, Tensor] | None = None,
    queries: Queries = "uneven",
) -> tuple[Tensor, Tensor]:
    """(out, lse) of options with a scale, by the operator where others look at the call; see `paged_cuda`."""
    if is_direct(*given, *tensors):
        return paged_cuda(given, tensors, options, max_keys, into, queries)
    said = named(options) | {"queries": queries}
    try:
        found = getattr(torch.ops.fa2gen, _NAME).default(
            *given, [*tensors], **{name: said[name] for name in _NAMED if name in said}
        )
    except NotImplementedError:  # ours, or torch's two pages about a backend that has no kernel
        checked_paged(given, tensors, options)
        raise
    if into is None:
        out, lse = found
        return out, lse
    for buffer, x in zip(into, found, strict=True):
        buffer.copy_(x)
    return into


def _called(implementation: Callable[..., Any]) -> Callable[..., Any]:
    """An implementation that takes (Paged, tensors, Options, queries), as the dispatcher calls it."""

    def implemented(*arguments: Any, **others: Any) -> Any:
        count = len(Paged._fields)
        given, tensors = Paged(*arguments[:count]), arguments[count]
        said = dict(zip(_NAMED, arguments[count + 1 :], strict=False)) | others
        queries = said.pop("queries", "uneven")
        expression = expression_said(said, tensors)
        said = {name: value for name, value in said.items() if name not in Expression._fields}
        options = Options(**said, varlen=True, sink=given.s_aux is not None, expression=expression)
        return implementation(given, tensors, options, queries)

    return implemented


def _cuda(given: Paged, tensors: Sequence[Tensor], options: Options, queries: Queries) -> tuple[Tensor, Tensor]:
    return paged_cuda(given, tensors, options, queries=queries)


def _cpu(given: Paged, tensors: Sequence[Tensor], options: Options, _: Queries) -> tuple[Tensor, Tensor]:
    return paged_reference(given, tensors, options)


def _fake(given: Paged, tensors: Sequence[Tensor], options: Options, _: Queries) -> tuple[Tensor, Tensor]:
    checked_paged(given, tensors, options)
    q = given.q
    rows = q.shape[0] if q.dim() == 3 else q.shape[0] * q.shape[1]
    return q.new_empty(out_shape(q, given.v)), q.new_empty((q.shape[-2], rows), dtype=torch.float32)


def _flops(*arguments: Any, **_: Any) -> int:
    given = Paged(*arguments[: len(Paged._fields)])
    q = given.q
    rows = q.shape[0] if q.dim() == 3 else q.shape[0] * q.shape[1]
    return int(2 * rows * q.shape[-2] * given.capacity * (q.shape[-1] + given.v.shape[-1]))


def paged_kernels() -> Mapping[str, Callable[..., Any]]:
    """Dispatch key, or kind of rule -> what the operator has for it."""
    kernels = {
        "CPU": _called(_cpu),
        "CUDA": _called(_cuda),
        "fake": _called(_fake),
        "flops": _flops,
    }
    instead = (
        "pages is not built; what is mapped over is a longer ragged batch: put the queries one behind the other, join "
        "their cu_seqlens_q, each with the totals before it added, and stack the tables"
    )
    return forward_only(_NAME, kernels, instead)
