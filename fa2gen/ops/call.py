"""From CUDA tensors to launches of both passes, quickly.

Everything that a call's signature decides (validation, the kernel, its packed arguments) is prepared, and found in a
dict from the third call on: lengths may never come again. What is wrong with a signature that differs from a right one
in lengths alone can be its lengths and strides alone: of the others it is enough that their kind is known, and to
prepare it is to pack. A call then allocates its results, replaces the addresses and launches on the current stream.
TMA and cp.async need 16-byte alignment: a tensor whose address or strides are no multiples of 16 bytes is copied, at
each call. So is one whose head dim is no multiple of 8, with zeros up to the next, which change no product; the results
of such a call are copied too, without those columns.

What a repeated call does is spelt out, as few reads of a tensor's attributes as will do (each 40 to 80 ns) and no
helper that only forwards: a tiny problem is done sooner than the host has called for it.

FA2GEN_ARCH and the specs are looked at when a kind of problem is first met; `forget` makes them be looked at again.

Options come as `Options`, or as a plain tuple of its fields, which is made in a tenth of the time and is equal to it.
"""

from __future__ import annotations

import math
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from fa2gen import env
from fa2gen.arch import ARCHES, ArchName
from fa2gen.errors import InvalidInput, StoreError
from fa2gen.gpus import device_at
from fa2gen.groups import WHOLE, Walk, walk_of, with_groups
from fa2gen.launch import (
    for_few_queries,
    page_strides,
    pages_refusal,
    reads_pages_quickly,
    row_by_row,
    suits_decoding,
    with_packed_heads,
)
from fa2gen.ops.scratch import (
    CLEARED_BYTES,
    WORK_BYTES,
    StreamScratch,
    scratch_of_capture,
    scratch_of_stream,
    zeros_of_stream,
)
from fa2gen.ops.validate import DTYPES, out_dtype, validate, validate_backward, validate_options
from fa2gen.options import CacheShape, Options, Queries, Shape
from fa2gen.plan import KernelPlan, make_plan, tiling_for_rows
from fa2gen.select import Device, kernel_arch, select, seqlen_bounds
from fa2gen.spec import HEAD_DIM_STEP, Direction, KernelSpec, Problem, Tiling

if TYPE_CHECKING:
    from fa2gen.kernel import Kernel, PreparedLaunch, Strides
    from fa2gen.store import Store

__all__ = [
    "SCRATCH_ROWS",
    "AnyOptions",
    "Call",
    "Gradients",
    "Layout",
    "address_of",
    "aligned",
    "are_aligned",
    "backward_cuda",
    "calls_for_decoding",
    "choose",
    "chosen_for",
    "contiguous",
    "cut",
    "dense",
    "fit_each_other",
    "fit_results",
    "forget",
    "forward_cuda",
    "forward_out",
    "gradients_call",
    "kernel_for_pages",
    "kernel_for_rows",
    "known_kind",
    "launch_cleared",
    "launch_with_scratch",
    "made",
    "new_tensor",
    "packed",
    "prepared",
    "remember_kind",
    "remembered",
    "room_for",
    "room_of_stream",
    "scaled",
    "scratch_for",
    "signature_of",
    "sizes_of",
    "strides_of",
    "types_of",
]

AnyOptions: TypeAlias = Options | tuple[Any, ...]
Gradients: TypeAlias = tuple[Tensor, Tensor, Tensor]
Layout: TypeAlias = tuple[tuple[int, ...], tuple[int, ...]]
"""Sizes and strides."""

_NOTHING: Layout = ((), ())


