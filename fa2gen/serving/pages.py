"""A ragged batch over pages, by the kernels that suit how many queries its sequences have."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fa2gen.errors import InvalidInput, UnsupportedProblem
from fa2gen.ops.arguments import Modified
from fa2gen.ops.call import calls_for_decoding
from fa2gen.ops.flash_kvcache import parts_of, run_cached
from fa2gen.ops.flash_varlen import longest_known, over_pages
from fa2gen.ops.forward_only import is_direct
from fa2gen.ops.validate import describe, refuse_non_tensors, validate_heads, validate_lengths
from fa2gen.ops.validate_cache import CACHE_DTYPES, Cached, Paged, validate_splits, validate_table
from fa2gen.ops.widen import Narrow, widen
from fa2gen.options import Options, Queries

__all__ = ["SHORT_ROWS", "attend", "refuse", "validate_out"]

SHORT_ROWS = 64
"""Queries of a sequence times heads of a group, up to which kernels of decoding read 8-bit pages: they split keys over
the device, where a block of prefill's 128 to 256 rows would be mostly empty."""

_ROWS_OF_A_TILE = 16
"""The same that kernels of decoding have in their smallest tiles. More are multiplied by more warps, and give other
bits."""

_PARTS_AT_ONCE = 16
"""Of a sequence's keys, that kernels of decoding put together at once."""

WIDE_BYTES = 1 << 30
"""The most memory that keys of 8-bit pages take in 16 bits: where all heads' would be more, some heads are widened and
attended to after the others."""

_WIDE_ROWS = 640  # a multiple of them has whole tiles of 64, 80, 128 and 160 keys


def attend(
    given: Paged,
    options: Options,
    expression: Modified,
    most_queries: Any,
    most_keys: Any = None,
    num_splits: int = 0,
    out: Tensor | None = None,
    scales: tuple[Tensor | None, Tensor | None] = (None, None),
) -> tuple[Tensor, Tensor]:
    """(out, lse): out (total_q, heads, head_dim), the caller's if it is given; lse (heads, total_q) fp32.

    most_queries  of a sequence; of a tensor, which is not read, nothing is known. Where the rows of q are just so many
                  for each, kernels of decoding may run. Of one query each, row b is then taken to be sequence b's, as
                  engines lay them out, with sequences that have none, which pad a batch, behind the others; of more,
                  cu_seqlens_q says whose each row is.
    most_keys     likewise. Pages of 8-bit numbers are read by kernels of decoding alone. For more queries each
                  sequence's keys are widened to 16 bits, up to most_keys (if one has more, its rows are NaN) or all
                  that its pages hold; where one head's are too much for that, queries are taken group by group, which
                  takes 2 to 12 times as long (H200).
    num_splits    with a number each sequence's own queries decide which kernels it has, and how many keys a row of the
                  table can hold the parts: no row's bits depend on the batch. Batches of few and of many queries are
                  then launched twice.
    scales        of k and v, where they are of 8 bits: (batch, heads_kv) fp32, of any strides.
    """
    most, num_splits = longest_known("max_seqlen_q", most_queries) or 0, parts_of(num_splits)
    most_keys = longest_known("max_seqlen_k", most_keys)
    validate_splits(num_splits)
    named = zip(("k_descale", "v_descale"), scales, strict=True)
    refuse_non_tensors(**{name: x for name, x in named if x is not None})
    if out is not None:
        validate_out(out, given.q, given.v)
    place = out if out is not None and out.is_contiguous() and _is_aligned(out) else None
    decodes = _fits_decoding(given)
    if num_splits and decodes:
        found, lse = _in_fixed_parts(given, options, expression, most, num_splits, scales, place)
    elif most and decodes and _is_short(given, most, most_keys, expression):
        groups = _Groups(given, most, one_each=True) if most > 1 else None
        found, lse = _decoded(given, options, expression, most, groups, num_splits, scales, place)
    elif given.k.dtype in CACHE_DTYPES:
        batch = _validate_rows(given, scales)
        assert given.seqused_k is not None
        given = given._replace(seqused_k=given.seqused_k.clamp(0, given.capacity))  # behind it there is room alone
        if _is_empty(given, batch):
            found, lse = _nothing(given, place)
        elif heads := _wide_heads(given, rows := _wide_rows(given, most_keys)):
            found, lse = _over_widened(given, options, expression, heads, rows, scales, place)
        else:
            _validate_groups(given, options, expression)
            most = max(SHORT_ROWS // _group(given), 1)
            found, lse = _decoded(given, options, expression, most, _Groups(given, most), num_splits, scales, place)
    else:
        q, bounds, into = given.q, given.cu_seqlens_q, None
        if place is not None and q.dim() == 3:
            into = (place, place.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32))
        are_even = q.dim() == 3 and bounds is not None and q.shape[0] == most * (bounds.numel() - 1)
        queries: Queries = "any" if num_splits else "even" if are_even else "uneven"
        found, lse = over_pages(given, options, expression, None if num_splits else most_keys, into, queries)
    return (found if out is None or place is not None else out.copy_(found)), lse


