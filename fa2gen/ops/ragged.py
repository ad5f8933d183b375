"""Ragged batches on CUDA: from packed tensors and lengths to launches of both passes.

Signatures, kernels and copies are those of `fa2gen.ops.call`. Lengths lie on the device and are not read here: not for
a grid, nor for the kernel, which is chosen by how many keys the caller says that there are, or by their mean.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fa2gen.ops.call import (
    SCRATCH_ROWS,
    AnyOptions,
    Call,
    Gradients,
    address_of,
    aligned,
    chosen_for,
    contiguous,
    cut,
    dense,
    fit_results,
    gradients_call,
    known_kind,
    launch_with_scratch,
    made,
    packed,
    remember_kind,
    remembered,
    room_for,
    scaled,
    scratch_for,
    signature_of,
    strides_of,
)
from fa2gen.ops.validate import Lengths, out_dtype, validate_options, validate_ragged, validate_ragged_backward
from fa2gen.options import Options, Shape
from fa2gen.spec import Direction

if TYPE_CHECKING:
    from fa2gen.kernel import PreparedLaunch

__all__ = [
    "are_plain",
    "backward_ragged",
    "forward_ragged",
    "forward_ragged_out",
    "packed_sequences",
    "placed",
    "shape_of",
]


def forward_ragged(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    seqused_q: Tensor | None,
    seqused_k: Tensor | None,
    options: AnyOptions,
    max_keys: int | None = None,
    into: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """(out, lse) by a generated kernel, on the current stream of q's device; `into` are the buffers to use.

    q, k, v and lengths as `validate_ragged` says; out as `out_shape`, lse (heads, total_q) fp32; both contiguous.
    max_keys  of the longest sequence, if that is known: it decides which kernel is the quickest, nothing else.

    Raises as `forward_cuda` does.
    """
    lengths = (cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k)
    call = _find(q, k, v, lengths, options, max_keys)
    out, lse = into or call.new_results(q)
    if call.launch is None and not call.misaligned:  # no query, or no key for any
        out.zero_()
        lse.fill_(-math.inf)
        return out, lse
    q_at, k_at, v_at = q.data_ptr(), k.data_ptr(), v.data_ptr()
    if call.launch is None or (q_at | k_at | v_at) & 15:
        options, room = scaled(options, q), room_for(out)
        q, k, v = (aligned(x) for x in (q, k, v))
        forward_ragged(q, k, v, *lengths, options, max_keys, (room, lse))
        return cut(room, out), lse
    at = (q_at, k_at, v_at, out.data_ptr(), lse.data_ptr(), *map(address_of, lengths))
    launch_with_scratch(call, q, at)
    return out, lse


def forward_ragged_out(
    q: Tensor, k: Tensor, v: Tensor, lengths: Lengths, options: AnyOptions, max_keys: int | None
) -> Tensor:
    """`out` of `forward_ragged`, for who does not ask for lse: where it is small, no memory is allocated for it."""
    call = _find(q, k, v, lengths, options, max_keys)
    launch = call.launch
    q_at, k_at, v_at = q.data_ptr(), k.data_ptr(), v.data_ptr()
    if launch is not None and not (q_at | k_at | v_at) & 15 and call.num_rows <= SCRATCH_ROWS:
        stream, scratch = scratch_for(call)
        if scratch is not None:
            out = call.new_out(q)
            bounds_q, bounds_k, used_q, used_k = lengths
            bounds_q_at = bounds_k_at = 0 if bounds_q is None else bounds_q.data_ptr()
            if bounds_k is not bounds_q:
                bounds_k_at = 0 if bounds_k is None else bounds_k.data_ptr()
            used_q_at = 0 if used_q is None else used_q.data_ptr()
            used_k_at = 0 if used_k is None else used_k.data_ptr()
            at = (q_at, k_at, v_at, out.data_ptr(), scratch.lse, bounds_q_at, bounds_k_at, used_q_at, used_k_at)
            with scratch.lock:
                launch(at, scratch.work, stream, scratch.counter)
            return out
    return forward_ragged(q, k, v, *lengths, options, max_keys)[0]


def _find(q: Tensor, k: Tensor, v: Tensor, lengths: Lengths, options: AnyOptions, max_keys: int | None) -> Call:
    """What forward calls with this signature share: remembered, or prepared now."""
    bounds_q, bounds_k, used_q, used_k = lengths
    # A batch with another longest sequence is no other signature for that, but for one in another range.
    bits = None if max_keys is None else (max_keys - 1).bit_length()
    kind_q = kind_k = None
    if bounds_q is not None:
        kind_q = kind_k = (bounds_q.shape, bounds_q.stride(), bounds_q.dtype, bounds_q.get_device())
    if bounds_k is not bounds_q:
        kind_k = signature_of(bounds_k)
    key = (
        q.shape, k.shape, v.shape, q.stride(), k.stride(), v.stride(),
        q.dtype, k.dtype, v.dtype, q.get_device(), k.get_device(), v.get_device(), kind_q, kind_k,
        None if used_q is None else signature_of(used_q), None if used_k is None else signature_of(used_k),
        options, bits,
    )  # fmt: skip
    return remembered(key) or made(key, _prepare, key, q, k, v, lengths, options, bits)


def backward_ragged(
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
    options: AnyOptions,
    max_keys: int | None = None,
    into: Gradients | None = None,
) -> Gradients:
    """(dq, dk, dv) by generated kernels, contiguous, on the current stream of q's device.

    dout, out  as `out_shape` says, of any strides; lse, dlse (heads, total_q) fp32.

    Deterministic where `backward_cuda` is. Raises as it does.
    """
    lengths = (cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k)
    if torch.are_deterministic_algorithms_enabled():
        options = Options(*options)._replace(deterministic=True)
    if dout.dim() == 4:  # its rows must be evenly spaced
        dout, out = dout.contiguous(), out.contiguous()
    lse = lse.contiguous()
    if dlse is not None:
        dlse = dlse.contiguous()
    bits = None if max_keys is None else (max_keys - 1).bit_length()
    kind_q, kind_k, kind_used_q, kind_used_k = map(signature_of, lengths)
    key = (
        dout.shape, q.shape, k.shape, v.shape, out.shape, lse.shape, None if dlse is None else dlse.shape,
        kind_q, kind_k, kind_used_q, kind_used_k,
        dout.stride(), q.stride(), k.stride(), v.stride(), out.stride(),
        dout.dtype, q.dtype, k.dtype, v.dtype, out.dtype, lse.dtype, None if dlse is None else dlse.dtype,
        dout.get_device(), q.get_device(), k.get_device(), v.get_device(), out.get_device(), lse.get_device(),
        None if dlse is None else dlse.get_device(), options, bits,
    )  # fmt: skip
    call = remembered(key) or made(key, _prepare_backward, key, dout, q, k, v, out, lse, dlse, lengths, options, bits)
    dq, dk, dv = into or call.new_gradients(q)
    if call.launch is None and not call.misaligned:  # no query or no key
        for gradient in (dq, dk, dv):
            gradient.zero_()
        return dq, dk, dv
    q_at, k_at, v_at, out_at, dout_at = q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(), dout.data_ptr()
    dq_at, dk_at, dv_at, lse_at, dlse_at = dq.data_ptr(), dk.data_ptr(), dv.data_ptr(), lse.data_ptr(), address_of(dlse)
    at = (q_at, k_at, v_at, out_at, dout_at, dq_at, dk_at, dv_at, lse_at, dlse_at)
    all_bits = q_at | k_at | v_at | out_at | dout_at | dq_at | dk_at | dv_at | lse_at | dlse_at
    if call.launch is None or all_bits & 15:
        options, rooms = scaled(options, q), (room_for(dq), room_for(dk), room_for(dv))
        q, k, v, dout, out = (aligned(x) for x in (q, k, v, dout, out))
        lse, dlse = (x if x is None or not x.data_ptr() & 15 else x.clone() for x in (lse, dlse))
        backward_ragged(dout, q, k, v, out, lse, dlse, *lengths, options, max_keys, rooms)
        return cut(rooms[0], dq), cut(rooms[1], dk), cut(rooms[2], dv)
    launch_with_scratch(call, q, (*at, *map(address_of, lengths)))
    return dq, dk, dv


def are_plain(lengths: tuple[Any, ...]) -> bool:
    """Whether these are tensors, none of a subclass, or None."""
    bounds_q, bounds_k, used_q, used_k = lengths
    return (
        (bounds_q is None or type(bounds_q) is Tensor)
        and (bounds_k is None or type(bounds_k) is Tensor)
        and (used_q is None or type(used_q) is Tensor)
        and (used_k is None or type(used_k) is Tensor)
    )


# Once for each signature ------------------------------------------------------------------------------------------


def _prepare(
    key: tuple[Any, ...],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Lengths,
    options: AnyOptions,
    bits: int | None,
) -> Call:
    """Validate a signature, that of `_find`; choose, load and pack its kernel."""
    size_q, size_k, size_v = key[:3]
    of_lengths = key[12:16]
    of_kind = [None if x is None else x[1:] for x in of_lengths]
    kind = ("varlen", size_q[1:], size_k[1:], size_v[1:], *key[3:12], *of_kind, options, bits)
    known: _Known | None = known_kind(kind)
    if known is not None and (found := known.resized(key[:3], of_lengths, bits)) is not None:
        (_, total_q, _, heads, _), resized = found
        out = (total_q, heads, size_v[2]), (heads * size_v[2], size_v[2], 1)
        lse = (heads, total_q), (total_q, 1)
        return Call(
            q.get_device(), out, lse, heads * total_q, resized, misaligned=False, out_dtype=out_dtype(q, known.options)
        )
    said = Options(*options)
    batch = validate_ragged(q, k, v, lengths)
    validate_options(said)
    places = {"q": placed(q), "k": placed(k), "v": placed(v)}
    strides = strides_of(places)
    shape = shape_of(batch, places)
    if strides is not None:
        strides["o"] = dense(shape.seqlen_q, shape.num_heads, size_v[-1])
    launch = packed("fwd", q, size_v[-1], strides, said, shape, _keys(shape, bits))
    if packed_sequences(list(zip(key[:3], key[3:6], strict=True)), of_lengths) is not None:
        _learned(known, kind, ("fwd", said, q, v), shape, bits, launch)
    return Call(
        q.get_device(),
        out=contiguous((*size_q[:-1], size_v[-1])),
        lse=contiguous((shape.num_heads, shape.seqlen_q)),
        num_rows=shape.num_heads * shape.seqlen_q,
        launch=launch,
        misaligned=launch is None and 0 not in shape,
        out_dtype=out_dtype(q, said),
    )


class _Known:
    """What calls of a kind share, packed ones, that differ in totals and in the number of sequences alone; of each
    kernel that they may have, a launch of some such call."""

    __slots__ = ("_device", "_direction", "_dtype", "_head_dims", "_heads", "_launches", "options")

    def __init__(self, direction: Direction, options: Options, q: Tensor, v: Tensor) -> None:
        self._direction, self.options, self._device, self._dtype = direction, options, q.get_device(), q.dtype
        self._head_dims, self._heads = (q.shape[-1], v.shape[-1]), (q.shape[-2], v.shape[-2])
        self._launches: dict[Any, PreparedLaunch] = {}

    def _choice(self, shape: Shape, bits: int | None) -> tuple[Any, Options]:
        """(the kernel, the options that it is launched with)"""
        options = self.options.reduced(shape.seqlen_q, shape.seqlen_k)
        keys = _keys(shape, bits)
        chosen = chosen_for(self._direction, self._head_dims, self._dtype, options, self._device, keys)
        return (chosen.of_groups(shape, options) if self._direction == "bwd" else chosen), options

    def add(self, shape: Shape, bits: int | None, launch: PreparedLaunch) -> None:
        """Of a call with several rows of each side: their stride counts."""
        self._launches[self._choice(shape, bits)[0]] = launch

    def resized(
        self, sizes: Sequence[tuple[int, ...]], lengths: Sequence[Any], bits: int | None
    ) -> tuple[Shape, PreparedLaunch] | None:
        """The launch for q, k and v of these sizes, and lengths (sizes, strides, ...); None where they may not fit each
        other, or are those of no kernel that is known."""
        size_q, size_k, size_v = sizes
        total_q, total_k = size_q[0], size_k[0]
        of_query, of_key, used_q, used_k = lengths
        batch = of_query[0][0] - 1
        if size_v[0] != total_k or of_key[0] != of_query[0] or total_q < 2 or total_k < 2 or batch < 1:
            return None
        for used in (used_q, used_k):
            if used is not None and used[:2] != ((batch,), (1,)):
                return None
        shape = Shape(batch, total_q, total_k, *self._heads)
        chosen, options = self._choice(shape, bits)
        launch = self._launches.get(chosen)
        return None if launch is None else (shape, launch.resized(shape, options))


def _learned(
    known: _Known | None, kind: tuple[Any, ...], of: tuple[Any, ...], shape: Shape, bits: int | None, launch: Any
) -> None:
    """Remember a launch for calls of its kind, with what `_Known` takes if there was none of it."""
    if launch is not None and shape.seqlen_q > 1 and shape.seqlen_k > 1:
        known = known or _Known(*of)
        known.add(shape, bits, launch)
        remember_kind(kind, known)


def _prepare_backward(
    key: tuple[Any, ...],
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dlse: Tensor | None,
    lengths: Lengths,
    options: AnyOptions,
    bits: int | None,
) -> Call:
    """`_prepare` of gradients; the signature is that of `backward_ragged`."""
    _, size_q, size_k, size_v, *_ = key
    of_lengths = key[7:11]
    of_kind = [None if x is None else x[1:] for x in of_lengths]
    kind = ("varlen bwd", size_q[1:], size_k[1:], size_v[1:], *of_kind, *key[11:])
    known: _Known | None = known_kind(kind)
    if (
        known is not None
        and fit_results((size_q[1], size_q[0]), (*size_q[:2], size_v[2]), key[:7])
        and (found := known.resized(key[1:4], of_lengths, bits)) is not None
    ):
        return gradients_call(q, k, v, known.options, *found)
    said = Options(*options)
    batch = validate_ragged_backward(dout, q, k, v, out, lse, dlse, lengths)
    validate_options(said)
    places = {name: placed(x) for name, x in (("q", q), ("k", k), ("v", v), ("o", out), ("dout", dout))}
    strides = strides_of(places)
    shape = shape_of(batch, places)
    if strides is not None:
        strides |= {f"d{name}": dense(*places[name][0][1:]) for name in "qkv"}
    launch = packed("bwd", q, size_v[-1], strides, said, shape, _keys(shape, bits))
    if packed_sequences(list(zip(key[1:4], key[12:15], strict=True)), of_lengths) is not None:
        _learned(known, kind, ("bwd", said, q, v), shape, bits, launch)
    return gradients_call(q, k, v, said, shape, launch)


def packed_sequences(tensors: Sequence[Any], lengths: Sequence[Any]) -> int | None:
    """How many sequences there are, where q, k and v are packed, and all sizes and strides fit each other; else None:
    they are to be looked at closely. Each is (sizes, strides, ...), of lengths maybe None."""
    of_query, of_key, used_q, used_k = lengths
    if of_query is None or of_key is None or tensors[1][0][:1] != tensors[2][0][:1]:
        return None
    for x in tensors:
        if len(x[0]) != 3 or x[1][2] != 1:
            return None
    bounds = of_query[0]
    if of_key[0] != bounds or len(bounds) != 1 or not bounds[0]:
        return None
    batch: int = bounds[0] - 1
    if (used_q is not None and used_q[0] != (batch,)) or (used_k is not None and used_k[0] != (batch,)):
        return None
    for x in lengths:
        if x is not None and x[1][0] != 1 and x[0][0] > 1:
            return None
    return batch


def placed(x: Tensor) -> tuple[Sequence[int], Sequence[int]]:
    """(sizes, strides) as a kernel sees a tensor: (1, rows, heads, head_dim). Of a batch of even sequences, one row is
    behind the other."""
    if x.dim() == 3:
        sizes, steps = x.shape, x.stride()
        return (1, *sizes), (sizes[0] * steps[0], *steps)
    rows = x.flatten(0, 1).unsqueeze(0)
    return rows.shape, rows.stride()


def shape_of(batch: int, places: Mapping[str, tuple[Sequence[int], Sequence[int]]]) -> Shape:
    """Of so many sequences, of tensors as `placed` gives them."""
    _, total_q, num_heads, _ = places["q"][0]
    _, total_k, num_heads_kv, _ = places["k"][0]
    return Shape(batch, total_q, total_k, num_heads, num_heads_kv)


def _keys(shape: Shape, bits: int | None) -> int:
    """How many a sequence is taken to have: the power of two that holds the longest, or the mean."""
    return shape.seqlen_k // max(shape.batch, 1) if bits is None else min(1 << bits, shape.seqlen_k)