@dataclass(slots=True)  # not frozen, which takes 2 us more to make
class Call:
    """What all calls with one signature share.

    out, lse   of a forward pass's results, as `contiguous` gives them.
    num_rows   of lse.
    launch     None where there is nothing to compute, and where a stride is no multiple of 16 bytes (`misaligned`):
               such a call goes on with copies, which have a signature of their own.
    gradients  of a backward pass: those of dq, dk and dv.
    operands   the names of what a launch takes, where callers do not have them in order.
    out_dtype  of a forward pass's output, or of gradients; None: q's.
    """

    device: int
    out: Layout
    lse: Layout
    num_rows: int
    launch: PreparedLaunch | None
    misaligned: bool
    gradients: tuple[Layout, ...] = ()
    operands: tuple[str, ...] = ()
    out_dtype: torch.dtype | None = None

    def new_out(self, q: Tensor) -> Tensor:
        return new_tensor(q, self.device, self.out, self.out_dtype or q.dtype)

    def new_lse(self, q: Tensor) -> Tensor:
        return new_tensor(q, self.device, self.lse, torch.float32)

    def new_results(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """Of a forward pass: (out, lse)."""
        if _current_device() != self.device or _is_deterministic():
            return self.new_out(q), self.new_lse(q)
        return _empty_strided(*self.out, self.out_dtype or q.dtype), _empty_strided(*self.lse, torch.float32)

    def new_gradients(self, q: Tensor) -> Gradients:
        of_q, of_k, of_v = self.gradients
        dtype = self.out_dtype or q.dtype
        if _current_device() != self.device or _is_deterministic():
            dq, dk, dv = (q.new_empty(of_one[0], dtype=dtype) for of_one in self.gradients)
            return dq, dk, dv
        return _empty_strided(*of_q, dtype), _empty_strided(*of_k, dtype), _empty_strided(*of_v, dtype)


class _Chosen:
    """A kernel that was chosen, loaded when it is first needed."""

    __slots__ = ("_kernel", "_of_groups", "device", "num_sms", "plan", "target")

    def __init__(self, plan: KernelPlan, target: str, device: int) -> None:
        self.plan, self.target, self.device = plan, target, device
        self.num_sms = device_at(device).num_sms
        self._kernel: Kernel | None = None
        self._of_groups: dict[Walk, _Chosen] = {}

    def of_groups(self, shape: Shape, options: Options) -> _Chosen:
        """The same with groups of heads as these sizes want them; itself where that can not be had here."""
        groups = walk_of(self.plan, shape, options, self.num_sms)
        if groups == WHOLE:
            return self
        if groups not in self._of_groups:
            chosen = _Chosen(with_groups(self.plan, *groups), self.target, self.device)
            try:
                chosen.kernel()
            except StoreError:  # not built ahead of time, where nothing can be generated
                chosen = self
            self._of_groups[groups] = chosen
        return self._of_groups[groups]

    def kernel(self) -> Kernel:
        if self._kernel is None:
            self._kernel = _kernel(self.plan, self.target, self.device)
        return self._kernel


_REMEMBERED_CALLS = 1024
_REMEMBERED_KINDS = 1024
# What each stream keeps for an lse that is not asked for: 64 KiB. With more rows a kernel outlasts the host's call.
SCRATCH_ROWS = 1 << 14
# What each stream keeps for kernels that count: one for each multiprocessor of any GPU.
_COUNTER_BYTES = 1 << 14
# What each stream keeps beside such counters for decoding: parts of 32 rows at head dim 128, of 16 at 256. To allocate
# them at each call is 2 of its 24 microseconds.
_ROOM_BYTES = 5 << 20
# torch.cuda's functions of these names without their Python, which costs as much again; a CPU build lacks them.
_current_device = getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)
_is_capturing = getattr(torch._C, "_cuda_isCurrentStreamCapturing", torch.cuda.is_current_stream_capturing)
_is_deterministic = torch._C._get_deterministic_algorithms
# What Inductor's code allocates with: on the current device, in a third of torch.empty_like's time.
_empty_strided = torch._C._dynamo.guards._empty_strided_cuda

# In the order of their making. Ordered, as to find the first of a dict passes by all that were deleted before it.
_calls: OrderedDict[tuple[Any, ...], Call] = OrderedDict()
# Hashes of the signatures that came.
_seen: set[int] = set()
# Kinds of calls, all of their signatures but batch and lengths, that were found right -> what their options are, or
# what else they share; of dense forward calls (options, out's dtype, and the two of `_Ranges`, which are empty where
# options change with lengths). Head dims are multiples of 8.
_kinds: OrderedDict[tuple[Any, ...], Any] = OrderedDict()
_Ranges: TypeAlias = tuple[tuple[int, ...], list[_Chosen | None]]
"""The key lengths from which another kernel may be chosen, and what was chosen below the first of them, from each of
them on."""
_NO_RANGES: _Ranges = ((), [])
_problems: dict[tuple[Any, ...], _Ranges] = {}  # of a kind of problem on a device
_kernels: dict[tuple[KernelSpec, int], Kernel] = {}
_retired: list[Kernel] = []  # what `forget` dropped
_scratches: dict[tuple[int, int], StreamScratch] = {}  # (device, stream) -> what its launches use
_counters: dict[tuple[int, int], int] = {}  # (device, stream) -> memory that is zero between its launches
_rooms: dict[tuple[int, int], int] = {}  # likewise -> counters, and behind them memory of any content
_lock = threading.Lock()
_Kept = TypeVar("_Kept")


