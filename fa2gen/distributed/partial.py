"""One call of a split: its results, its gradients, and what several of them make together.

Tensors are those of one process: q (batch, rows, heads, head_dim), lse (batch, heads, rows); packed documents are a
batch of one. Nothing here is recorded by autograd.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from fa2gen.distributed.plan import Call
from fa2gen.ops.autograd import by_operator
from fa2gen.ops.operator import run, run_ragged
from fa2gen.options import Options

__all__ = ["Sums", "forward_of", "gradients_of", "with_sinks"]


def forward_of(call: Call, q: Tensor, k: Tensor, v: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """(out, lse) of the call's queries, by its keys alone."""
    q, k, v = (x[:, first:end] for x, (first, end) in ((q, call.queries), (k, call.keys), (v, call.keys)))
    options = _options_of(call, options)
    if not options.varlen:
        return run(q, k, v, options)
    bounds = _bounds(call.lengths, q.device)
    out, lse = run_ragged(q[0], k[0], v[0], (*bounds, None, None), options, _longest(call))
    return out[None], lse[None]


def gradients_of(
    call: Call,
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dlse: Tensor | None,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) of the call's queries and keys, partial ones in fp32; out and lse are those of all keys, dlse the
    gradient of lse."""
    (q0, q1), (k0, k1) = call.queries, call.keys
    dout, q, out = (x[:, q0:q1] for x in (dout, q, out))
    k, v = k[:, k0:k1], v[:, k0:k1]
    lse, dlse = (x if x is None else x[..., q0:q1].contiguous() for x in (lse, dlse))
    tensors = (dout, q, k, v, out, lse, dlse)
    options = _options_of(call, options)
    if not options.varlen:
        return by_operator(*tensors, options)
    packed = (x if x is None else x[0] for x in tensors)
    dq, dk, dv = by_operator(*packed, *_bounds(call.lengths, q.device), None, None, options)
    return dq[None], dk[None], dv[None]


def with_sinks(out: Tensor, lse: Tensor, s_aux: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(out, lse) in which each query also sees its head's sink, if there are any; rounded to dtype."""
    if s_aux is None:
        return out.to(dtype), lse
    sink = s_aux.float()[:, None]
    share = torch.sigmoid(lse - sink).transpose(1, 2).unsqueeze(-1)
    # Of a row that sees no key, which is padding here, also the sum stays empty.
    return (out * share).to(dtype), torch.where(torch.isneginf(lse), lse, torch.logaddexp(lse, sink))


class Sums:
    """(out, lse) of several calls, which may have queries in common: merged in fp32 by their LSE.

    out = sum of exp(lse_i - lse) out_i, with lse = log of the sum of exp(lse_i). A query without a call has out 0 and
    lse -inf.
    """

    def __init__(self, q: Tensor, v: Tensor) -> None:
        self._like = q
        self._head_dim = v.shape[3]
        self._found: tuple[Tensor, Tensor] | None = None

    def add(self, rows: tuple[int, int], out: Tensor, lse: Tensor) -> None:
        """The results of a call of queries `rows`; out is fp32, but of the only call, where that has all rows."""
        first, end = rows
        if self._found is None and (first, end) == (0, self._like.shape[1]):
            self._found = out, lse
            return
        all_out, all_lse = self._started()
        of_rows, lse_of_rows = all_out[:, first:end], all_lse[..., first:end]
        # How much of the sum is new; two rows that saw no key give -inf - -inf.
        share = torch.sigmoid(lse - lse_of_rows).nan_to_num_(nan=0.0)
        of_rows.lerp_(out, share.transpose(1, 2).unsqueeze(-1))
        lse_of_rows.copy_(torch.logaddexp(lse_of_rows, lse))

    def result(self) -> tuple[Tensor, Tensor]:
        """(out, lse), as they were added up."""
        return self._found or self._started()

    def _started(self) -> tuple[Tensor, Tensor]:
        """The sums: what was found first, else nothing."""
        if self._found is None:
            batch, rows, heads, _ = self._like.shape
            shape = (batch, rows, heads, self._head_dim)
            lse = self._like.new_full((batch, heads, rows), float("-inf"), dtype=torch.float32)
            self._found = self._like.new_zeros(shape, dtype=torch.float32), lse
        return self._found


def _options_of(call: Call, options: Options) -> Options:
    left, right = call.window
    return options._replace(causal=False, window_left=left, window_right=right, varlen=not call.is_one)


def _longest(call: Call) -> int:
    return max((keys for _, keys in call.lengths), default=0)


@lru_cache(maxsize=256)
def _bounds(lengths: tuple[tuple[int, int], ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """(cu_seqlens_q, cu_seqlens_k) on the device; kept, so that each layer has them."""
    with torch.inference_mode(False):
        rows = torch.tensor([(0, 0), *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        of_queries, of_keys = (side.contiguous().to(device) for side in rows.unbind(1))
        return of_queries, of_keys
