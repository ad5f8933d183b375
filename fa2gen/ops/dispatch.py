"""From CUDA tensors to a launch, quickly.

Everything that a call's signature decides (validation, the kernel, its packed arguments) is prepared once and found in
a dict afterwards; a call then allocates the outputs, replaces the addresses and launches on the current stream. TMA and
cp.async need 16-byte alignment: a tensor whose address or strides are no multiples of 16 bytes is copied, at each call.

What a repeated call does is spelt out, as few reads of a tensor's attributes as will do (each 40 to 80 ns) and no
helper that only forwards: a tiny problem is done sooner than the host has called for it.

FA2GEN_ARCH and the specs are looked at when a signature is first met; `forget` makes them be looked at again.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fa2gen import env
from fa2gen.arch import ARCHES
from fa2gen.errors import InvalidInput
from fa2gen.gpus import device_at
from fa2gen.ops.validate import DTYPES, default_scale, describe, refuse_non_tensors, validate
from fa2gen.options import Options, Shape
from fa2gen.plan import KernelPlan, make_plan
from fa2gen.select import Device, kernel_arch, select
from fa2gen.spec import KernelSpec, Problem, Tiling

if TYPE_CHECKING:
    from fa2gen.kernel import Kernel, PreparedLaunch, Strides
    from fa2gen.store import Store

__all__ = ["forget", "forward_cuda", "forward_into", "forward_out"]


@dataclass(frozen=True, slots=True)
class _Call:
    """What all calls with one signature share.

    num_rows       of lse.
    out_is_like_q  whether torch.empty_like(q), which takes two thirds of q.new_empty's time, has out's strides.
    launch         None where there is nothing to compute, and where a stride is no multiple of 16 bytes (`misaligned`):
                   such a call goes on with copies, which have a signature of their own.
    """

    device: int
    out_shape: tuple[int, ...]
    lse_shape: tuple[int, ...]
    num_rows: int
    out_is_like_q: bool
    launch: PreparedLaunch | None
    misaligned: bool

    def new_out(self, q: Tensor) -> Tensor:
        return torch.empty_like(q) if self.out_is_like_q else q.new_empty(self.out_shape)


class _Scratch:
    """Memory of a stream's launches: `counter`, an int32 that is 0 between them, and `lse`, rows that nobody reads."""

    __slots__ = ("_memory", "counter", "lse")

    def __init__(self, device: int, rows: int) -> None:
        self._memory = torch.zeros(_SCRATCH_LSE_AT // 4 + rows, dtype=torch.int32, device=f"cuda:{device}")
        self.counter = self._memory.data_ptr()
        self.lse = self.counter + _SCRATCH_LSE_AT


_REMEMBERED_CALLS = 1024
_SCRATCH_LSE_AT = 16
# What each stream keeps for an lse that is not asked for: 64 KiB. With more rows a kernel outlasts the host's call.
_SCRATCH_ROWS = 1 << 14
# torch.cuda's functions of these names without their Python, which costs as much again; a CPU build lacks them.
_current_device = getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)
_is_capturing = getattr(torch._C, "_cuda_isCurrentStreamCapturing", torch.cuda.is_current_stream_capturing)

_calls: dict[tuple[Any, ...], _Call] = {}
_kernels: dict[tuple[KernelSpec, int], Kernel] = {}
_retired: list[Kernel] = []  # what `forget` dropped
_scratches: dict[tuple[int, int], _Scratch] = {}  # (device, stream) -> what its launches use
_also_forgotten: list[Callable[[], None]] = []  # what other modules remember of calls
_lock = threading.Lock()


def forward_cuda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float | None,
    causal: bool,
    arch: str | None = None,
    tiling: Tiling | None = None,
    into: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """(out, lse) by a generated kernel, on the current stream of q's device; `into` are the buffers to use.

    softmax_scale  None: head_dim ** -0.5.

    Raises InvalidInput, UnsupportedProblem, InfeasibleSpec (for a tiling of the caller's), or what building a kernel
    raises.
    """
    call = _find(q, k, v, softmax_scale, causal, arch, tiling)
    out, lse = into or (call.new_out(q), q.new_empty(call.lse_shape, dtype=torch.float32))
    launch = call.launch
    if launch is None and not call.misaligned:  # no query, or no key for any
        out.zero_()
        lse.fill_(-math.inf)
        return out, lse
    q_at, k_at, v_at = q.data_ptr(), k.data_ptr(), v.data_ptr()
    if launch is None or (q_at | k_at | v_at) & 15:
        q, k, v = (aligned(x) for x in (q, k, v))
        return forward_cuda(q, k, v, softmax_scale, causal, arch, tiling, (out, lse))
    _launch(call, q_at, k_at, v_at, out, lse)
    return out, lse