def forward_cuda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    options: AnyOptions,
    arch: str | None = None,
    tiling: Tiling | None = None,
    into: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """(out, lse) by a generated kernel, on the current stream of q's device; `into` are the buffers to use.

    out as `out_shape` and `out_dtype` say; lse (batch, heads, seqlen_q) fp32; both contiguous.

    Raises InvalidInput, UnsupportedProblem, InfeasibleSpec (for a tiling of the caller's), or what building a kernel
    raises.
    """
    call = _find(q, k, v, options, arch, tiling)
    out, lse = into or call.new_results(q)
    launch = call.launch
    if launch is None and not call.misaligned:  # no query, or no key for any
        out.zero_()
        lse.fill_(-math.inf)
        return out, lse
    q_at, k_at, v_at = q.data_ptr(), k.data_ptr(), v.data_ptr()
    if launch is None or (q_at | k_at | v_at) & 15:
        options, room = scaled(options, q), room_for(out)
        q, k, v = (aligned(x) for x in (q, k, v))
        forward_cuda(q, k, v, options, arch, tiling, (room, lse))
        return cut(room, out), lse
    _launch_forward(call, q_at, k_at, v_at, out, lse)
    return out, lse


def forward_out(q: Tensor, k: Tensor, v: Tensor, options: AnyOptions) -> Tensor:
    """`out` of `forward_cuda`, for who does not ask for lse: where it is small, no memory is allocated for it."""
    call = _find(q, k, v, options, None, None)
    q_at, k_at, v_at = q.data_ptr(), k.data_ptr(), v.data_ptr()
    if call.launch is None or (q_at | k_at | v_at) & 15 or call.num_rows > SCRATCH_ROWS:
        return forward_cuda(q, k, v, options)[0]
    out = call.new_out(q)
    _launch_forward(call, q_at, k_at, v_at, out, None)
    return out


def backward_cuda(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dlse: Tensor | None,
    options: AnyOptions,
    tiling: Tiling | None = None,
    into: Gradients | None = None,
) -> Gradients:
    """(dq, dk, dv) by generated kernels, contiguous, on the current stream of q's device.

    dout, out  as `out_shape` says, of any strides; lse, dlse (batch, heads, seqlen_q) fp32.
    into       contiguous buffers to use.

    Where options.deterministic, or torch.use_deterministic_algorithms(True), the gradients are the same bits in every
    run: dq is summed in one order. dk and dv always are. Raises as `forward_cuda` does.
    """
    if _is_deterministic():
        options = Options(*options)._replace(deterministic=True)
    lse = lse.contiguous()
    if dlse is not None:
        dlse = dlse.contiguous()
    key = (
        dout.shape, q.shape, k.shape, v.shape, out.shape, lse.shape, None if dlse is None else dlse.shape,
        dout.stride(), q.stride(), k.stride(), v.stride(), out.stride(),
        dout.dtype, q.dtype, k.dtype, v.dtype, out.dtype, lse.dtype, None if dlse is None else dlse.dtype,
        dout.get_device(), q.get_device(), k.get_device(), v.get_device(), out.get_device(), lse.get_device(),
        None if dlse is None else dlse.get_device(), options, tiling,
    )  # fmt: skip
    call = _calls.get(key) or made(key, _prepare_backward, key, dout, q, k, v, out, lse, dlse, options, tiling)
    dq, dk, dv = into or call.new_gradients(q)
    launch = call.launch
    if launch is None and not call.misaligned:  # no query or no key
        for gradient in (dq, dk, dv):
            gradient.zero_()
        return dq, dk, dv
    q_at, k_at, v_at, out_at, dout_at = q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(), dout.data_ptr()
    dq_at, dk_at, dv_at, lse_at = dq.data_ptr(), dk.data_ptr(), dv.data_ptr(), lse.data_ptr()
    dlse_at = 0 if dlse is None else dlse.data_ptr()
    if launch is None or (q_at | k_at | v_at | out_at | dout_at | dq_at | dk_at | dv_at | lse_at | dlse_at) & 15:
        options, rooms = scaled(options, q), (room_for(dq), room_for(dk), room_for(dv))
        q, k, v, dout, out = (aligned(x) for x in (q, k, v, dout, out))
        lse, dlse = (x if x is None or not x.data_ptr() & 15 else x.clone() for x in (lse, dlse))
        backward_cuda(dout, q, k, v, out, lse, dlse, options, tiling, rooms)
        return cut(rooms[0], dq), cut(rooms[1], dk), cut(rooms[2], dv)
    launch_with_scratch(call, q, (q_at, k_at, v_at, out_at, dout_at, dq_at, dk_at, dv_at, lse_at, dlse_at))
    return dq, dk, dv


