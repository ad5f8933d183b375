"""What the kernels are measured against: attention in plain PyTorch, Algorithms 1 and 2, and the tolerance rule.

All functions take q (B, Sq, H, D), k (B, Sk, Hk, D) and v (B, Sk, Hk, Dv) with H a multiple of Hk (query head h reads
key head h // (H / Hk)), on any device and in any floating dtype, and return out (B, Sq, H, Dv) in q's dtype and lse
(B, H, Sq), the natural logarithm of the softmax sums, in fp32 (fp64 for fp64 inputs). Their further keywords are the
fields of `fa2gen.options.Options`: softmax_scale, causal and the others, which say what a query sees. A row that sees
no key has out 0 and lse -inf.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from fa2gen.expression import evaluate, parse
from fa2gen.expression.evaluate import evaluate_tree
from fa2gen.features import key_range
from fa2gen.features.dropout import DROP_ROTATIONS, DROP_STEPS, LAST_ROTATION, keep_steps
from fa2gen.features.expression import named_values
from fa2gen.options import Expression, Options
from fa2gen.spec import anonymous, names_of, program_of, text_of

__all__ = [
    "GradientVerdict",
    "Place",
    "Verdict",
    "attention_backward_ragged",
    "attention_backward_tiled",
    "attention_ragged",
    "attention_reference",
    "attention_tiled",
    "check",
    "check_gradients",
    "check_input_gradients",
    "check_sink_gradient",
    "dropout_keep",
    "dropout_mask",
    "ragged_rows",
    "sink_gradient",
]


class Place(NamedTuple):
    """What the expressions of a call look up beside positions: tensors, in the order of its inputs; and the number of
    the batch's first entry, where a sequence is looked at alone. And what dropout draws from, see `dropout_keep`.

    gradients  to which those of the tensors that learn are added, shaped as they, in their order.
    """

    tensors: Sequence[Tensor] = ()
    b: int = 0
    rng_state: Tensor | None = None
    gradients: Sequence[Tensor] = ()


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    upcast: bool = True,
    reorder_ops: bool = False,
    s_aux: Tensor | None = None,
    place: Place | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Attention as it is defined, with the whole score matrix in memory.

    upcast       compute in fp32; otherwise in the dtype of the inputs.
    reorder_ops  multiply K rather than Q by the scale: the same mathematics, rounded elsewhere.
    s_aux        (H,): the logit of each head's sink.
    place        what an expression looks up, and dropout.

    Returns (out, lse); see the module for shapes and options.
    """
    dtype, said = q.dtype, Options(**options)
    scale = said.scale(q.shape[-1])
    if upcast:
        q, k, v = (_at_least_fp32(x) for x in (q, k, v))
    if reorder_ops:
        k = k * scale
    else:
        q = q * scale
    scores = torch.einsum("bqngd,bknd->bngqk", _group_heads(q, k), k)  # n key heads, g query heads of each
    if said.expression:
        scores = _modified(said, scores, place, q.shape[1], k.shape[1])
    if _hides(said):
        scores = scores.masked_fill(_hidden(said, q.shape[1], k.shape[1], scores, place=place), float("-inf"))
    lse, probs = _softmax(scores, s_aux)
    probs = _dropped(probs, said, place, (0, q.shape[1]), (0, k.shape[1]))
    out = torch.einsum("bngqk,bknd->bqngd", probs.to(v.dtype), v)
    return out.flatten(2, 3).to(_result_dtype(dtype, said.partial)), lse.flatten(1, 2)


