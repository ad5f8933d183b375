"""Where the sequences of a padded or packed batch lie, as `flash_attn_varlen_func` takes them.

A batch is (batch, seqlen, ...). Sequences whose rows follow each other, padding to the left or the right of them, are
taken where they are: cu_seqlens say where each begins, seqused how long it is. Only where a mask has holes are rows
gathered.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from fa2gen.padding import index_first_axis, pad_input

__all__ = ["Plan", "Rows", "begins_of", "packed_plan", "padded_plan"]
_ATTRIBUTE = "fa2gen_rows"  # of a tensor
_NEVER_WRITTEN = -1  # in place of a version, of tensors that are made here


class Plan(NamedTuple):
    """The sequences of queries and keys.

    lengths   cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k; without cu_seqlens_q every query of the batch counts.
    spans     (batch,) where the keys of each sequence begin among its columns, and where they end, if they are joined.
    gathered  which rows of the flattened batch to gather first, (total_q,) and (total_k,); None: all, where they are.
    doubt     (batch,) NaN where a sequence is none of these, else 0; added to its results.
    """

    lengths: tuple[Tensor | None, Tensor, Tensor | None, Tensor | None]
    spans: tuple[Tensor, Tensor] | None = None
    gathered: tuple[Tensor | None, Tensor] | None = None
    doubt: Tensor | None = None

    @property
    def packed(self) -> bool:
        """Whether sequences follow each other, with nothing between them."""
        return self.spans is None and self.gathered is None

    def rows(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Those of q, k and v (batch, seqlen, heads, head_dim), as `flash_attn_varlen_func` takes them."""
        of_query, of_key = self.gathered or (None, None)
        if self.lengths[0] is not None:
            q = q.flatten(0, 1)
        k, v = k.flatten(0, 1), v.flatten(0, 1)
        if of_query is not None:
            q = index_first_axis(q, of_query)
        if of_key is not None:
            k, v = index_first_axis(k, of_key), index_first_axis(v, of_key)
        return q, k, v

    def batch(self, out: Tensor, batch: int, seqlen: int) -> Tensor:
        """A result for such rows as (batch, seqlen, heads, head_dim), with 0 where queries do not count."""
        if self.gathered is not None and self.gathered[0] is not None:
            out = pad_input(out, self.gathered[0], batch, seqlen)
        return self.checked(out.reshape(batch, seqlen, *out.shape[-2:]))

    def checked(self, out: Tensor) -> Tensor:
        """The result, (batch, ...), where there is no doubt."""
        return out if self.doubt is None else out + self.doubt.to(out.dtype)[:, None, None, None]


@dataclass
class Rows:
    """What is known of a mask (batch, keys). It is worked out once, which waits for the device, and kept at the mask.

    keys    of the longest sequence, from the mask's first column on.
    even    whether all sequences have just those.
    whole   whether those are all columns.
    joined  whether the keys of each sequence follow each other.
    causal  what the mask was made for; None: not known.
    packed  of a packed batch, whose keys all count.
    """

    keys: int
    even: bool = True
    whole: bool = True
    joined: bool = True
    causal: bool | None = None
    packed: Plan | None = None
    _padded: dict[tuple[int, bool], Plan] = field(default_factory=dict)

    @classmethod
    def of(cls, mask: Tensor) -> Rows:
        """Of a mask of the keys that count."""
        return _kept_at(mask, cls._of_padded)

    @classmethod
    def _of_padded(cls, mask: Tensor) -> Rows:
        columns = mask.shape[1]
        if mask.numel() == 0:
            return cls(columns)
        first, end, holes = _spans(mask)
        used = mask.sum(dim=1)
        keys, latest, least, most_holes = torch.stack([end.max(), first.max(), used.min(), holes.max()]).tolist()
        return cls(keys, even=latest == 0 and least == keys, whole=keys == columns, joined=most_holes == 0)

    @classmethod
    def of_positions(cls, position_ids: Tensor, batch: int) -> Rows:
        """Of a batch whose rows (batch or 1, seqlen) have these places, and that transformers, for a mask of padding or
        a cache, takes for one sequence each: gaps are no begins.
        """
        return _kept_at(position_ids, lambda given: cls.of_packed(begins_of(given, gaps=False).expand(batch, -1)))

    @classmethod
    def of_packed(cls, begins: Tensor) -> Rows:
        """Of a batch (batch, seqlen), where these rows begin a sequence, and the first of each."""
        plan = packed_plan(begins)
        several = plan.lengths[1].shape[0] > begins.shape[0] + 1
        return cls(begins.shape[1], packed=plan if several else None)

    def told(self, mask: Tensor, causal: bool, seqlen_k: int, always: bool = False) -> Tensor | None:
        """The mask, which tells all this and what it was made for; None, unless `always`, where it hides none of so
        many keys.
        """
        if self.even and self.keys == seqlen_k and self.packed is None and not always:
            return None
        self.causal = causal
        setattr(mask, _ATTRIBUTE, (_NEVER_WRITTEN, self))
        return mask

    def plan(self, mask: Tensor, seqlen_q: int, every_query: bool) -> Plan | None:
        """For so many queries, the last; None: all sequences have the first `keys` keys, and each query counts."""
        if self.packed is not None:
            return self.packed
        if self.even and (every_query or self.whole):
            return None
        if (plan := self._padded.get((seqlen_q, every_query))) is None:
            make = padded_plan if self.joined else _gathering_plan
            plan = self._padded[seqlen_q, every_query] = make(mask, seqlen_q, every_query)
        return plan