def launch_with_scratch(call: Call, q: Tensor, operands: tuple[int, ...], memory: Tensor | None = None) -> None:
    """Launch on the current stream of q's device, with scratch memory of any content, the stream's if it fits, and
    counters that are zero.

    memory  the scratch, where the caller has some.
    """
    assert call.launch is not None
    if memory is None:
        stream, of_stream = scratch_for(call)
        if of_stream is not None:
            with of_stream.lock:
                call.launch(operands, of_stream.work, stream, of_stream.counter)
            return
    if _current_device() != call.device:
        with torch.cuda.device(call.device):
            launch_with_scratch(call, q, operands, memory)
        return
    stream = torch._C._cuda_getCurrentRawStream(call.device)
    size = call.launch.cleared_bytes
    # Freed for the allocator at return, when no later kernel of this stream can have started.
    scratch = q.new_empty(call.launch.scratch_bytes, dtype=torch.uint8) if memory is None else memory
    if not size:
        call.launch(operands, scratch.data_ptr(), stream)
    elif size > _COUNTER_BYTES or _is_capturing():  # a graph has its own, as it may be replayed on any stream
        zeros = q.new_zeros(size, dtype=torch.uint8)
        call.launch(operands, scratch.data_ptr(), stream, zeros.data_ptr())
    else:
        counters = _counters.get((call.device, stream)) or _first(
            _counters, zeros_of_stream, call.device, stream, _COUNTER_BYTES
        )
        call.launch(operands, scratch.data_ptr(), stream, counters)


def room_of_stream(call: Call, size: int) -> tuple[int, int, int]:
    """(stream, scratch, counters) on the call's device: the current stream's handle, the address of `size` bytes, and
    that of zeros, for a kernel that alone uses them. All 0 where they do not suffice, the stream is captured or another
    device is current."""
    assert call.launch is not None
    device = call.device
    if size > _ROOM_BYTES or call.launch.cleared_bytes > _COUNTER_BYTES:
        return 0, 0, 0
    if _current_device() != device or _is_capturing():
        return 0, 0, 0
    stream: int = torch._C._cuda_getCurrentRawStream(device)
    counters = _rooms.get((device, stream)) or _first(
        _rooms, zeros_of_stream, device, stream, _COUNTER_BYTES + _ROOM_BYTES
    )
    return stream, counters + _COUNTER_BYTES, counters


def launch_cleared(call: Call, q: Tensor, operands: tuple[int, ...]) -> None:
    """Launch on the current stream of q's device, with scratch memory of zeros that is left so: the stream's, or a
    graph's own."""
    assert call.launch is not None
    device = call.device
    if _current_device() != device:
        with torch.cuda.device(device):
            launch_cleared(call, q, operands)
        return
    stream: int = torch._C._cuda_getCurrentRawStream(device)
    counter = 0
    if call.launch.scratch_bytes:
        if _is_capturing():
            counter = scratch_of_capture(device, 0).counter
        else:
            counter = (_scratches.get((device, stream)) or _first_scratch(device, stream)).counter
    call.launch(operands, counter, stream)


def _find(q: Tensor, k: Tensor, v: Tensor, options: AnyOptions, arch: str | None, tiling: Tiling | None) -> Call:
    """What forward calls with this signature share: remembered, or prepared now."""
    key = (
        q.shape, k.shape, v.shape, q.stride(), k.stride(), v.stride(),
        q.dtype, k.dtype, v.dtype, q.get_device(), k.get_device(), v.get_device(),
        options, arch, tiling,
    )  # fmt: skip
    if (call := _calls.get(key)) is None:
        call = _prepare(key, q, k, v, options, arch, tiling)
        _remember_if_seen(key, call)
    return call


def _launch_forward(call: Call, q: int, k: int, v: int, out: Tensor, lse: Tensor | None) -> None:
    """Launch on the current stream of the call's device; an lse that nobody wants is written to the stream's scratch.

    Launches on one stream follow each other, and each leaves its counter 0: so there is one scratch for each stream. A
    captured graph may be replayed on any stream, so it zeroes one of its own, from its own memory pool.
    """
    device, launch = call.device, call.launch
    assert launch is not None
    if _current_device() != device:
        with torch.cuda.device(device):
            _launch_forward(call, q, k, v, out, lse)
        return
    stream: int = torch._C._cuda_getCurrentRawStream(device)
    counter_at, lse_at = 0, 0 if lse is None else lse.data_ptr()
    if launch.scratch_bytes or lse is None:
        if _is_capturing():
            scratch = scratch_of_capture(device, call.num_rows if lse is None else 0)
        else:
            scratch = _scratches.get((device, stream)) or _first_scratch(device, stream)
        counter_at = scratch.counter if launch.scratch_bytes else 0
        lse_at = lse_at or scratch.lse
    launch((q, k, v, out.data_ptr(), lse_at), counter_at, stream)