def _softmax(scores: Tensor, s_aux: Tensor | None) -> tuple[Tensor, Tensor]:
    """(lse, probabilities) of scores (B, Hk, H / Hk, Sq, Sk), with sinks as of one more column, which is dropped.

    A row of -inf alone has lse -inf and no probabilities; autograd would make NaN of it.
    """
    if s_aux is not None:
        sinks = s_aux.to(scores.dtype).view(scores.shape[1], -1, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat([sinks, scores], dim=-1)
    nothing = torch.isneginf(scores).all(dim=-1)
    scores = scores.masked_fill(nothing.unsqueeze(-1), 0.0)
    lse = torch.logsumexp(_at_least_fp32(scores), dim=-1).masked_fill(nothing, float("-inf"))
    probs = torch.softmax(scores, dim=-1).masked_fill(nothing.unsqueeze(-1), 0.0)
    return lse, probs if s_aux is None else probs[..., 1:]


def dropout_keep(
    rng_state: Tensor,
    dropout_p: float,
    num_heads: int,
    rows: tuple[int, int],
    cols: tuple[int, int],
    sequences: tuple[int, int] = (0, 1),
) -> Tensor:
    """Which elements of P dropout keeps: (sequences, num_heads, rows, cols), True where one is kept.

    rng_state  128 random bits: (2,) int64, or (4,) int32.
    rows       first and past the last; cols and sequences likewise. A dense batch's sequences are its entries.

    What kernels compute, bit by bit: Philox4x32 with 7 rounds gives 4 binary digits to each of 32 elements, those of a
    unit of 16 queries and 64 keys that agree in the query modulo 8 and in key / 2 modulo 4. Behind them stand 8 digits
    that are sums of other elements' (fa2gen.features.dropout).
    """
    starts = [word & _WORD for word in rng_state.cpu().view(torch.int32).tolist()]
    (i0, i1), (j0, j1) = rows, cols
    row_units, key_units = (range(i0 // 16, -(-i1 // 16)), range(j0 // 64, -(-j1 // 64)))
    of_row, of_key = (8 * row_units.start, 8 * row_units.stop), (4 * key_units.start, 4 * key_units.stop)
    axes = [
        torch.arange(*bounds, device=rng_state.device) + start & _WORD
        for bounds, start in zip(((0, num_heads), sequences, of_row, of_key), starts, strict=True)
    ]
    head, sequence, row, column = (x.transpose(0, 1) for x in torch.meshgrid(*axes, indexing="ij"))
    words = _philox([head, row, sequence, column])  # (sequences, num_heads, rows, keys) each
    once, again = ([_rotate_left(*x) for x in zip(words, turns, strict=True)] for turns in DROP_ROTATIONS)
    sums = [once[i] ^ again[(i + 1) % 4] ^ again[(i + 2) % 4] for i in range(4)]
    digits = [*(_rotate_left(x, LAST_ROTATION) for x in sums), *sums, *words]  # the last first
    places = torch.arange(32, device=rng_state.device)
    found = sum((x.unsqueeze(-1) >> places & 1) << i for i, x in enumerate(digits))
    # (..., 8 rows of each unit, 4 pairs of keys of each, key % 2, key / 8, row / 8)
    found = found.unflatten(-1, (2, 8, 2)).unflatten(2, (len(row_units), 8)).unflatten(4, (len(key_units), 4))
    found = found.permute(0, 1, 2, 8, 3, 4, 7, 5, 6).flatten(5, 8).flatten(2, 4)
    return found[:, :, i0 % 16 :, j0 % 64 :][:, :, : i1 - i0, : j1 - j0] >= DROP_STEPS - keep_steps(dropout_p)


def dropout_mask(
    rng_state: Tensor, dropout_p: float, batch: int, num_heads: int, seqlen_q: int, seqlen_k: int, dtype: torch.dtype
) -> Tensor:
    """`dropout_keep` of a whole call, (batch, num_heads, seqlen_q, seqlen_k): 1 where it is True, else -1."""
    keep = dropout_keep(rng_state, dropout_p, num_heads, (0, seqlen_q), (0, seqlen_k), (0, batch))
    return keep.to(dtype) * 2 - 1


_WORD = 0xFFFFFFFF


def _rotate_left(word: Tensor, bits: int) -> Tensor:
    return (word << bits | word >> (32 - bits)) & _WORD


def _philox(counter: list[Tensor], key: tuple[int, int] = (0, 0), rounds: int = 7) -> list[Tensor]:
    """Philox4x32 (Salmon et al., 2011) of four 32-bit numbers, in int64, where a product's lower 64 bits are right."""
    key_0, key_1 = key
    c0, c1, c2, c3 = counter
    for _ in range(rounds):
        first, second = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1 = (second >> 32 & _WORD) ^ c1 ^ key_0, second & _WORD
        c2, c3 = (first >> 32 & _WORD) ^ c3 ^ key_1, first & _WORD
        key_0, key_1 = key_0 + 0x9E3779B9 & _WORD, key_1 + 0xBB67AE85 & _WORD
    return [c0, c1, c2, c3]


def _dropped(p: Tensor, said: Options, place: Place | None, rows: tuple[int, int], cols: tuple[int, int]) -> Tensor:
    """Z * P / (1 - dropout_p) of P (B, Hk, H / Hk, rows, cols), or of dP; the same where there is no dropout."""
    if not said.dropout_p:
        return p
    assert place is not None and place.rng_state is not None, "dropout needs random bits"
    sequences = (place.b, place.b + p.shape[0])
    keep = dropout_keep(place.rng_state, said.dropout_p, p.shape[1] * p.shape[2], rows, cols, sequences)
    return (p * keep.view(p.shape)) / (1.0 - said.dropout_p)


def attention_tiled(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    tile_m: int = 128,
    tile_n: int = 128,
    s_aux: Tensor | None = None,
    place: Place | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Algorithm 1 of FlashAttention-2, in fp32 (fp64 for fp64 inputs), over all batches and heads at once.

    Queries are walked in tiles of `tile_m` rows, keys in blocks of `tile_n`; blocks above the diagonal are skipped. The
    running row maximum and row sum replace the score matrix, so that memory grows with Sq + Sk, not with Sq * Sk.
    s_aux and place are as in `attention_reference`.

    Returns (out, lse); see the module for shapes and options.
    """
    seqlen_q, seqlen_k = q.shape[1], k.shape[1]
    said = Options(**options)
    scale = said.scale(q.shape[-1])
    kf, vf = _at_least_fp32(k), _at_least_fp32(v)
    qf = _group_heads(_at_least_fp32(q), k) * scale
    out = qf.new_zeros((*qf.shape[:-1], v.shape[-1]))  # contiguous, whatever the strides of q
    lse = qf.new_full((*qf.shape[:1], *qf.shape[2:4], seqlen_q), float("-inf"))  # (B, Hk, H / Hk, Sq)

    for m0 in range(0, seqlen_q, tile_m):
        m1 = min(m0 + tile_m, seqlen_q)
        q_tile = qf[:, m0:m1]
        acc_o = q_tile.new_zeros(lse[..., m0:m1].shape + v.shape[-1:])
        row_max = lse.new_full(lse[..., m0:m1].shape, float("-inf"))
        row_sum = torch.zeros_like(row_max)
        first_key, last_key = key_range(said, seqlen_q, seqlen_k, m0)[0], key_range(said, seqlen_q, seqlen_k, m1 - 1)[1]
        for n0 in range(first_key // tile_n * tile_n, last_key, tile_n):
            n1 = min(n0 + tile_n, last_key)
            acc_s = torch.einsum("bqngd,bknd->bngqk", q_tile, kf[:, n0:n1])
            if said.expression:
                acc_s = _modified(said, acc_s, place, seqlen_q, seqlen_k, rows=(m0, m1), cols=(n0, n1))
            if _hides(said):
                hidden = _hidden(said, seqlen_q, seqlen_k, acc_s, rows=(m0, m1), cols=(n0, n1), place=place)
                acc_s = acc_s.masked_fill(hidden, float("-inf"))
            new_max = torch.maximum(row_max, acc_s.amax(dim=-1))
            # A row with no visible key so far keeps its maximum at -inf; -inf - -inf would be NaN.
            finite_max = new_max.masked_fill(torch.isneginf(new_max), 0.0)
            correction = torch.exp(row_max - finite_max)
            p = torch.exp(acc_s - finite_max.unsqueeze(-1))
            row_sum = row_sum * correction + p.sum(dim=-1)
            p = _dropped(p, said, place, (m0, m1), (n0, n1))
            acc_o = acc_o * correction.unsqueeze(-1) + torch.einsum("bngqk,bknd->bngqd", p, vf[:, n0:n1])
            row_max = new_max
        if s_aux is not None:  # one more key, of no value
            sink = _at_least_fp32(s_aux).to(row_max.dtype).view(*row_max.shape[1:3], 1)
            new_max = torch.maximum(row_max, sink)
            finite_max = new_max.masked_fill(torch.isneginf(new_max), 0.0)
            correction = torch.exp(row_max - finite_max)
            row_sum, row_max = row_sum * correction + torch.exp(sink - finite_max), new_max
            acc_o = acc_o * correction.unsqueeze(-1)
        # One rescale at the end; a row without keys has the sum 0 and stays 0.
        out[:, m0:m1] = (acc_o / row_sum.masked_fill(row_sum == 0, 1.0).unsqueeze(-1)).movedim(-2, 1)
        lse[..., m0:m1] = row_max + torch.log(row_sum)
    return out.flatten(2, 3).to(_result_dtype(q.dtype, said.partial)), lse.flatten(1, 2)


def attention_backward_tiled(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dlse: Tensor | None = None,
    *,
    tile_m: int = 128,
    tile_n: int = 128,
    place: Place | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Algorithm 2 of FlashAttention-2, in fp32 (fp64 for fp64 inputs), over all batches and heads at once.

    dout  gradient of out, shaped as it; out and lse are what the forward pass returned.
    dlse  gradient of lse, or None: lse was not used.

    Keys are walked in blocks of `tile_n`, and for each of them the tiles of `tile_m` queries that see it. Returns
    (dq, dk, dv), contiguous, in the dtypes of q, k and v; see the module for options. Gradients of an expression's
    tensors are added to those of `place`.
    """
    seqlen_q, seqlen_k = q.shape[1], k.shape[1]
    said = Options(**options)
    scale = said.scale(q.shape[-1])
    kf, vf = _at_least_fp32(k), _at_least_fp32(v)
    qf, dof, of = (_group_heads(_at_least_fp32(x), k) for x in (q, dout, out))  # (B, Sq, Hk, H / Hk, D or Dv)
    lsef = _at_least_fp32(lse).unflatten(1, qf.shape[2:4])  # (B, Hk, H / Hk, Sq)
    no_key = torch.isneginf(lsef)
    lsef = lsef.masked_fill(no_key, 0.0)  # all scores of such a row are hidden
    dpsum = (dof * of).sum(dim=-1).permute(0, 2, 3, 1)
    if dlse is not None:
        dpsum = dpsum - _at_least_fp32(dlse).unflatten(1, qf.shape[2:4])
    dpsum = dpsum.masked_fill(no_key, 0.0)
    dq = qf.new_zeros(qf.shape)
    dk, dv = kf.new_zeros(kf.shape), vf.new_zeros(vf.shape)

    for n0 in range(0, seqlen_k, tile_n):
        n1 = min(n0 + tile_n, seqlen_k)
        for m0 in range(0, seqlen_q, tile_m):
            m1 = min(m0 + tile_m, seqlen_q)
            if key_range(said, seqlen_q, seqlen_k, m1 - 1)[1] <= n0 or key_range(said, seqlen_q, seqlen_k, m0)[0] >= n1:
                continue  # none of these queries sees one of these keys
            q_tile, do_tile = qf[:, m0:m1], dof[:, m0:m1]
            acc_s = torch.einsum("bqngd,bknd->bngqk", q_tile, kf[:, n0:n1]) * scale
            products = acc_s
            if said.expression:
                acc_s = _modified(said, acc_s, place, seqlen_q, seqlen_k, rows=(m0, m1), cols=(n0, n1))
            if _hides(said):
                hidden = _hidden(said, seqlen_q, seqlen_k, acc_s, rows=(m0, m1), cols=(n0, n1), place=place)
                acc_s = acc_s.masked_fill(hidden, float("-inf"))
            p = torch.exp(acc_s - lsef[..., m0:m1].unsqueeze(-1))
            dp = torch.einsum("bqngd,bknd->bngqk", do_tile, vf[:, n0:n1])
            ds = p * (_dropped(dp, said, place, (m0, m1), (n0, n1)) - dpsum[..., m0:m1].unsqueeze(-1))
            p = _dropped(p, said, place, (m0, m1), (n0, n1))
            if said.expression:
                ds = _pulled_back(ds, said, products, place, seqlen_q, seqlen_k, (m0, m1), (n0, n1))
            dv[:, n0:n1] += torch.einsum("bngqk,bqngd->bknd", p, do_tile)
            dk[:, n0:n1] += torch.einsum("bngqk,bqngd->bknd", ds, q_tile) * scale
            dq[:, m0:m1] += torch.einsum("bngqk,bknd->bqngd", ds, kf[:, n0:n1]) * scale
    of_q, of_k, of_v = (_result_dtype(x.dtype, said.partial) for x in (q, k, v))
    return dq.flatten(2, 3).to(of_q), dk.to(of_k), dv.to(of_v)


def sink_gradient(dout: Tensor, out: Tensor, lse: Tensor, dlse: Tensor | None, s_aux: Tensor) -> Tensor:
    """Of s_aux (H,): -sum over rows of P_sink * (rowsum(dO * O) - dLSE), with P_sink = exp(s_aux - LSE).

    dout, out (B, Sq, H, D); lse, dlse (B, H, Sq). Rows with LSE -inf, which see nothing, are not counted.
    """
    lse, sinks = _at_least_fp32(lse), _at_least_fp32(s_aux).view(-1, 1)
    dpsum = (_at_least_fp32(dout) * _at_least_fp32(out)).sum(dim=-1).transpose(1, 2)
    if dlse is not None:
        dpsum = dpsum - dlse
    parts = torch.exp(sinks - lse) * dpsum
    return -parts.masked_fill(torch.isneginf(lse), 0.0).sum(dim=(0, 2)).to(s_aux.dtype)


def attention_ragged(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    seqused_q: Tensor | None,
    seqused_k: Tensor | None,
    tensors: Sequence[Tensor] = (),
    rng_state: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """`attention_tiled`, one sequence of a ragged batch at a time.

    q (total_q, H, D) with cu_seqlens_q (batch + 1,), else (batch, Sq, H, D); k and v likewise; seqused (batch,): so
    many rows of a sequence count. Rows that no sequence has are not read; there out is 0, lse -inf.

    Returns (out, lse): out like q, with v's head dim, lse (H, total_q). Lengths are read: of CUDA tensors the host
    waits for them.
    """
    packed_q, packed_k, packed_v = (_packed(x) for x in (q, k, v))
    out_dtype = _result_dtype(q.dtype, options.get("partial", False))
    out = packed_q.new_zeros((*packed_q.shape[:-1], v.shape[-1]), dtype=out_dtype)
    lse = packed_q.new_full((q.shape[-2], packed_q.shape[0]), float("-inf"), dtype=_at_least_fp32(q[:0]).dtype)
    for b, (q0, q1, k0, k1) in enumerate(ragged_rows(q, k, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k)):
        one = (x.unsqueeze(0) for x in (packed_q[q0:q1], packed_k[k0:k1], packed_v[k0:k1]))
        out[q0:q1], lse[:, q0:q1] = (x[0] for x in attention_tiled(*one, place=Place(tensors, b, rng_state), **options))
    return out.view((*q.shape[:-1], v.shape[-1])), lse


def attention_backward_ragged(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dlse: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    seqused_q: Tensor | None,
    seqused_k: Tensor | None,
    tensors: Sequence[Tensor] = (),
    rng_state: Tensor | None = None,
    gradients: Sequence[Tensor] = (),
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """`attention_backward_tiled`, one sequence of a ragged batch at a time; tensors as of `attention_ragged`, gradients
    as of `Place`.

    Returns (dq, dk, dv), contiguous; 0 where no sequence has the row.
    """
    of_query, of_key = [_packed(x) for x in (q, dout, out)], [_packed(x) for x in (k, v)]
    dtype = _result_dtype(q.dtype, options.get("partial", False))
    dq, dk, dv = (x.new_zeros(x.shape, dtype=dtype) for x in (of_query[0], *of_key))
    for b, (q0, q1, k0, k1) in enumerate(ragged_rows(q, k, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k)):
        one_q, one_dout, one_out = (x[None, q0:q1] for x in of_query)
        one_k, one_v = (x[None, k0:k1] for x in of_key)
        rows, drows = lse[None, :, q0:q1], None if dlse is None else dlse[None, :, q0:q1]
        place = Place(tensors, b, rng_state, gradients)
        found = attention_backward_tiled(one_dout, one_q, one_k, one_v, one_out, rows, drows, place=place, **options)
        dq[q0:q1], dk[k0:k1], dv[k0:k1] = (x[0] for x in found)
    return dq.view(q.shape), dk.view(k.shape), dv.view(v.shape)


def ragged_rows(
    q: Tensor,
    k: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    seqused_q: Tensor | None,
    seqused_k: Tensor | None,
) -> list[tuple[int, int, int, int]]:
    """(first query, past the last, first key, past the last) of each sequence of a ragged batch, as kernels see them:
    within the tensors, whatever the lengths say."""
    of_each = [_rows_of_sequences(*side) for side in ((q, cu_seqlens_q, seqused_q), (k, cu_seqlens_k, seqused_k))]
    return [(*of_query, *of_key) for of_query, of_key in zip(*of_each, strict=True)]


def _rows_of_sequences(x: Tensor, bounds: Tensor | None, used: Tensor | None) -> list[tuple[int, int]]:
    total = _packed(x).shape[0]
    if bounds is None:
        starts = [i * x.shape[1] for i in range(x.shape[0] + 1)]
    else:
        starts = [min(max(start, 0), total) for start in bounds.tolist()]
    ends = [max(start, end) for start, end in itertools.pairwise(starts)]
    if used is not None:
        ends = [min(end, start + max(n, 0)) for start, end, n in zip(starts, ends, used.tolist(), strict=False)]
    return list(zip(starts, ends, strict=False))


def _packed(x: Tensor) -> Tensor:
    """(total, heads, head_dim), of sequences of equal lengths too."""
    return x if x.dim() == 3 else x.flatten(0, 1)


@dataclass(frozen=True)
class Verdict:
    """How far a result is from the truth, beside what is allowed (all absolute; NaN where the result holds NaN)."""

    max_error: float
    max_allowed: float
    mean_error: float
    mean_allowed: float
    lse_error: float
    lse_allowed: float

    @property
    def ok(self) -> bool:
        """Whether every error is within its bound. A NaN never is."""
        return (
            self.max_error <= self.max_allowed
            and self.mean_error <= self.mean_allowed
            and self.lse_error <= self.lse_allowed
        )

    @property
    def share(self) -> float:
        """The largest part of its bound that an error takes; NaN counts as infinite."""
        pairs = ((self.max_error, self.max_allowed), (self.mean_error, self.mean_allowed))
        return max(_share(*pair) for pair in (*pairs, (self.lse_error, self.lse_allowed)))

    def __str__(self) -> str:
        return (
            f"{'ok' if self.ok else 'WRONG'}: max {self.max_error:.3g} of {self.max_allowed:.3g}, "
            f"mean {self.mean_error:.3g} of {self.mean_allowed:.3g}, lse {self.lse_error:.3g} of {self.lse_allowed:.3g}"
        )

    def worst(self) -> dict[str, float]:
        """The six numbers."""
        return asdict(self)


def check(
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    **options: Any,
) -> Verdict:
    """Judge a forward result by the project's rule. `ref` is attention in fp32, rounded to the dtype of `out`; `pt` is
    plain PyTorch attention in that dtype.

    max   max|out - ref| <= 2 max|pt - ref| + a, with a = 2 max|(ref + 0.3 - 0.3) - ref|: about two roundings near 0.3,
          which decide where pt happens to equal ref (one key, say).
    mean  mean|out - ref| <= 1.2 mean|pt - ref| + eps / 8 mean|ref|: an eighth of a rounding step, for the same reason.
    lse   max|lse - ref| <= 1e-4 + 1e-5 max|ref|, where both -inf counts as equal; and with an expression 2^-11 of its
          largest score, as the device's tanh is no better.
    """
    with _full_fp32():
        ref, lse_ref = attention_reference(q, k, v, **options)
        largest = _largest_score(q, k, **options)
    pt, _ = attention_reference(q, k, v, **options, upcast=False, reorder_ops=True)
    pt_error = _error(pt, ref)
    floor = 2 * _max(_error(ref + 0.3 - 0.3, ref))
    finite_lse = lse_ref[torch.isfinite(lse_ref)]
    error, lse_error = _error(out, ref), _error(lse, lse_ref)
    return Verdict(
        max_error=_max(error),
        max_allowed=2 * _max(pt_error) + floor,
        mean_error=_mean(error),
        mean_allowed=1.2 * _mean(pt_error) + torch.finfo(ref.dtype).eps / 8 * _mean(ref.float().abs()),
        lse_error=_max(lse_error),
        lse_allowed=1e-4 + 1e-5 * _max(finite_lse.abs()) + _EXPRESSION_ERROR * largest,
    )


@dataclass(frozen=True)
class GradientVerdict:
    """How far gradients are from the truth, beside what is allowed; each field as in Verdict, for each of `names`."""

    max_error: tuple[float, ...]
    max_allowed: tuple[float, ...]
    mean_error: tuple[float, ...]
    mean_allowed: tuple[float, ...]
    names: tuple[str, ...] = ("dq", "dk", "dv")

    @property
    def ok(self) -> bool:
        """Whether every error is within its bound. A NaN never is."""
        errors, bounds = (*self.max_error, *self.mean_error), (*self.max_allowed, *self.mean_allowed)
        return all(error <= allowed for error, allowed in zip(errors, bounds, strict=True))

    def worst(self) -> dict[str, float]:
        """The four numbers of the gradient that comes nearest to its bound, or is farthest beyond it; NaN is worst."""
        columns = (self.max_error, self.max_allowed, self.mean_error, self.mean_allowed)
        of_each: list[tuple[float, ...]] = list(zip(*columns, strict=True))

        names = ("max_error", "max_allowed", "mean_error", "mean_allowed")
        return dict(zip(names, max(of_each, key=_excess), strict=True))

    @property
    def share(self) -> float:
        """The largest part of its bound that an error takes; NaN counts as infinite."""
        return _excess(tuple(self.worst().values()))

    def __str__(self) -> str:
        rows = zip(self.names, self.max_error, self.max_allowed, self.mean_error, self.mean_allowed, strict=True)
        parts = (f"{name} max {a:.3g} of {b:.3g}, mean {c:.3g} of {d:.3g}" for name, a, b, c, d in rows)
        return f"{'ok' if self.ok else 'WRONG'}: {'; '.join(parts)}"


def check_gradients(
    gradients: tuple[Tensor, Tensor, Tensor],
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    dlse: Tensor | None = None,
    s_aux: Tensor | None = None,
    place: Place | None = None,
    **options: Any,
) -> GradientVerdict:
    """Judge (dq, dk, dv) by the rule of `check`, each for itself: the truth is autograd through attention in fp32,
    rounded; `pt` is autograd through plain PyTorch attention in the inputs' dtype. Partial ones have the same bounds.

    Where the truth is nothing (dq and dk of rows with one key: dP - dPsum is 0) what fp32 leaves of the difference is
    allowed. What reading O rounded costs (Algorithm 2, line 4) is added to the bounds as an independent part: with two
    keys it exceeds all of pt's, with many it is nothing. All elements share the roundings of the rows of P that there
    are: of n the mean bound is 1 + n ** -0.5 times as large (of six, with a sink, one in 40 draws took all of it).
    """
    said = Options(**options)
    scale = said.scale(q.shape[-1])
    first, end = key_range(said, q.shape[1], k.shape[1], torch.arange(q.shape[1]))
    luck = 1 + max(q.shape[0] * q.shape[2] * int((first < end).sum()), 1) ** -0.5
    whole = options | {"s_aux": s_aux, "place": place, "partial": False}
    truth, plain, rounded = _three_gradients(dout, dlse, q, k, v, whole)
    ds_noise = _ds_noise(dout, v) * scale
    of_key = (q.shape[1] * (q.shape[2] // max(k.shape[2], 1))) ** 0.5  # so many rows are summed
    noises = (ds_noise * _max(k.float().abs()), ds_noise * _max(q.float().abs()) * of_key, 0.0)
    of_each = zip(gradients, truth[:3], plain[:3], rounded[:3], noises, strict=True)
    rows = [(*others, luck * mean_allowed) for *others, mean_allowed in (_judged(*one) for one in of_each)]
    return GradientVerdict(*zip(*rows, strict=True))


def check_input_gradients(
    gradients: Sequence[Tensor], parts: Iterable[Mapping[str, Any]], **options: Any
) -> GradientVerdict:
    """Judge the gradients of an expression's tensors that learn, in their order, by the rule of `check_gradients`, and
    allow in the mean half a rounding step of the inputs' dtype for each term of a sum, which add up as random numbers
    do: a single number of plain PyTorch's may be right by chance. And one of ours may be wrong by chance: of n numbers
    that are not 0 the mean bound is 1 + n ** -0.5 times as large.

    parts  q, k, v, dout, place and what else there is of dlse and s_aux, of each sequence: gradients are their sums.
    """
    sums: list[tuple[Tensor, ...]] = []  # of each part: truth, plain, rounded, and terms squared
    noise = eps = 0.0
    for part in parts:
        q, k, v, dout, dlse = part["q"], part["k"], part["v"], part["dout"], part.get("dlse")
        more = options | {name: part.get(name) for name in ("s_aux", "place")}
        three = _three_gradients(dout, dlse, q, k, v, more)
        sums.append((*(x for of_part in three for x in of_part[3:]), *_squared_terms(dout, dlse, q, k, v, more)))
        noise = max(noise, _ds_noise(dout, v) * (q.shape[1] * q.shape[2] * k.shape[1]) ** 0.5)
        eps = torch.finfo(q.dtype).eps
    of_each = [torch.stack(of_parts).sum(0) for of_parts in zip(*sums, strict=True)]
    rows, count = [], len(gradients)
    for n, x in enumerate(gradients):
        truth, plain, rounded, squares = of_each[n::count]
        error, allowed, mean, mean_allowed = _judged(x, truth, plain, rounded, noise)
        sizes = eps * squares.sqrt()
        luck = 1 + max(int(truth.count_nonzero()), 1) ** -0.5
        rows.append((error, allowed + 2 * _max(sizes), mean, luck * (mean_allowed + _mean(sizes) / 2)))
    names = tuple(f"d{token}" for token in names_of(options["expression"].learned))
    errors, most, means, most_means = zip(*rows, strict=True)
    return GradientVerdict(errors, most, means, most_means, names)


def _squared_terms(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]
) -> Iterator[Tensor]:
    """Of each tensor that learns, sums over the squares of what its gradients are sums of."""
    said = Options(**{name: x for name, x in options.items() if name in Options._fields})
    place, expression = options["place"], said.expression
    assert expression
    (batch, seqlen_q, num_heads), seqlen_k = q.shape[:3], k.shape[1]
    program, learned = program_of(*expression[:3]), names_of(expression.learned)
    # dS as the gradient of what is added to the score.
    with_ds = parse(f"({program.score}) + ds[b, h, i, j]", program.allow, {**dict(program.types), "ds": "float"})
    tensors = dict(zip((x.name for x in program.inputs if x.is_tensor), place.tensors, strict=True))
    tensors["ds"] = q.new_zeros((batch, num_heads, seqlen_q, seqlen_k), dtype=torch.float32)
    plain, names = anonymous(with_ds), [x.name for x in with_ds.inputs if x.is_tensor]
    asked = Expression(plain.score, plain.allow, text_of(plain.types), expression.numbers, (), with_ds.tokens["ds"])
    of_ds = {"expression": asked, "place": place._replace(tensors=[tensors[name] for name in names])}
    with _full_fp32():
        *_, ds = _gradients(dout, dlse, q, k, v, options | of_ds)
        scores = torch.einsum("bqngd,bknd->bngqk", _group_heads(q.float(), k), k.float()) * said.scale(q.shape[-1])
    values = _values(said, scores, place, seqlen_q, seqlen_k)
    for token in learned:
        total = torch.zeros_like(tensors[token])
        for access in program.accesses:
            if access.token == token:
                terms = evaluate_tree(access.derivative, values, torch) * ds
                indices = (evaluate_tree(index, values, torch).expand(ds.shape) for index in access.leaf.args)
                inside = (index.clamp(0, size - 1).long() for index, size in zip(indices, total.shape, strict=True))
                total.index_put_(tuple(inside), terms.square(), accumulate=True)
        yield total


def _three_gradients(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]
) -> tuple[tuple[Tensor, ...], ...]:
    """Those of `_gradients` in fp32, in the inputs' dtype, and in fp32 of a rounded O."""
    with _full_fp32():
        truth = _gradients(dout, dlse, q, k, v, options)
        plain = _gradients(dout, dlse, q, k, v, options | {"upcast": False, "reorder_ops": True})
        # dPsum = rowsum(dO * O) enters where a gradient of LSE does: with rounded O, as if LSE had this much more.
        out = attention_reference(q.float(), k.float(), v.float(), **options)[0]
        shift = (dout.float() * (out - out.to(q.dtype).float())).sum(-1).transpose(1, 2)
        rounded = _gradients(dout, shift if dlse is None else dlse + shift, q, k, v, options)
    return truth, plain, rounded


def _ds_noise(dout: Tensor, v: Tensor) -> float:
    """What fp32 leaves of dP - dPsum where that is nothing."""
    eps: float = torch.finfo(torch.float32).eps
    return 4 * eps * _longest_row(dout) * _longest_row(v)


def _judged(x: Tensor, ref: Tensor, pt: Tensor, by_rounding: Tensor, noise: float) -> tuple[float, float, float, float]:
    """The errors of a gradient and their bounds, in the order of a verdict's fields."""
    error, pt_error = _error(x, ref), _error(pt, ref)
    floor = 2 * _max(_error(ref + 0.3 - 0.3, ref))
    mean_allowed = 1.2 * _mean(pt_error) + torch.finfo(ref.dtype).eps / 8 * _mean(ref.float().abs())
    of_rounding = _error(by_rounding, ref)
    mean_allowed = math.hypot(mean_allowed, 1.2 * _mean(of_rounding))
    if _max(ref.float().abs()) <= noise:
        floor, mean_allowed = floor + noise, mean_allowed + noise
    max_allowed = math.hypot(2 * _max(pt_error) + floor, 2 * _max(of_rounding))
    return _max(error), max_allowed, _mean(error), mean_allowed


def check_sink_gradient(ds_aux: Tensor, s_aux: Tensor, parts: Iterable[Mapping[str, Tensor]]) -> GradientVerdict:
    """Judge the gradient of s_aux (H,), head by head: against `sink_gradient` in fp64 of the tensors that a kernel was
    given, within 1e-5 of what the terms of its sum are worth without their signs.

    parts  o, dout (B, Sq, H, D), lse and dlse (B, H, Sq), dlse only where LSE has a gradient; of each sequence.
    """
    truth, size = (torch.zeros_like(s_aux, dtype=torch.float64) for _ in range(2))
    for part in parts:
        dout, out, lse = (part[name].double() for name in ("dout", "o", "lse"))
        dlse = part["dlse"].double() if "dlse" in part else None
        truth += sink_gradient(dout, out, lse, dlse, s_aux.double())
        size -= sink_gradient(dout.abs(), out.abs(), lse, None if dlse is None else -dlse.abs(), s_aux.double())
    errors = tuple((ds_aux.double() - truth).abs().tolist())
    allowed = tuple((1e-5 * size + 1e-30).tolist())
    names = tuple(f"ds_aux[{head}]" for head in range(len(errors)))
    return GradientVerdict(errors, allowed, errors, allowed, names)


def _share(error: float, bound: float) -> float:
    return math.inf if math.isnan(error) else error / bound if bound else error


def _excess(numbers: Any) -> float:
    """The largest share of (error, bound, error, bound)."""
    return max(map(_share, numbers[::2], numbers[1::2]))


def _longest_row(x: Tensor) -> float:
    """The greatest Euclidean norm along the head dim."""
    return _max(torch.linalg.vector_norm(x.float(), dim=-1))


def _gradients(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]
) -> tuple[Tensor, ...]:
    """Of q, k and v, and of an expression's tensors that learn, by autograd."""
    with torch.enable_grad():
        leaves = tuple(x.detach().requires_grad_() for x in (q, k, v))
        said = Options(**{name: x for name, x in options.items() if name in Options._fields})
        place = options.get("place") or Place()
        tensors, learning = _with_leaves(place.tensors, said)
        out, lse = attention_reference(*leaves, **options | {"place": place._replace(tensors=tensors)})
        outputs, grads = [out], [dout]
        if dlse is not None:  # a row without keys has a constant lse
            no_key = torch.isneginf(lse)
            outputs.append(lse.masked_fill(no_key, 0.0))
            grads.append(dlse.masked_fill(no_key, 0.0))
        gradients: tuple[Tensor, ...] = torch.autograd.grad(outputs, (*leaves, *learning), grads)
        return gradients


@contextlib.contextmanager
def _full_fp32() -> Iterator[None]:
    """Products in whole fp32, whatever the process has set, by torch's older or newer names: TF32's ten bits would not
    be a truth. Both are set, as torch raises where they contradict each other."""
    backends = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    before = [backend.fp32_precision for backend in backends]
    try:
        older = torch.get_float32_matmul_precision()
    except RuntimeError:  # the newer names say something else than it, which is at its default then: "highest"
        older = "highest"
    torch.set_float32_matmul_precision("highest")
    for backend in backends:
        backend.fp32_precision = "ieee"
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(older)
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


def _at_least_fp32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _result_dtype(dtype: torch.dtype, partial: bool) -> torch.dtype:
    """Of out, where q has this dtype, or of a tensor's gradient."""
    return torch.promote_types(dtype, torch.float32) if partial else dtype


def _group_heads(q: Tensor, k: Tensor) -> Tensor:
    """(B, Sq, H, D) -> (B, Sq, Hk, H / Hk, D), so that K and V need not be expanded."""
    num_heads, num_heads_kv = q.shape[2], k.shape[2]
    # Not -1: with no element, a size of -1 is ambiguous.
    return q.unflatten(2, (num_heads_kv, num_heads // num_heads_kv if num_heads_kv else 0))


def _hides(options: Options) -> bool:
    """Whether a query may not see every key."""
    return options.mask != "full" or bool(options.expression and options.expression.allow)


def _hidden(
    options: Options,
    seqlen_q: int,
    seqlen_k: int,
    scores: Tensor,
    rows: tuple[int, int] | None = None,
    cols: tuple[int, int] | None = None,
    place: Place | None = None,
) -> Tensor:
    """True where key j (columns) is hidden from query i (rows); of the given ranges only, if given."""
    i = torch.arange(*(rows or (0, seqlen_q)), device=scores.device).unsqueeze(-1)
    j = torch.arange(*(cols or (0, seqlen_k)), device=scores.device)
    first, end = key_range(options, seqlen_q, seqlen_k, i)
    hidden = (j < first) | (j >= end)
    if options.expression and options.expression.allow:
        hidden = hidden | ~_evaluated("allow", options, scores, place, seqlen_q, seqlen_k, rows, cols)
    return hidden


def _modified(
    options: Options,
    scores: Tensor,
    place: Place | None,
    seqlen_q: int,
    seqlen_k: int,
    rows: tuple[int, int] | None = None,
    cols: tuple[int, int] | None = None,
) -> Tensor:
    """What the call's expression makes of scaled scores (B, Hk, H / Hk, rows, columns)."""
    assert options.expression
    if not options.expression.score:
        return scores
    return _evaluated("score", options, scores, place, seqlen_q, seqlen_k, rows, cols)


_EXPRESSION_ERROR = 2**-11


def _largest_score(
    q: Tensor, k: Tensor, place: Place | None = None, *, s_aux: Tensor | None = None, **options: Any
) -> float:
    """Of what an expression with approximated functions makes, in size; else 0. A sink's logit is no score."""
    del s_aux
    said = Options(**options)
    if not (said.expression and re.search("tanh|sigmoid|exp|log|sqrt|/", said.expression.score)):
        return 0.0
    scores = torch.einsum("bqngd,bknd->bngqk", _group_heads(q.float(), k), k.float()) * said.scale(q.shape[-1])
    modified = _modified(said, scores, place, q.shape[1], k.shape[1])
    return _max(modified.masked_fill(~torch.isfinite(modified), 0.0).abs())


def _pulled_back(
    ds: Tensor,
    options: Options,
    scores: Tensor,
    place: Place | None,
    seqlen_q: int,
    seqlen_k: int,
    rows: tuple[int, int],
    cols: tuple[int, int],
) -> Tensor:
    """The gradient of scaled scores, from that of what the call's expression made of them, and those of its tensors;
    by autograd, in a thread of its own: an operator's CPU kernel runs below autograd, and a new thread does not."""
    place = place or Place()

    def gradients() -> tuple[Tensor, ...]:
        with torch.enable_grad():
            products = scores.detach().requires_grad_()
            tensors, learning = _with_leaves(place.tensors, options)
            with_leaves = place._replace(tensors=tensors)
            modified = _modified(options, products, with_leaves, seqlen_q, seqlen_k, rows, cols)
            found: tuple[Tensor, ...] = torch.autograd.grad(modified, (products, *learning), ds, materialize_grads=True)
            return found

    with ThreadPoolExecutor(1) as thread:
        of_scores, *of_tensors = thread.submit(gradients).result()
    for total, part in zip(place.gradients, of_tensors, strict=True):
        total += part
    return of_scores


def _with_leaves(tensors: Sequence[Tensor], options: Options) -> tuple[list[Tensor], list[Tensor]]:
    """The tensors of an expression, with leaves in the place of those that learn; and these alone."""
    if options.expression is None:
        return [*tensors], []
    program, learned = program_of(*options.expression[:3]), names_of(options.expression.learned)
    tokens = [x.token for x in program.inputs if x.is_tensor]
    leaves = {token: x.detach().requires_grad_() for token, x in zip(tokens, tensors, strict=True) if token in learned}
    return [leaves.get(token, x) for token, x in zip(tokens, tensors, strict=True)], [*leaves.values()]


def _evaluated(
    what: Literal["score", "allow"],
    options: Options,
    scores: Tensor,
    place: Place | None,
    seqlen_q: int,
    seqlen_k: int,
    rows: tuple[int, int] | None,
    cols: tuple[int, int] | None,
) -> Tensor:
    """An expression of the call over scores (B, Hk, H / Hk, rows, columns), and shaped as they."""
    assert options.expression
    values = _values(options, scores, place or Place(), seqlen_q, seqlen_k, rows, cols)
    found = evaluate(program_of(*options.expression[:3]), what, torch, values)
    return torch.broadcast_to(found, values["s"].shape).unflatten(1, scores.shape[1:3])


def _values(
    options: Options,
    scores: Tensor,
    place: Place,
    seqlen_q: int,
    seqlen_k: int,
    rows: tuple[int, int] | None = None,
    cols: tuple[int, int] | None = None,
) -> dict[str, Any]:
    """What the call's expression names, over scores (B, Hk, H / Hk, rows, columns): s is (B, H, rows, columns)."""
    assert options.expression
    score, allow, inputs, numbers = options.expression[:4]
    batch, num_heads_kv, group = scores.shape[:3]
    device = scores.device
    h = torch.arange(num_heads_kv * group, device=device, dtype=torch.int32).view(-1, 1, 1)
    return {
        "s": scores.flatten(1, 2),
        "i": torch.arange(*(rows or (0, seqlen_q)), device=device, dtype=torch.int32).unsqueeze(-1),
        "j": torch.arange(*(cols or (0, seqlen_k)), device=device, dtype=torch.int32),
        "b": torch.arange(place.b, place.b + batch, device=device, dtype=torch.int32).view(-1, 1, 1, 1),
        "h": h,
        "hk": h // group,
        "seqlen_q": seqlen_q,
        "seqlen_k": seqlen_k,
        **named_values(program_of(score, allow, inputs), numbers, place.tensors),
    }


def _error(x: Tensor, ref: Tensor) -> Tensor:
    """|x - ref| in fp32 or wider; 0 where they are equal, also where both are the same infinity."""
    return torch.where(x == ref, 0.0, (_at_least_fp32(x) - _at_least_fp32(ref)).abs())


def _max(x: Tensor) -> float:
    return x.max().item() if x.numel() else 0.0


def _mean(x: Tensor) -> float:
    return x.mean().item() if x.numel() else 0.0
