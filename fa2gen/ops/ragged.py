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
    aligned,
    chosen_for,
    contiguous,
    cut,
    dense,
    fit_results,
    gradients_call,
    known_kind,
    launch_ragged,
    launch_with_scratch,
    packed,
    prepared,
    remember_kind,
    remembered,
    room_for,
    scaled,
    sizes_of,
    strides_of,
    types_of,
)
from fa2gen.ops.validate import Lengths, out_dtype, validate_options, validate_ragged, validate_ragged_backward
from fa2gen.options import Options, Shape

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
    kind_q = kind_k = None
    if bounds_q is not None:
        kind_q = kind_k = (bounds_q.shape, bounds_q.stride(), bounds_q.dtype, bounds_q.get_device())
    if bounds_k is not bounds_q:
        kind_k = _kind(bounds_k)
    key = (
        q.shape, k.shape, v.shape, q.stride(), k.stride(), v.stride(),
        q.dtype, k.dtype, v.dtype, q.get_device(), k.get_device(), v.get_device(), kind_q, kind_k,
        None if used_q is None else _kind(used_q), None if used_k is None else _kind(used_k), options, bits,
    )  # fmt: skip
    return remembered(key) or prepared(key, _prepare, key, q, k, v, lengths, options, bits)


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
    of_kind = [None if x is None else x[1:] for x in of_lengths]
    kind = ("varlen", size_q[1:], size_k[1:], size_v[1:], *key[3:12], *of_kind, options, bits)
    known: _Known | None = known_kind(kind)
    if known is not None and (call := known.call(size_q, size_k, size_v, of_lengths, bits)) is not None:
        return call
    said = Options(*options)
    batch = validate_ragged(q, k, v, lengths)
    validate_options(said)
    places = {"q": placed(q), "k": placed(k), "v": placed(v)}
    strides = strides_of(places)
    shape = shape_of(batch, places)
    if strides is not None:
        strides["o"] = dense(shape.seqlen_q, shape.num_heads, size_v[-1])
    launch = packed("fwd", q, size_v[-1], strides, said, shape, _keys(shape, bits))
    are_packed = packed_sequences(list(zip(key[:3], key[3:6], strict=True)), of_lengths) is not None
    if launch is not None and are_packed and shape.seqlen_q > 1 and shape.seqlen_k > 1:
        known = known or _Known(said, q.get_device(), q.dtype, (size_q[-1], size_v[-1]), (size_q[1], size_k[1]))
        known.add(shape, bits, launch)
        remember_kind(kind, known)
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
    """What forward calls of a kind share, packed ones, that differ in totals and in the number of sequences alone; of
    each kernel that they may have, a launch of some such call."""

    __slots__ = ("_dtype", "_head_dims", "_heads", "_launches", "_options", "device")

    def __init__(
        self, options: Options, device: int, dtype: Any, head_dims: tuple[int, int], heads: tuple[int, int]
    ) -> None:
        self._options, self.device, self._dtype, self._head_dims, self._heads = options, device, dtype, head_dims, heads
        self._launches: dict[Any, tuple[Options, PreparedLaunch]] = {}

    def _choice(self, shape: Shape, bits: int | None) -> tuple[Any, Options]:
        """(the kernel, the options that it is launched with)"""
        options = self._options.reduced(shape.seqlen_q, shape.seqlen_k)
        return chosen_for("fwd", self._head_dims, self._dtype, options, self.device, _keys(shape, bits)), options

    def add(self, shape: Shape, bits: int | None, launch: PreparedLaunch) -> None:
        """Of a call with several rows of each side: their stride counts."""
        chosen, options = self._choice(shape, bits)
        self._launches[chosen] = options, launch

    def call(
        self,
        size_q: tuple[int, ...],
        size_k: tuple[int, ...],
        size_v: tuple[int, ...],
        lengths: tuple[Any, ...],
        bits: int | None,
    ) -> Call | None:
        """Of these sizes, and lengths (sizes, strides, ...); None where they may not fit each other, or are those of
        no kernel that is known."""
        of_query, of_key, used_q, used_k = lengths
        total_q, total_k, bounds = size_q[0], size_k[0], of_query[0]
        batch = bounds[0] - 1
        if size_v[0] != total_k or of_key[0] != bounds or total_q < 2 or total_k < 2 or batch < 1:
            return None
        for used in (used_q, used_k):
            if used is not None and used[:2] != ((batch,), (1,)):
                return None
        heads, heads_kv = self._heads
        shape = Shape(batch, total_q, total_k, heads, heads_kv)
        chosen, options = self._choice(shape, bits)
        before = self._launches.get(chosen)
        if before is None or before[0] != options:
            return None
        head_dim = self._head_dims[1]
        return Call(
            self.device,
            out=((total_q, heads, head_dim), (heads * head_dim, head_dim, 1)),
            lse=((heads, total_q), (total_q, 1)),
            num_rows=heads * total_q,
            launch=before[1].resized(shape, options),
            misaligned=False,
            out_dtype=torch.float32 if options.partial else self._dtype,
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
    if batch is None or (said := known_kind(kind)) is None:
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