def scratch_for(call: Call) -> tuple[int, StreamScratch | None]:
    """(stream, scratch) on the call's device: the current stream's handle, and its scratch, whose lock a launch of
    several kernels holds; None where that does not suffice, the stream is captured or another device is current."""
    device, launch = call.device, call.launch
    assert launch is not None
    if launch.scratch_bytes > WORK_BYTES or launch.cleared_bytes > CLEARED_BYTES:
        return 0, None
    if _current_device() != device or _is_capturing():
        return 0, None
    stream: int = torch._C._cuda_getCurrentRawStream(device)
    return stream, _scratches.get((device, stream)) or _first_scratch(device, stream)


def _first_scratch(device: int, stream: int) -> StreamScratch:
    return _first(_scratches, scratch_of_stream, device, stream, SCRATCH_ROWS)


def _first(
    known: dict[tuple[int, int], _Kept], make: Callable[[int, int, int], _Kept], device: int, stream: int, size: int
) -> _Kept:
    """What a stream keeps, made now if it has none yet. It is never freed: two threads must not both make one."""
    with _lock:
        if (device, stream) not in known:
            known[device, stream] = make(device, stream, size)
        return known[device, stream]


def remembered(key: tuple[Any, ...]) -> Call | None:
    """What calls with this signature share, if there was one."""
    return _calls.get(key)


def signature_of(x: Tensor | None) -> Any:
    """What of a tensor is part of a call's signature."""
    return None if x is None else (x.shape, x.stride(), x.dtype, x.get_device())


def address_of(x: Tensor | None) -> int:
    """Of a tensor's first element; 0: there is none."""
    return 0 if x is None else x.data_ptr()


def prepared(key: tuple[Any, ...], prepare: Callable[..., Call], *arguments: Any) -> Call:
    """What calls with this signature share: remembered, or prepared now."""
    return _calls.get(key) or made(key, prepare, *arguments)


def made(key: tuple[Any, ...], prepare: Callable[..., Call], *arguments: Any) -> Call:
    """The same of a signature that is not remembered, as its caller has seen: to hash it takes 0.2 us."""
    call = prepare(*arguments)
    _remember_if_seen(key, call)
    return call


def _remember_if_seen(key: tuple[Any, ...], call: Call) -> None:
    """For the next calls with this signature, if it came before: to keep what never comes again takes 3 of the 17 us
    of new lengths."""
    if (signature := hash(key)) in _seen:
        _remember(_calls, _REMEMBERED_CALLS, key, call)
        return
    if len(_seen) >= _REMEMBERED_CALLS:
        _seen.clear()
    _seen.add(signature)


def known_kind(kind: tuple[Any, ...] | None) -> Any:
    """What was remembered of calls of a kind that was found right, of which lengths and strides fit; kind is None where
    those of this call may not."""
    return None if kind is None else _kinds.get(kind)


def remember_kind(kind: tuple[Any, ...] | None, what: Any) -> None:
    """Of a call that was found right: its options, or what else such calls share."""
    if kind is not None:
        _remember(_kinds, _REMEMBERED_KINDS, kind, what)


def _remember(known: OrderedDict[Any, Any], most: int, key: tuple[Any, ...], value: Any) -> None:
    """The oldest makes room, one at a time."""
    with _lock:
        while len(known) >= most:
            known.popitem(last=False)
        known[key] = value


def forget() -> None:
    """Drop all prepared calls: the next call selects, and asks the store, anew.

    Kernels stay loaded: a captured CUDA graph may hold one, and replaying it after an unload runs whatever lies there.
    """
    with _lock:
        _calls.clear()
        _seen.clear()
        _kinds.clear()
        _problems.clear()
        _retired.extend(_kernels.values())
        _kernels.clear()
        _store.cache_clear()


# Once for each signature ------------------------------------------------------------------------------------------


def _prepare(
    key: tuple[Any, ...],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    options: AnyOptions,
    arch: str | None,
    tiling: Tiling | None,
) -> Call:
    """Validate a signature, that of `_find`; choose, load and pack its kernel."""
    size_q, size_k, size_v, step_q, step_k, step_v = key[:6]
    strides = known = kind = None
    if fit_each_other(size_q, size_k, size_v) and (
        strides := strides_of({"q": (size_q, step_q), "k": (size_k, step_k), "v": (size_v, step_v)})
    ):
        _, _, num_heads, head_dim = size_q
        _, _, num_heads_kv, head_dim_k = size_k
        kind = ("fwd", num_heads, head_dim, num_heads_kv, head_dim_k, *size_v[2:], key[6:])
        known = _kinds.get(kind)
    if known is None:
        said = Options(*options)
        validate_options(said)
        validate(q, k, v)
        head_dims, is_same = (_whole(size_q[3]), _whole(size_v[3])), said.reduced(1, 1) is said
        ranges = _ranges("fwd", head_dims, q.dtype, said, q.get_device(), arch, tiling) if is_same else _NO_RANGES
        known = said, out_dtype(q, said), *ranges
        remember_kind(kind, known)
    said, dtype, bounds, by_range = known
    batch, seqlen_q, num_heads, _ = size_q
    _, seqlen_k, num_heads_kv, head_dim_v = size_v
    shape = Shape(batch, seqlen_q, seqlen_k, num_heads, num_heads_kv)
    row = num_heads * head_dim_v
    if strides is not None:
        strides["o"] = (seqlen_q * row, row, head_dim_v)
    if by_range and strides is not None and 0 not in shape and (chosen := by_range[bisect_right(bounds, seqlen_k)]):
        launch: PreparedLaunch | None = chosen.kernel().prepare(shape, strides, said)
    else:
        launch = packed("fwd", q, head_dim_v, strides, said, shape, seqlen_k, arch, tiling)
    return Call(
        q.get_device(),
        ((batch, seqlen_q, num_heads, head_dim_v), (seqlen_q * row, row, head_dim_v, 1)),
        ((batch, num_heads, seqlen_q), (num_heads * seqlen_q, seqlen_q, 1)),
        batch * num_heads * seqlen_q,
        launch,
        launch is None and 0 not in shape,
        out_dtype=dtype,
    )