def refuse(**named: Any) -> None:
    """Raise UnsupportedProblem, by name, for what is not built: each with whether it is asked for, and the nearest."""
    for name, (asked, nearest) in named.items():
        if asked:
            raise UnsupportedProblem(f"{name} is not built; nearest: {nearest}")


def _is_aligned(out: Tensor) -> bool:
    """Whether kernels may write to it; where others look at the call, operators make results of their own."""
    return not out.is_cuda or not is_direct(out, out, out) or out.data_ptr() & 15 == 0


def _fits_decoding(given: Paged) -> bool:
    """Whether kernels of decoding have these sizes, of which those of prefill have more, and say what is wrong."""
    q, k, v = given[:3]
    bounds = given.cu_seqlens_q
    if q.dim() != 3 or k.dim() != 4 or v.shape != k.shape or bounds is None or given.seqused_k is None:
        return False
    return bool(bounds.dtype == torch.int32 and bounds.dim() == 1 and bounds.device == q.device and bounds.numel())


def _group(given: Paged) -> int:
    """Heads of q for each of k."""
    heads, heads_kv = given.q.shape[1], given.k.shape[2]
    return max(int(heads) // max(int(heads_kv), 1), 1)


def _is_short(given: Paged, most: int, most_keys: int | None, expression: Modified) -> bool:
    """Whether kernels of decoding are to read the pages, as suits the device."""
    q, k = given[:2]
    batch = len(given.cu_seqlens_q) - 1  # type: ignore[arg-type]
    is_short = most * _group(given) <= SHORT_ROWS
    if q.is_cuda and k.dtype not in CACHE_DTYPES and k.shape[2]:
        # Several queries of each are laid out anew for kernels of decoding, by a dozen kernels of torch; prefill's take
        # them as they are.
        sizes = (q.get_device(), batch, most, q.shape[1], k.shape[2], q.shape[2])
        keys = _most_keys(given, most_keys) if most > 1 else None
        is_plain = given.s_aux is None and not expression[0]
        is_short = calls_for_decoding(*sizes, may_pack=is_plain, laid_out_keys=keys)
    return bool(is_short and q.shape[0] == most * batch)


def _is_empty(given: Paged, batch: int) -> bool:
    return 0 in (batch, given.q.shape[0], given.q.shape[1], given.k.shape[0])


def _nothing(given: Paged, out: Tensor | None) -> tuple[Tensor, Tensor]:
    """What no key gives."""
    q = given.q
    lse = q.new_full((q.shape[1], q.shape[0]), -math.inf, dtype=torch.float32)
    return (q.new_zeros(q.shape) if out is None else out.zero_()), lse


def _validate_rows(given: Paged, scales: tuple[Tensor | None, Tensor | None]) -> int:
    """The number of sequences, before their rows are laid out or their keys widened. Raises InvalidInput."""
    q, k = given.q, given.k
    if q.dim() != 3 or k.dim() != 4 or given.cu_seqlens_q is None or given.seqused_k is None:
        raise InvalidInput(
            f"q is {describe(q)}, k {describe(k)}; pages (pages, page_size, heads_kv, head_dim) take q (total_q, "
            "heads, head_dim), with cu_seqlens_q and the number of each sequence's keys"
        )
    if 0 in k.shape[1:]:
        raise InvalidInput(f"k_cache has shape {tuple(k.shape)}: pages of no rows, heads or columns")
    batch = validate_lengths(q, given.lengths, {"q": (q, given.cu_seqlens_q)})
    validate_heads(q.shape[1], k.shape[2])
    validate_table(given.block_table, q, batch)
    has_scales = k.dtype in CACHE_DTYPES
    for name, x in zip(("k_descale", "v_descale"), scales, strict=True):
        if has_scales and x is not None and (tuple(x.shape) != (batch, k.shape[2]) or x.device != q.device):
            raise InvalidInput(f"{name} is {describe(x)}; it must be {(batch, k.shape[2])} on {q.device}")
    return batch


def _most_keys(given: Paged, most_keys: int | None) -> int:
    """Of a sequence, at least 1 and at most what its pages hold, which it is where nothing is said."""
    return given.capacity if most_keys is None else min(max(most_keys, 1), given.capacity)


def _wide_rows(given: Paged, most_keys: int | None) -> int:
    """Room for the keys of each sequence, of few kinds: at most a fifth more than whole tiles."""
    most = _most_keys(given, most_keys)
    step = _WIDE_ROWS << max((most // _WIDE_ROWS).bit_length() - 3, 0)
    return -(-most // step) * step


def _wide_heads(given: Paged, rows: int) -> int:
    """How many heads of K and V are widened at once; 0: one would take too much, and queries are taken in groups."""
    (batch, *_), (heads_kv, head_dim) = given.seqused_k.shape, given.k.shape[2:]  # type: ignore[union-attr]
    of_head: int = 2 * given.q.element_size() * batch * rows * head_dim
    return min(WIDE_BYTES // of_head, int(heads_kv))


def _validate_groups(given: Paged, options: Options, expression: Modified, in_parts: bool = False) -> None:
    """Raise unless the queries of a sequence may be in groups, each as if it were the last, as fixed parts need it."""
    sees_behind = options.mask != "full" and not options.causal and options.window_right != 0
    if not sees_behind and not expression[1]:
        return
    what = "a window or chunks that are not causal" if sees_behind else "alibi_slopes"
    keys = f"over pages of {given.k.dtype} keys are widened to 16 bits for {what}, and "
    if in_parts:
        raise UnsupportedProblem(f"{keys}not where num_splits fixes their parts; nearest: num_splits=0")
    raise UnsupportedProblem(
        f"{keys}one head's would take more than {WIDE_BYTES >> 20} MiB; nearest: fewer sequences a call, a "
        "max_seqlen_k nearer to what they have, or a causal mask without slopes"
    )


def _in_fixed_parts(
    given: Paged,
    options: Options,
    expression: Modified,
    most: int,
    num_splits: int,
    scales: tuple[Tensor | None, Tensor | None],
    out: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Each sequence by the kernels that its own queries are for, whatever the others': a row's bits depend on nothing
    of the batch. Those of no more rows than one tile has are decoded; more are not, or over 8-bit pages in groups."""
    batch, group = _validate_rows(given, scales), _group(given)
    if _is_empty(given, batch):
        return _nothing(given, out)
    few = max((_ROWS_OF_A_TILE if group <= _ROWS_OF_A_TILE else SHORT_ROWS) // group, 1)
    if options.window_left >= 0:
        # Slots before a sequence's first query may begin a window's keys a part earlier. Nobody sees that part's keys,
        # and it changes nothing where all parts are put together at once.
        num_splits = min(num_splits, _PARTS_AT_ONCE)
    if most == 1 and given.q.shape[0] == batch:
        return _decoded(given, options, expression, 1, None, num_splits, scales, out)
    counts, keys = given.cu_seqlens_q.diff(), given.seqused_k  # type: ignore[union-attr]
    assert keys is not None
    groups = _Groups(given, few, one_each=True)
    if 0 < most <= few:
        return _decoded(given, options, expression, few, groups, num_splits, scales, out)
    is_short = counts <= few
    of_short = given._replace(seqused_k=keys.where(is_short, 0))
    short, short_lse = _decoded(of_short, options, expression, few, groups, num_splits, scales, None)
    if given.k.dtype in CACHE_DTYPES:
        _validate_groups(given, options, expression, in_parts=True)
        size = max(SHORT_ROWS // group, 1)
        of_long = given._replace(seqused_k=keys.clamp(0, given.capacity).where(~is_short, 0))
        long, long_lse = _decoded(of_long, options, expression, size, _Groups(of_long, size), num_splits, scales, None)
    else:
        of_long = given._replace(seqused_q=counts.where(~is_short, 0))
        long, long_lse = over_pages(of_long, options, expression, queries="any")
    is_of_short = is_short[groups.of_row]
    found = short.where(is_of_short[:, None, None], long)
    return (found if out is None else out.copy_(found)), short_lse.where(is_of_short, long_lse)


def _over_widened(
    given: Paged,
    options: Options,
    expression: Modified,
    heads: int,
    rows: int,
    scales: tuple[Tensor | None, Tensor | None],
    out: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """By kernels of prefill: so many heads of K and V after the others, of which each sequence's keys are a page."""
    q, k, v, used = given.q, given.k, given.v, given.seqused_k
    assert used is not None
    (found, tensors), group, heads_kv = expression, q.shape[1] // k.shape[2], k.shape[2]
    pages = torch.arange(used.shape[0], dtype=torch.int32, device=q.device)[:, None]
    results = []
    for first in range(0, heads_kv, heads):
        of_kv, of_q = slice(first, first + heads), slice(first * group, (first + heads) * group)
        own_scales = (None if x is None else x[:, of_kv] for x in scales)
        wide = widen(Narrow(k[:, :, of_kv], v[:, :, of_kv], used, given.block_table, *own_scales), rows, q.dtype)
        part = given._replace(q=q[:, of_q], k=wide[0], v=wide[1], block_table=pages)
        if given.s_aux is not None:
            part = part._replace(s_aux=given.s_aux[of_q])
        own = tuple(x[..., of_q].contiguous() for x in tensors)  # slopes
        into = None
        if out is not None and heads == heads_kv:
            into = (out, out.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32))
        results.append(over_pages(part, options, (found, own), rows, into))
    if len(results) == 1:
        return results[0]
    joined = torch.cat([x for x, _ in results], dim=1)
    return (joined if out is None else out.copy_(joined)), torch.cat([lse for _, lse in results])


def _decoded(
    given: Paged,
    options: Options,
    expression: Modified,
    most: int,
    groups: _Groups | None,
    num_splits: int,
    scales: tuple[Tensor | None, Tensor | None],
    out: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """By kernels of decoding, in groups of `most` queries of a sequence; without groups sequence b has row b alone."""
    found, tensors = expression
    q, keys, sequence = given.q, given.seqused_k, None
    assert keys is not None
    if groups:
        q, sequence = q[groups.of_slots], groups.sequence
    else:
        q = q.unflatten(0, (-1, most))
    if groups and sequence is not None:
        keys = keys[sequence] if options.mask == "full" else (keys[sequence] - groups.behind).clamp_(min=0).int()
        scales = tuple(None if x is None else x[sequence] for x in scales)  # type: ignore[assignment]
    cached = Cached(
        *(q, given.k, given.v),
        cache_seqlens=keys,
        cache_batch_idx=None if sequence is None else sequence.int(),
        block_table=given.block_table,
        s_aux=given.s_aux,
        k_descale=scales[0],
        v_descale=scales[1],
        tensors=tensors,
    )
    into = None if out is None or groups else out.view(q.shape)
    try:
        o, lse = run_cached(cached, options._replace(varlen=False, expression=found), True, num_splits, into)
    except InvalidInput:
        _validate_rows(given, scales)  # says it by the names that callers have
        raise
    o, lse = o.flatten(0, 1), lse.transpose(0, 1).flatten(1)
    if groups:
        o = o[groups.slots].masked_fill_(groups.unused[:, None, None], 0)
        lse = lse[:, groups.slots].masked_fill_(groups.unused, -math.inf)
        return (o if out is None else out.copy_(o)), lse
    return (o if out is None else out), lse


class _Groups:
    """The rows of a ragged batch in groups of `size` slots, for queries of one sequence each. Every sequence has one at
    least; its last ends with its last query, any other where the next one begins.

    of_slots  (groups, size): the row in each slot; of a slot that no query has, any row.
    slots     (rows,): the slot of each row.
    of_row    (rows,): the sequence of each row; of one that no sequence has, any.
    unused    (rows,): whether no sequence has it.
    sequence  (groups,): whose each is; None: group b is all that sequence b has.
    behind    (groups,): how many queries the sequence has behind the group's.
    """

    sequence: Tensor | None = None
    behind: Tensor | int = 0

    def __init__(self, given: Paged, size: int, *, one_each: bool = False) -> None:
        """one_each  whether no sequence has more than `size` queries, as is known beforehand: each has one group."""
        assert given.cu_seqlens_q is not None
        firsts, ends = given.cu_seqlens_q[:-1].long(), given.cu_seqlens_q[1:].long()
        rows, batch, device = given.q.shape[0], len(ends), ends.device
        group_ends, last = ends, torch.arange(batch, device=device)  # the number of each sequence's last group
        if not one_each:
            last = ((ends - firsts + size - 1) // size).clamp_(min=1).cumsum(0) - 1
            number = torch.arange(rows // size + batch, device=device)
            self.sequence = torch.searchsorted(last, number).clamp_(max=batch - 1)
            self.behind = (last[self.sequence] - number).clamp_(min=0) * size
            group_ends = ends[self.sequence] - self.behind
        slots = torch.arange(size, device=device)
        self.of_slots = (group_ends[:, None] - size + slots).clamp_(0, rows - 1)
        row = torch.arange(rows, device=device)
        self.of_row = torch.searchsorted(ends, row, right=True).clamp_(max=batch - 1)
        behind = ends[self.of_row] - 1 - row
        self.slots = ((last[self.of_row] + 1) * size - 1 - behind).clamp_(0, self.of_slots.numel() - 1)
        self.unused = row >= ends[-1:]


def validate_out(out: Tensor, q: Tensor, v: Tensor) -> None:
    """Raise InvalidInput for a buffer that the result does not fit."""
    wanted = (*q.shape[:-1], v.shape[-1])
    if not isinstance(out, Tensor) or out.shape != wanted or out.dtype != q.dtype or out.device != q.device:
        raise InvalidInput(f"out is {describe(out)}; it must be {wanted} {q.dtype} on {q.device}")