def _kept_at(x: Tensor, make: Callable[[Tensor], Rows]) -> Rows:
    """What is known of a tensor: remembered, as long as it is not written to, or made now."""
    version = None if x.is_inference() else x._version  # inference tensors have none: they may have been written to
    known: tuple[int, Rows] | None = getattr(x, _ATTRIBUTE, None)
    if known is not None and known[0] in (_NEVER_WRITTEN, version):
        return known[1]
    rows = make(x)
    if version is not None:
        setattr(x, _ATTRIBUTE, (version, rows))
    return rows


def begins_of(position_ids: Tensor, gaps: bool) -> Tensor:
    """Where rows (batch, seqlen) of these places begin a sequence, the first of each left out: at 0, and where they go
    back; or, with `gaps`, wherever one does not follow the last, as in transformers' masks.
    """
    steps = position_ids.diff(dim=1)
    return pad(steps != 1 if gaps else (steps < 0) | (position_ids[:, 1:] == 0), (1, 0))


def packed_plan(begins: Tensor) -> Plan:
    """Of sequences in a batch (batch, seqlen), each row of which begins one, where these rows begin one too."""
    first = torch.arange(begins.shape[1], device=begins.device) == 0
    starts = torch.nonzero((begins | first).flatten()).flatten()
    bounds = pad(starts, (0, 1), value=begins.numel()).int()
    return Plan((bounds, bounds, None, None))


def padded_plan(mask: Tensor, seqlen_q: int, every_query: bool, doubt: bool = False) -> Plan:
    """Of sequences whose rows follow each other; nothing waits for the device. With `doubt` they may not."""
    first, end, holes = _spans(mask)
    of_key, used_k = _bounds(mask)
    of_query, used_q = (None, None) if every_query else _bounds(mask[:, mask.shape[1] - seqlen_q :])
    nan = torch.where(holes > 0, torch.nan, 0.0) if doubt else None
    return Plan((of_query, of_key, used_q, used_k), (first.int(), end.int()), doubt=nan)


def _gathering_plan(mask: Tensor, seqlen_q: int, every_query: bool) -> Plan:
    """Of any sequences; waits for the device."""
    of_key, bounds_k = _places(mask)
    of_query, bounds_q = (None, None) if every_query else _places(mask[:, mask.shape[1] - seqlen_q :])
    return Plan((bounds_q, bounds_k, None, None), gathered=(of_query, of_key))


def _places(mask: Tensor) -> tuple[Tensor, Tensor]:
    """(places in the flattened batch, cu_seqlens) of the rows that count."""
    bounds = pad(mask.sum(dim=1).cumsum(0), (1, 0)).int()
    return torch.nonzero(mask.flatten()).flatten(), bounds


def _bounds(mask: Tensor) -> tuple[Tensor, Tensor]:
    """(cu_seqlens, seqused) of rows that follow each other."""
    batch, seqlen = mask.shape
    starts = torch.arange(batch, device=mask.device) * seqlen + _spans(mask)[0]
    return pad(starts, (0, 1), value=batch * seqlen).int(), mask.sum(dim=1, dtype=torch.int32)


def _spans(mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of each row of a mask (batch, keys): its first key, the end of its last, and how many between do not count."""
    columns = torch.arange(mask.shape[1], device=mask.device)
    end = torch.where(mask, columns + 1, 0).amax(dim=1)
    first = torch.minimum(torch.where(mask, columns, mask.shape[1]).amin(dim=1), end)
    return first, end, end - first - mask.sum(dim=1)