_OF_BACKWARD = ("dout", "q", "k", "v", "o")  # in the order of its signature


def _prepare_backward(
    key: tuple[Any, ...],
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dlse: Tensor | None,
    options: AnyOptions,
    tiling: Tiling | None,
) -> Call:
    """`_prepare` of gradients; the signature is that of `backward_cuda`."""
    sizes, steps = key[:7], key[7:12]
    _, size_q, size_k, size_v, *_ = sizes
    strides = kind = None
    if (
        fit_each_other(size_q, size_k, size_v)
        and fit_results((size_q[0], size_q[2], size_q[1]), (*size_q[:3], size_v[3]), sizes)
        and (strides := strides_of(dict(zip(_OF_BACKWARD, zip(sizes, steps, strict=False), strict=True))))
    ):
        kind = ("bwd", size_q[2:], size_k[2:], size_v[2:], *key[12:])
    if (said := known_kind(kind)) is None:
        said = Options(*options)
        validate_options(said)
        validate_backward(dout, q, k, v, out, lse, dlse)
        remember_kind(kind, said)
    shape = Shape(size_q[0], size_q[1], size_k[1], size_q[2], size_k[2])
    if strides is not None:
        strides |= {"dq": dense(*size_q[1:]), "dk": dense(*size_k[1:]), "dv": dense(*size_v[1:])}
    launch = packed("bwd", q, size_v[3], strides, said, shape, shape.seqlen_k, None, tiling)
    return gradients_call(q, k, v, said, shape, launch)


def gradients_call(
    q: Tensor, k: Tensor, v: Tensor, options: Options, shape: Shape, launch: PreparedLaunch | None
) -> Call:
    """What backward calls with these tensors and options share."""
    gradients = contiguous(q.shape), contiguous(k.shape), contiguous(v.shape)
    misaligned, dtype = launch is None and 0 not in shape, out_dtype(q, options)
    return Call(q.get_device(), _NOTHING, _NOTHING, 0, launch, misaligned, gradients, out_dtype=dtype)


def fit_each_other(size_q: Sequence[int], size_k: Sequence[int], size_v: Sequence[int]) -> bool:
    """Whether dense tensors have one batch, and k and v as many rows."""
    return (
        len(size_q) == len(size_k) == len(size_v) == 4
        and size_q[0] == size_k[0] == size_v[0]
        and size_k[1] == size_v[1]
    )


def fit_results(rows: tuple[int, ...], size: tuple[int, ...], sizes: Sequence[Any]) -> bool:
    """Whether lse and dlse have these rows, and dout and out this size: sizes are those of dout, q, k, v, out, lse and
    dlse, the last maybe None."""
    of_dout, _, _, _, of_out, of_lse, of_dlse = sizes
    results_fit: bool = of_dout == of_out == size and of_lse == rows
    return results_fit and (of_dlse is None or of_dlse == rows)


def sizes_of(places: Sequence[Any]) -> list[Any]:
    """Of the places of a signature, which begin with them, or are None."""
    return [None if place is None else place[0] for place in places]


def types_of(places: Sequence[Any]) -> list[Any]:
    """Of the places of a signature, which end in dtype and device, or are None."""
    return [None if place is None else place[-2:] for place in places]


