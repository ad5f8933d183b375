"""Ragged batches on CUDA: from packed tensors and lengths to launches of both passes.

Signatures, kernels and copies are those of `fa2gen.ops.call`. Lengths lie on the device and are not read here: not for
a grid, nor for the kernel, which is chosen by how many keys the caller says that there are, or by their mean.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fa2gen.ops.call import (
    SCRATCH_ROWS,
    AnyOptions,
    Call,
    Gradients,
    aligned,
    contiguous,
    cut,
    dense,
    fit_results,
    gradients_call,
    known_options,
    launch_ragged,
    launch_with_scratch,
    packed,
    prepared,
    remember_kind,
    room_for,
    scaled,
    sizes_of,
    strides_of,
    types_of,
)
from fa2gen.ops.validate import Lengths, validate_options, validate_ragged, validate_ragged_backward
from fa2gen.options import Options, Shape

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
    out, lse = into or (call.new_out(q), call.new_lse(q))
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
    launch_ragged(call, q, (q_at, k_at, v_at, out.data_ptr()), lse, lengths)
    return out, lse


def forward_ragged_out(
    q: Tensor, k: Tensor, v: Tensor, lengths: Lengths, options: AnyOptions, max_keys: int | None
) -> Tensor:
    """`out` of `forward_ragged`, for who does not ask for lse: where it is small, no memory is allocated for it."""
    call = _find(q, k, v, lengths, options, max_keys)
    q_at, k_at, v_at = q.data_ptr(), k.data_ptr(), v.data_ptr()
    if call.launch is None or (q_at | k_at | v_at) & 15 or call.num_rows > SCRATCH_ROWS:
        return forward_ragged(q, k, v, *lengths, options, max_keys)[0]
    out = call.new_out(q)
    launch_ragged(call, q, (q_at, k_at, v_at, out.data_ptr()), None, lengths)
    return out


def _find(q: Tensor, k: Tensor, v: Tensor, lengths: Lengths, options: AnyOptions, max_keys: int | None) -> Call:
    """What forward calls with this signature share: remembered, or prepared now."""
    bounds_q, bounds_k, used_q, used_k = lengths
    # A batch with another longest sequence is no other signature for that, but for one in another range.
    bits = None if max_keys is None else (max_keys - 1).bit_length()
    kind_q = _kind(bounds_q)
    key = (
        q.shape, k.shape, v.shape, q.stride(), k.stride(), v.stride(),
        q.dtype, k.dtype, v.dtype, q.get_device(), k.get_device(), v.get_device(),
        kind_q, kind_q if bounds_k is bounds_q else _kind(bounds_k),
        None if used_q is None else _kind(used_q), None if used_k is None else _kind(used_k), options, bits,
    )  # fmt: skip
    return prepared(key, _prepare, key, q, k, v, lengths, options, bits)


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
    key = (
        *[(x.shape, x.stride(), x.dtype, x.get_device()) for x in (dout, q, k, v, out)],
        *[None if x is None else (x.shape, x.dtype, x.get_device()) for x in (lse, dlse)],
        *map(_kind, lengths), options, bits,
    )  # fmt: skip
    call = prepared(key, _prepare_backward, key, dout, q, k, v, out, lse, dlse, lengths, options, bits)
    dq, dk, dv = into or call.new_gradients(q)
    if call.launch is None and not call.misaligned:  # no query or no key
        for gradient in (dq, dk, dv):
            gradient.zero_()
        return dq, dk, dv
    at = [x.data_ptr() for x in (q, k, v, out, dout, dq, dk, dv, lse)]
    at.append(_address(dlse))
    if call.launch is None or any(address & 15 for address in at):
        options, rooms = scaled(options, q), (room_for(dq), room_for(dk), room_for(dv))
        q, k, v, dout, out = (aligned(x) for x in (q, k, v, dout, out))
        lse, dlse = (x if x is None or not x.data_ptr() & 15 else x.clone() for x in (lse, dlse))
        backward_ragged(dout, q, k, v, out, lse, dlse, *lengths, options, max_keys, rooms)
        return cut(rooms[0], dq), cut(rooms[1], dk), cut(rooms[2], dv)
    launch_with_scratch(call, q, (*at, *map(_address, lengths)))
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


def _kind(x: Tensor | None) -> Any:
    """What of a tensor of lengths is part of a call's signature."""
    return None if x is None else (x.shape, x.stride(), x.dtype, x.get_device())


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


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
    kind = None
    if (batch := packed_sequences(list(zip(key[:3], key[3:6], strict=True)), of_lengths)) is not None:
        kind = ("varlen", size_q[1:], size_k[1:], size_v[1:], *key[6:12], *types_of(of_lengths), options)
    if batch is None or (said := known_options(kind)) is None:
        said = Options(*options)
        batch = validate_ragged(q, k, v, lengths)
        validate_options(said)
        remember_kind(kind, said)
    places = {"q": placed(q), "k": placed(k), "v": placed(v)}
    strides = strides_of(places)
    shape = shape_of(batch, places)
    if strides is not None:
        strides["o"] = dense(shape.seqlen_q, shape.num_heads, size_v[-1])
    launch = packed("fwd", q, size_v[-1], strides, said, shape, _keys(shape, bits))
    return Call(
        q.get_device(),
        out=contiguous((*size_q[:-1], size_v[-1])),
        lse=contiguous((shape.num_heads, shape.seqlen_q)),
        num_rows=shape.num_heads * shape.seqlen_q,
        launch=launch,
        misaligned=launch is None and 0 not in shape,
    )


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
    size_q, size_k, size_v = q.shape, k.shape, v.shape
    kind, batch = None, packed_sequences(key[1:4], key[7:11])
    if batch is not None and fit_results((size_q[1], size_q[0]), (*size_q[:2], size_v[2]), sizes_of(key[:7])):
        kind = ("varlen bwd", size_q[1:], size_k[1:], size_v[1:], *types_of(key[:11]), options)
    if batch is None or (said := known_options(kind)) is None:
        said = Options(*options)
        batch = validate_ragged_backward(dout, q, k, v, out, lse, dlse, lengths)
        validate_options(said)
        remember_kind(kind, said)
    places = {name: placed(x) for name, x in (("q", q), ("k", k), ("v", v), ("o", out), ("dout", dout))}
    strides = strides_of(places)
    shape = shape_of(batch, places)
    if strides is not None:
        strides |= {f"d{name}": dense(*places[name][0][1:]) for name in "qkv"}
    launch = packed("bwd", q, size_v[-1], strides, said, shape, _keys(shape, bits))
    return gradients_call(q, k, v, shape, launch)


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
