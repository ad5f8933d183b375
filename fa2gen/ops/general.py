"""Calls with tensors beside q, k, v and lengths, on CUDA: from tensors to launches of both passes, dense and ragged.

What is the same for all of a kind is in `fa2gen.ops.call`: signatures, kernels, copies. Such a call takes a few
microseconds more than a plain one, as it looks at more tensors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from fa2gen.ops.call import (
    AnyOptions,
    Call,
    address_of,
    aligned,
    contiguous,
    cut,
    dense,
    fit_each_other,
    fit_results,
    gradients_call,
    known_kind,
    launch_cleared,
    launch_with_scratch,
    packed,
    prepared,
    remember_kind,
    room_for,
    scaled,
    signature_of,
    sizes_of,
    strides_of,
    types_of,
)
from fa2gen.ops.ragged import packed_sequences, placed, shape_of
from fa2gen.ops.validate import (
    Lengths,
    out_shape,
    validate_expression,
    validate_general,
    validate_general_backward,
)
from fa2gen.options import Options, Shape
from fa2gen.spec import Tiling, names_of, program_of

__all__ = ["AllGradients", "backward_general", "forward_general", "learning"]

AllGradients: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]
"""(dq, dk, dv, ds_aux, those of the tensors that learn); ds_aux is empty where there is no s_aux."""


def forward_general(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    seqused_q: Tensor | None,
    seqused_k: Tensor | None,
    s_aux: Tensor | None,
    rng_state: Tensor | None,
    tensors: Sequence[Tensor],
    options: AnyOptions,
    max_keys: int | None = None,
    arch: str | None = None,
    tiling: Tiling | None = None,
    into: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """(out, lse) by a generated kernel, on the current stream of q's device; `into` are the buffers to use.

    q, k, v  of a dense batch, where all lengths are None, else of a ragged one, as `validate_ragged` says.
    s_aux      (heads,) fp32, contiguous, or None.
    rng_state  (2,) int64: 128 random bits, with dropout alone.
    tensors    that the expression of the options names, in the order of its inputs.

    out as `out_shape` says; lse (batch, heads, seqlen_q), of a ragged batch (heads, total_q), fp32; both contiguous.
    Raises as `forward_cuda` does.
    """
    tensors = [x.contiguous() for x in tensors]  # Inductor pads rows of its own
    lengths = (cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k)
    keys = None if max_keys is None else 1 << (max_keys - 1).bit_length()  # few kinds
    key = (*map(signature_of, (q, k, v, *lengths, s_aux, rng_state, *tensors)), options, keys, arch, tiling)
    call = prepared(
        key, _prepare, key, q, k, v, lengths, s_aux, rng_state, tensors, Options(*options), keys, arch, tiling
    )
    out, lse = into or call.new_results(q)
    ragged = any(x is not None for x in lengths)
    if call.launch is None and not call.misaligned:  # no query, or no key for any
        if ragged and s_aux is not None and out.numel():
            one_k, one_v, bounds = _keys_of_none(k, v, lengths)
            given = (q, one_k, one_v, cu_seqlens_q, bounds, seqused_q, None, s_aux, rng_state, tensors)
            return forward_general(*given, options, max_keys, arch, tiling, (out, lse))
        out.zero_()
        lse.copy_(s_aux[:, None].expand_as(lse)) if s_aux is not None else lse.fill_(-math.inf)
        return out, lse
    at = [x.data_ptr() for x in (q, k, v, out, lse)]
    if call.launch is None or any(address & 15 for address in (*at, address_of(rng_state))):
        options, room = scaled(options, q), room_for(out)
        q, k, v = (aligned(x) for x in (q, k, v))
        rng_state = _on_16_bytes(rng_state)
        further = (s_aux, rng_state, tensors)
        forward_general(q, k, v, *lengths, *further, options, max_keys, arch, tiling, (room, lse))
        return cut(room, out), lse
    addresses = (x.data_ptr() for x in (s_aux, rng_state, *tensors) if x is not None)
    others = (*(map(address_of, lengths) if ragged else ()), *addresses)
    takes = call.launch.scratch_bytes or call.launch.cleared_bytes
    launch = launch_cleared if call.launch.scratch_cleared or not takes else launch_with_scratch
    launch(call, q, (*at, *others))
    return out, lse


def backward_general(
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
    s_aux: Tensor | None,
    rng_state: Tensor | None,
    tensors: Sequence[Tensor],
    options: AnyOptions,
    max_keys: int | None = None,
    into: AllGradients | None = None,
) -> AllGradients:
    """(dq, dk, dv, ds_aux, dtensors) by generated kernels, contiguous, on the current stream of q's device.

    dout, out  as `out_shape` says, of any strides; lse, dlse as `forward_general` gives lse.
    options    whose expression says which tensors learn: dtensors are their gradients, in fp32.

    ds_aux is the same bits in every run; the others where `backward_cuda`'s are. Raises as it does.
    """
    tensors = [x.contiguous() for x in tensors]
    lengths = (cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k)
    if torch.are_deterministic_algorithms_enabled():
        options = Options(*options)._replace(deterministic=True)
    ragged = any(x is not None for x in lengths)
    if ragged and dout.dim() == 4:  # its rows must be evenly spaced
        dout, out = dout.contiguous(), out.contiguous()
    lse = lse.contiguous()
    if dlse is not None:
        dlse = dlse.contiguous()
    first = (dout, q, k, v, out, lse, dlse)
    keys = None if max_keys is None else 1 << (max_keys - 1).bit_length()  # few kinds
    key = (*map(signature_of, (*first, *lengths, s_aux, rng_state, *tensors)), options, keys)
    call = prepared(key, _prepare_backward, key, *first, lengths, s_aux, rng_state, tensors, Options(*options), keys)
    sinks = 0 if s_aux is None else s_aux.shape[0]
    gradients = into or (
        *call.new_gradients(q),
        q.new_empty(sinks, dtype=torch.float32),
        [x.new_empty(x.shape) for x in learning(tensors, Options(*options))],
    )
    if call.launch is None and not call.misaligned:  # no query or no key
        if ragged and s_aux is not None and q.numel():
            one_k, one_v, bounds = _keys_of_none(k, v, lengths)
            given = (dout, q, one_k, one_v, out, lse, dlse, cu_seqlens_q, bounds, seqused_q, None)
            dq, _, _, ds_aux, dtensors = backward_general(*given, s_aux, rng_state, tensors, options, max_keys)
            return dq, gradients[1].zero_(), gradients[2].zero_(), ds_aux, dtensors
        for gradient in (*gradients[:4], *gradients[4]):
            gradient.zero_()
        if s_aux is not None and dlse is not None:  # P of the sink is 1
            gradients[3].copy_(dlse.sum(dim=(0, 2)).masked_fill(torch.isneginf(s_aux), 0.0))
        return gradients
    dq, dk, dv, ds_aux, dtensors = gradients
    at = [x.data_ptr() for x in (q, k, v, out, dout, dq, dk, dv, lse)]
    at.append(address_of(dlse))
    if call.launch is None or any(address & 15 for address in (*at, address_of(rng_state))):
        options, rooms = scaled(options, q), (room_for(dq), room_for(dk), room_for(dv), ds_aux, dtensors)
        q, k, v, dout, out = (aligned(x) for x in (q, k, v, dout, out))
        lse, dlse, rng_state = (_on_16_bytes(x) for x in (lse, dlse, rng_state))
        first, further = (dout, q, k, v, out, lse, dlse), (s_aux, rng_state, tensors)
        backward_general(*first, *lengths, *further, options, max_keys, rooms)
        return cut(rooms[0], dq), cut(rooms[1], dk), cut(rooms[2], dv), ds_aux, dtensors
    of_sink = () if s_aux is None else (s_aux.data_ptr(), ds_aux.data_ptr())
    addresses = (x.data_ptr() for x in (rng_state, *tensors, *dtensors) if x is not None)
    launch_with_scratch(call, q, (*at, *(map(address_of, lengths) if ragged else ()), *of_sink, *addresses))
    return gradients


def learning(tensors: Sequence[Tensor], options: Options) -> list[Tensor]:
    """Those tensors of an expression that learn, in their order."""
    if not (expression := options.expression) or not expression.learned:
        return []
    tokens = (x.token for x in program_of(*expression[:3]).inputs if x.is_tensor)
    learned = names_of(expression.learned)
    return [x for token, x in zip(tokens, tensors, strict=True) if token in learned]


def _keys_of_none(k: Tensor, v: Tensor, lengths: Lengths) -> tuple[Tensor, Tensor, Tensor]:
    """(k, v, cu_seqlens_k) of one key, in no sequence, as kernels take no tensor without elements."""
    batch = k.shape[0] if lengths[1] is None else lengths[1].shape[0] - 1
    one_k, one_v = (x.new_zeros((1, *x.shape[-2:])) for x in (k, v))
    return one_k, one_v, torch.zeros(batch + 1, dtype=torch.int32, device=k.device)


def _on_16_bytes(x: Tensor | None) -> Tensor | None:
    return x if x is None or not x.data_ptr() & 15 else x.clone()


# Once for each signature ------------------------------------------------------------------------------------------


def _prepare(
    key: tuple[Any, ...],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Lengths,
    s_aux: Tensor | None,
    rng_state: Tensor | None,
    inputs: Sequence[Tensor],
    options: Options,
    keys: int | None,
    arch: str | None,
    tiling: Tiling | None,
) -> Call:
    """Validate a signature, that of `forward_general`; choose, load and pack its kernel."""
    kind, sequences = _kind_of(key[:3], key[3:7], key[7:])
    if known_kind(kind) is None:
        sequences = validate_general(q, k, v, lengths, s_aux, rng_state, options)
        remember_kind(kind, options)
    validate_expression(q, k, sequences, inputs, options)
    places, shape = _as_kernels_see_them(sequences, {"q": q, "k": k, "v": v})
    strides = strides_of(places)
    if strides is not None:
        strides["o"] = dense(shape.seqlen_q, shape.num_heads, v.shape[-1])
    launch = packed("fwd", q, v.shape[-1], strides, options, shape, _keys(shape, sequences, keys), arch, tiling)
    rows = (shape.num_heads, shape.seqlen_q)
    return Call(
        q.get_device(),
        out=contiguous(out_shape(q, v)),
        lse=contiguous((shape.batch, *rows) if sequences is None else rows),
        num_rows=0,
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
    s_aux: Tensor | None,
    rng_state: Tensor | None,
    inputs: Sequence[Tensor],
    options: Options,
    keys: int | None,
) -> Call:
    """`_prepare` of gradients; the signature is that of `backward_general`."""
    kind, sequences = _kind_of(key[1:4], key[7:11], (*types_of((key[0], *key[4:7])), *key[11:]))
    rows = (q.shape[0], q.shape[-2], q.shape[1]) if sequences is None else (q.shape[-2], q.shape[0])
    if kind is not None and not fit_results(rows, out_shape(q, v), sizes_of(key[:7])):
        kind = None
    if known_kind(kind) is None:
        sequences = validate_general_backward(dout, q, k, v, out, lse, dlse, lengths, s_aux, rng_state, options)
        remember_kind(kind, options)
    validate_expression(q, k, sequences, inputs, options)
    places, shape = _as_kernels_see_them(sequences, {"q": q, "k": k, "v": v, "o": out, "dout": dout})
    strides = strides_of(places)
    if strides is not None:
        strides |= {f"d{name}": dense(*places[name][0][1:]) for name in "qkv"}
    launch = packed("bwd", q, v.shape[-1], strides, options, shape, _keys(shape, sequences, keys))
    return gradients_call(q, k, v, options, shape, launch)


def _kind_of(
    tensors: Sequence[Any], lengths: Sequence[Any], others: Sequence[Any]
) -> tuple[tuple[Any, ...] | None, int | None]:
    """What calls share that differ in batch and lengths alone, of places of a signature; None where sizes may not fit
    each other. And how many sequences there are, if the batch is ragged."""
    sequences = None
    if all(x is None for x in lengths):
        fit = fit_each_other(*(x[0] for x in tensors)) and all(x[1][3] == 1 for x in tensors)
    else:
        sequences = packed_sequences(tensors, lengths)
        fit = sequences is not None
    if not fit:
        return None, sequences
    return ("general", *(x[0][-2:] for x in tensors), *types_of((*tensors, *lengths)), *others), sequences


def _as_kernels_see_them(sequences: int | None, tensors: dict[str, Tensor]) -> tuple[dict[str, Any], Shape]:
    """(sizes, strides) of (batch, rows, heads, head_dim), where sequences are counted with a batch of one; and the
    shape of the call."""
    if sequences is not None:
        places = {name: placed(x) for name, x in tensors.items()}
        return places, shape_of(sequences, places)
    q, k = tensors["q"].shape, tensors["k"].shape
    return {name: (x.shape, x.stride()) for name, x in tensors.items()}, Shape(q[0], q[1], k[1], q[2], k[2])


def _keys(shape: Shape, sequences: int | None, keys: int | None) -> int:
    """How many a sequence is taken to have, for the choice of a kernel."""
    if sequences is None:
        return shape.seqlen_k
    return shape.seqlen_k // max(sequences, 1) if keys is None else min(keys, shape.seqlen_k)