def packed(
    direction: Direction,
    q: Tensor,
    head_dim_v: int,
    strides: dict[str, Strides] | None,
    options: Options,
    shape: Shape,
    keys: int,
    arch: str | None = None,
    tiling: Tiling | None = None,
) -> PreparedLaunch | None:
    """The launch for q and all else; None where there is no query or key, or an input must be copied first.

    strides  of all its tensors, each (batch, seqlen, heads, head_dim); those of a ragged batch with a batch of one.
             None: one must be copied.
    keys     how many a sequence has, for the choice of the kernel. It is chosen in each case: what is wrong is wrong
             at any length.
    """
    head_dims = _whole(q.shape[-1]), _whole(head_dim_v)
    options = options.reduced(shape.seqlen_q, shape.seqlen_k)
    chosen = chosen_for(direction, head_dims, q.dtype, options, q.get_device(), keys, arch, tiling)
    if strides is None or 0 in shape:
        return None
    if tiling is None and direction == "bwd":
        chosen = chosen.of_groups(shape, options)
    return chosen.kernel().prepare(shape, strides, options)


def chosen_for(
    direction: Direction,
    head_dims: tuple[int, int],
    dtype: Any,
    options: Options,
    device: int,
    seqlen_k: int,
    arch: str | None = None,
    tiling: Tiling | None = None,
) -> _Chosen:
    """The kernel of reduced options. Plans are made for a range of lengths, not for each."""
    bounds, by_range = _ranges(direction, head_dims, dtype, options, device, arch, tiling)
    index = bisect_right(bounds, seqlen_k)
    if (chosen := by_range[index]) is None:
        problem = _problem(direction, head_dims, dtype, options)
        chosen = by_range[index] = _Chosen(*choose(problem, device_at(device), arch, tiling, seqlen_k), device)
    return chosen


def _ranges(
    direction: Direction,
    head_dims: tuple[int, int],
    dtype: Any,
    options: Options,
    device: int,
    arch: str | None,
    tiling: Tiling | None,
) -> _Ranges:
    """Of reduced options."""
    key = (direction, head_dims, dtype, options.kind, device, arch, tiling)
    if (known := _problems.get(key)) is None:
        family = kernel_arch(device_at(device), _family(arch, tiling))[0]
        bounds = () if tiling else seqlen_bounds(_problem(direction, head_dims, dtype, options), family)
        known = _problems.setdefault(key, (bounds, [None] * (len(bounds) + 1)))
    return known


def _problem(direction: Direction, head_dims: tuple[int, int], dtype: Any, options: Options) -> Problem:
    head_dim, head_dim_v = head_dims
    return options.problem(direction, head_dim, DTYPES[dtype], head_dim_v)


def choose(
    problem: Problem, device: Device, arch: str | None, tiling: Tiling | None, seqlen_k: int
) -> tuple[KernelPlan, str]:
    """The kernel of a problem with so many keys, and the NVRTC target to build it for."""
    family = _family(arch, tiling)
    if tiling is not None:
        spec = KernelSpec(problem=problem, tiling=tiling)
        return make_plan(spec, device.shared_memory_per_block), kernel_arch(device, family)[1]
    selection = select(problem, device, family, seqlen_k)
    return selection.plan, selection.target


def calls_for_decoding(
    device: int, batch: int, queries: int, heads: int, heads_kv: int, head_dim: int, **more: Any
) -> bool:
    """`fa2gen.launch.suits_decoding` of a call on a device."""
    on = device_at(device)
    arch = kernel_arch(on, _family(None, None))[0]
    return suits_decoding(arch, batch, queries, heads, heads_kv, head_dim, on.num_sms, **more)


def kernel_for_rows(problem: Problem, device: int, seqlen_k: int, rows: int) -> Kernel:
    """A decoding kernel for so many rows, queries times heads of a group, loaded on the device."""
    on = device_at(device)
    plan, target = choose(problem, on, None, None, seqlen_k)
    tiling = tiling_for_rows(problem, plan.tiling, rows, on.shared_memory_per_block)
    return _kernel(make_plan(KernelSpec(problem=problem, tiling=tiling)), target, device)


def kernel_for_pages(
    problem: Problem, device: int, seqlen_k: int, shape: CacheShape, strides: Mapping[str, Strides], queries: Queries
) -> tuple[Kernel, CacheShape]:
    """The kernel of a ragged batch over pages, loaded on the device, and the shape that it is launched with: what
    copies row by row, where TMA can not read pages of this size, or as far apart, or would be slow.
    """
    on = device_at(device)
    plan, target = choose(problem, on, None, None, seqlen_k)
    steps_of = {name: page_strides(shape, steps) for name, steps in strides.items()}
    if pages_refusal(plan, shape, steps_of) or not reads_pages_quickly(plan, shape):
        copying = row_by_row(plan)
        if copying is None or pages_refusal(copying, shape, steps_of):
            plan, target = choose(problem, on, "sm80", None, seqlen_k)
        else:
            plan = copying
    if queries == "even":
        plan, shape = for_few_queries(plan, shape, on.num_sms, seqlen_k)
    elif queries == "uneven":
        plan = with_packed_heads(plan, shape, on.num_sms)
    return _kernel(plan, target, device), shape