def forward_out(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float | None, causal: bool) -> Tensor:
    """`out` of `forward_cuda`, for who does not ask for lse: where it is small, no memory is allocated for it."""
    call = _find(q, k, v, softmax_scale, causal, None, None)
    q_at, k_at, v_at = q.data_ptr(), k.data_ptr(), v.data_ptr()
    if call.launch is None or (q_at | k_at | v_at) & 15 or call.num_rows > _SCRATCH_ROWS:
        return forward_cuda(q, k, v, softmax_scale, causal)[0]
    out = call.new_out(q)
    _launch(call, q_at, k_at, v_at, out, None)
    return out


def _find(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float | None,
    causal: bool,
    arch: str | None,
    tiling: Tiling | None,
) -> _Call:
    """What calls with this signature share: remembered, or prepared now."""
    key = (
        q.shape, k.shape, v.shape, q.stride(), k.stride(), v.stride(),
        q.dtype, k.dtype, v.dtype, q.get_device(), k.get_device(), v.get_device(),
        softmax_scale, causal, arch, tiling,
    )  # fmt: skip
    call = _calls.get(key)
    if call is None:
        scale = default_scale(q) if softmax_scale is None else softmax_scale
        call = _prepare(q, k, v, scale, causal, arch, tiling)
        if len(_calls) >= _REMEMBERED_CALLS:
            _calls.clear()
        _calls[key] = call
    return call


def forward_into(
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    softmax_scale: float | None = None,
    arch: str | None = None,
    tiling: Tiling | None = None,
) -> None:
    """`attention` of CUDA tensors into the caller's buffers, of which every element is written.

    out (batch, seqlen_q, heads, head_dim) in q's dtype; lse (batch, heads, seqlen_q) fp32; both contiguous, on a
    multiple of 16 bytes. Raises as `attention` does.
    """
    refuse_non_tensors(out=out, lse=lse, q=q, k=k, v=v)
    scale = default_scale(q) if softmax_scale is None else float(softmax_scale)
    validate(q, k, v, scale)
    if not q.is_cuda:
        raise InvalidInput(f"forward_into runs CUDA kernels, but q is on {q.device}: call fa2gen.attention")
    batch, seqlen_q, num_heads, head_dim = q.shape
    for name, x, shape, dtype in (
        ("out", out, (batch, seqlen_q, num_heads, head_dim), q.dtype),
        ("lse", lse, (batch, num_heads, seqlen_q), torch.float32),
    ):
        if x.shape != shape or x.dtype != dtype or x.device != q.device:
            raise InvalidInput(f"{name} is {describe(x)}; it must be {shape} {dtype} on {q.device}")
        if not x.is_contiguous() or x.data_ptr() % 16:
            raise InvalidInput(
                f"{name} has strides {tuple(x.stride())} and lies at {x.data_ptr():#x}; "
                "it must be contiguous and lie on a multiple of 16 bytes: use a fresh tensor"
            )
    forward_cuda(q, k, v, scale, bool(causal), arch, tiling, (out, lse))


def forget() -> None:
    """Drop all prepared calls: the next call selects, and asks the store, anew.

    Kernels stay loaded: a captured CUDA graph may hold one, and replaying it after an unload runs whatever lies there.
    """
    with _lock:
        _calls.clear()
        _retired.extend(_kernels.values())
        _kernels.clear()
        _store.cache_clear()
        for clear in _also_forgotten:
            clear()