def _family(arch: str | None, tiling: Tiling | None) -> ArchName | None:
    """The kernel family that a call, or else FA2GEN_ARCH, asks for; None: the device's best."""
    if tiling is not None and arch not in (None, tiling.arch):
        raise InvalidInput(f"arch is {arch!r}, but the tiling is for {tiling.arch!r}: leave arch out")
    asked = (tiling.arch if tiling else arch) or env.arch()
    family = next((name for name in ARCHES if name == asked), None)
    if family != asked:
        raise InvalidInput(f"arch is {asked!r}; it must be one of {', '.join(ARCHES)}, or None for the device's best")
    return family


def _kernel(plan: KernelPlan, target: str, device: int) -> Kernel:
    """The kernel, loaded on the device: found, or else generated, compiled and stored now."""
    from fa2gen.kernel import Kernel

    if kernel := _kernels.get((plan.spec, device)):
        return kernel
    entry = _store().get_or_compile(plan, target)  # outside of the lock: other kernels need not wait for this compiler
    with _lock, torch.cuda.device(device):
        if (plan.spec, device) not in _kernels:  # another thread may have been quicker
            _kernels[plan.spec, device] = Kernel(plan, entry.cubin, device)
        return _kernels[plan.spec, device]


@cache
def _store() -> Store:
    from fa2gen.store import Store

    return Store()


def contiguous(shape: Sequence[int]) -> Layout:
    """Of a contiguous tensor."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return (*shape,), (*reversed(strides),)


def new_tensor(like: Tensor, device: int, layout: Layout, dtype: Any) -> Tensor:
    """A tensor of any content on the device of another, of that index; filled where torch fills those of its own."""
    if _current_device() != device or _is_deterministic():
        return like.new_empty(layout[0], dtype=dtype)
    new: Tensor = _empty_strided(*layout, dtype)
    return new


def dense(seqlen: int, heads: int, head_dim: int) -> Strides:
    """Of a contiguous tensor."""
    return seqlen * heads * head_dim, heads * head_dim, head_dim


def strides_of(places: Mapping[str, Sequence[Any]]) -> dict[str, Strides] | None:
    """All but the last, which is 1, of tensors (batch, seqlen, heads, head_dim), each (sizes, strides, ...); None where
    one is not aligned."""
    found = {}
    for name, place in places.items():
        sizes, (batch, row, head, last) = place[0], place[1]
        # Quickly where all are multiples of 16 bytes.
        if (last != 1 or (batch | row | head | sizes[3]) & 7) and not are_aligned(sizes, place[1]):
            return None
        found[name] = (batch, row, head)
    return found


def are_aligned(sizes: Sequence[int], steps: Sequence[int]) -> bool:
    """Whether rows are dense, and they and strides multiples of 16 bytes; that of a single element is not used."""
    if not steps or steps[-1] != 1 or sizes[-1] % HEAD_DIM_STEP:
        return False
    for size, step in zip(sizes[:-1], steps, strict=False):  # noqa: SIM110 (a generator takes twice as long)
        if step & 7 and size != 1:
            return False
    return True


def aligned(x: Tensor) -> Tensor:
    """A tensor with the head dim last as 16-byte loads and TMA can read it: itself, or else a copy, with columns of
    zeros up to a multiple of 8."""
    if x.data_ptr() % 16 == 0 and are_aligned(x.shape, x.stride()):
        return x
    padding = _whole(x.shape[-1]) - x.shape[-1]
    return pad(x, (0, padding)).contiguous() if padding else x.clone(memory_format=torch.contiguous_format)


def scaled(options: AnyOptions, q: Tensor) -> AnyOptions:
    """The options of a call with copies: where q is padded, with the scale of its head dim as it is before."""
    head_dim = q.shape[-1]
    if head_dim == _whole(head_dim):
        return options
    said = Options(*options)
    return said._replace(softmax_scale=said.scale(head_dim))


def room_for(result: Tensor) -> Tensor:
    """Where kernels may write a result, contiguous: itself, or a buffer whose head dim is the next multiple of 8."""
    head_dim = result.shape[-1]
    whole = _whole(head_dim)
    return result if whole == head_dim else result.new_empty((*result.shape[:-1], whole))


def cut(room: Tensor, result: Tensor) -> Tensor:
    """`result`, with what kernels wrote into the `room_for` it."""
    return result if room is result else result.copy_(room[..., : result.shape[-1]])


def _whole(head_dim: int) -> int:
    """The head dim of the kernels that serve this one."""
    return -(-head_dim // HEAD_DIM_STEP) * HEAD_DIM_STEP