def _launch(call: _Call, q: int, k: int, v: int, out: Tensor, lse: Tensor | None) -> None:
    """Launch on the current stream of the call's device; an lse that nobody wants is written to the stream's scratch.

    Launches on one stream follow each other, and each leaves its counter 0: so there is one scratch for each stream. A
    captured graph may be replayed on any stream, so it zeroes one of its own, from its own memory pool.
    """
    device, launch = call.device, call.launch
    assert launch is not None
    if _current_device() != device:
        with torch.cuda.device(device):
            _launch(call, q, k, v, out, lse)
        return
    stream: int = torch._C._cuda_getCurrentRawStream(device)
    counter_at, lse_at = 0, 0 if lse is None else lse.data_ptr()
    if launch.scratch_bytes or lse is None:
        if _is_capturing():
            scratch = _Scratch(device, call.num_rows if lse is None else 0)
        else:
            scratch = _scratches.get((device, stream)) or _first_scratch(device, stream)
        counter_at = scratch.counter if launch.scratch_bytes else 0
        lse_at = lse_at or scratch.lse
    launch((q, k, v, out.data_ptr(), lse_at), counter_at, stream)


def _first_scratch(device: int, stream: int) -> _Scratch:
    return _scratches.setdefault((device, stream), _Scratch(device, _SCRATCH_ROWS))  # another thread may be quicker


# Once for each signature ------------------------------------------------------------------------------------------


def _prepare(
    q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, causal: bool, arch: str | None, tiling: Tiling | None
) -> _Call:
    """Validate a signature; choose, load and pack its kernel."""
    validate(q, k, v, softmax_scale)
    batch, seqlen_q, num_heads, head_dim = q.shape
    device = q.get_device()
    problem = Options(softmax_scale, causal).problem("fwd", head_dim, DTYPES[q.dtype])
    plan, target = _choose(
        problem, device_at(device), arch, tiling, k.shape[1]
    )  # even for no query: wrong is wrong at any length
    launch, misaligned = None, False
    dense = (seqlen_q * num_heads * head_dim, num_heads * head_dim, head_dim, 1)
    if q.numel() and k.numel():
        misaligned = not all(_has_aligned_strides(x) for x in (q, k, v))
        if not misaligned:
            launch = _kernel(plan, target, device).prepare(
                Shape(batch, seqlen_q, k.shape[1], num_heads, k.shape[2]),
                {"q": _strides(q), "k": _strides(k), "v": _strides(v), "o": dense[:3]},
                Options(softmax_scale, causal),
            )
    return _Call(
        device=device,
        out_shape=(batch, seqlen_q, num_heads, head_dim),
        lse_shape=(batch, num_heads, seqlen_q),
        num_rows=batch * num_heads * seqlen_q,
        out_is_like_q=q.stride() == dense,
        launch=launch,
        misaligned=misaligned,
    )


def _choose(
    problem: Problem, device: Device, arch: str | None, tiling: Tiling | None, seqlen_k: int
) -> tuple[KernelPlan, str]:
    """The kernel of a problem with so many keys, and the NVRTC target to build it for."""
    if tiling is not None and arch not in (None, tiling.arch):
        raise InvalidInput(f"arch is {arch!r}, but the tiling is for {tiling.arch!r}: leave arch out")
    asked = (tiling.arch if tiling else arch) or env.arch()
    family = next((name for name in ARCHES if name == asked), None)
    if family != asked:
        raise InvalidInput(f"arch is {asked!r}; it must be one of {', '.join(ARCHES)}, or None for the device's best")
    if tiling is not None:
        return make_plan(KernelSpec(problem=problem, tiling=tiling)), kernel_arch(device, family)[1]
    selection = select(problem, device, family, seqlen_k)
    return selection.plan, selection.target


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


def _strides(x: Tensor) -> Strides:
    batch, row, head, _ = x.stride()
    return batch, row, head


def _has_aligned_strides(x: Tensor) -> bool:
    """Whether the strides of (batch, seqlen, heads) are multiples of 16 bytes; that of a single element is not used."""
    return all(size == 1 or stride % 8 == 0 for size, stride in zip(x.shape[:3], x.stride()[:3], strict=True))


def aligned(x: Tensor) -> Tensor:
    """A (batch, seqlen, heads, head_dim) tensor as 16-byte loads and TMA can read it: itself, or else a copy."""
    if x.data_ptr() % 16 == 0 and x.dim() == 4 and x.stride(3) == 1 and _has_aligned_strides(x):
        return x
    return x.clone(memory_format=torch.contiguous_format)
