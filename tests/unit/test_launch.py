"""Launching without a GPU: Params as C++ lays it out, the driver calls, and what is prepared once a signature."""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import shutil
import struct
import subprocess
import sys
import threading
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fa2gen.arch import ARCHES
from fa2gen.errors import InvalidInput, UnsupportedProblem
from fa2gen.ops import attention, flash_attn_func, flash_attn_varlen_func
from fa2gen.ops import call as calls
from fa2gen.ops.general import backward_general, forward_general
from fa2gen.ops.ragged import backward_ragged, forward_ragged, forward_ragged_out
from fa2gen.ops.scratch import CLEARED_BYTES, scratch_of_capture
from fa2gen.ops.validate import LENGTHS
from fa2gen.options import Expression, Options
from fa2gen.plan import make_plan
from fa2gen.reference import (
    attention_backward_ragged,
    attention_backward_tiled,
    attention_ragged,
    attention_tiled,
    check,
    check_gradients,
    sink_gradient,
)
from fa2gen.select import Device, default_tiling
from fa2gen.spec import KernelSpec, Problem, Tiling

HERE = Path(__file__).resolve().parent


# Params -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", ["full", "causal"])
@pytest.mark.parametrize("arch", list(ARCHES))
def test_params_are_packed_as_cuda_lays_them_out(arch, mask):
    """NVRTC itself checks size and every offset of the struct against Python's format."""
    from cuda.core import Program, ProgramOptions

    problem = Problem(head_dim=64, mask=mask)
    plan = make_plan(KernelSpec(problem=problem, tiling=default_tiling(problem, arch)))
    offsets, end = {}, 0
    for param in plan.params:
        offsets[param.name] = end
        end += struct.calcsize(f"<{param.code}")
    source = "\n".join(
        [
            "using int64_t = long long;",
            "struct Params {",
            *(f"    {param.ctype} {param.name};" for param in plan.params),
            "};",
            f"static_assert(sizeof(Params) == {struct.calcsize(plan.params_format)});",
            # NVRTC has no offsetof; this is what the front end's own expands to.
            *(f"static_assert(__INTADDR__(&((Params*)0)->{name}) == {at});" for name, at in offsets.items()),
            'extern "C" __global__ void k(const __grid_constant__ Params p) {}',
        ]
    )
    Program(source, "c++", ProgramOptions(arch="sm_80", std="c++17")).compile("cubin")


# The driver -------------------------------------------------------------------------------------------------------


def test_driver_calls(tmp_path):
    """launch_on_fake_driver.py against a driver that only remembers, in a process of its own."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("the fake driver needs a C compiler")
    library = tmp_path / "libcuda.so.1"
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-w", "-o", library, HERE / "fake_libcuda.c", "-ldl"], check=True, timeout=60
    )
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", HERE / "launch_on_fake_driver.py"],
        env={**os.environ, "LD_LIBRARY_PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_without_a_driver_loading_fails_at_once():
    """Twice, since cuda.core's own get_kernel hangs the second time; in a new process, with a time limit."""
    code = (
        "import sys\n"
        "from cuda.core import Device\n"
        "try: Device(0)\n"
        "except Exception: pass\n"
        "else: sys.exit(77)\n"
        "from fa2gen.errors import Fa2GenError\n"
        "from fa2gen.kernel import Kernel\n"
        "from fa2gen.plan import make_plan\n"
        "from fa2gen.spec import KernelSpec\n"
        "plan = make_plan(KernelSpec.from_name('fa2_fwd_sm90_bf16_d128_m128_n128_s2_w8'))\n"
        "for _ in range(2):\n"
        "    try: Kernel(plan, b'', 0)\n"
        "    except Fa2GenError as error: assert 'no CUDA device 0' in str(error), error\n"
        "    else: sys.exit(1)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    if done.returncode == 77:
        pytest.skip("there is a driver here")
    assert done.returncode == 0, done.stderr


# Dispatch, with a kernel that only remembers ----------------------------------------------------------------------


class FakeKernel:
    """prepared: (shape, strides, options) of each signature; launched: (addresses..., scratch, stream) of each call;
    cleared: likewise the address of zeros."""

    def __init__(self, plan):
        self.plan = plan
        self.scratch_bytes = 4 if plan.scratch else 0
        self.scratch_cleared = all(one.cleared for one in plan.scratch)
        self.cleared_bytes = (
            CLEARED_BYTES if any(one.cleared for one in plan.scratch) and not self.scratch_cleared else 0
        )
        self.prepared = []
        self.launched, self.cleared = [], []

    def prepare(self, shape, strides, options):
        self.strides = strides
        self.prepared.append((shape, strides, options))
        return self

    def resized(self, shape, options):
        rows = dict.fromkeys(("k", "v", "dk", "dv"), shape.seqlen_k)
        strides = {name: (rows.get(name, shape.seqlen_q) * x[1], *x[1:]) for name, x in self.strides.items()}
        return self.prepare(shape, strides, options)

    def __call__(self, operands, scratch, stream, cleared=0):
        self.launched.append((*operands, scratch, stream))
        self.cleared.append(cleared)


class Everything(set):
    """As if each signature had come before, so that the first call is remembered."""

    def __contains__(self, signature):
        return True


@pytest.fixture
def gpu(monkeypatch):
    """CPU tensors pretend to be on an H200 with index -1, which is what their get_device() says."""
    state = SimpleNamespace(kernels={}, capturing=False, stream=5, guarded=0)
    h200 = Device(name="H200", compute_capability=(9, 0), shared_memory_per_block=232_448, num_sms=132)

    def kernel(plan, target, device):
        state.target = target
        return state.kernels.setdefault(plan.name, FakeKernel(plan))

    zeros = torch.zeros
    monkeypatch.setattr(calls, "device_at", lambda index: h200)
    monkeypatch.setattr(calls, "_kernel", kernel)
    monkeypatch.setattr(calls, "_calls", OrderedDict())
    monkeypatch.setattr(calls, "_seen", Everything())
    monkeypatch.setattr(calls, "_kinds", OrderedDict())
    monkeypatch.setattr(calls, "_problems", {})
    monkeypatch.setattr(calls, "_scratches", {})
    monkeypatch.setattr(calls, "scratch_of_stream", lambda device, stream, rows: scratch_of_capture(device, rows))
    monkeypatch.setattr(calls, "_counters", {})
    monkeypatch.setattr(calls, "zeros_of_stream", lambda device, stream, size: scratch_of_capture(device, size).counter)
    monkeypatch.setattr(calls, "_current_device", lambda: -1)
    monkeypatch.setattr(calls, "_empty_strided", torch._C._dynamo.guards._empty_strided_cpu)
    monkeypatch.setattr(calls, "_is_capturing", lambda: state.capturing)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: state.stream, raising=False)
    monkeypatch.setattr(torch, "zeros", lambda *shape, device=None, **options: zeros(*shape, **options))
    monkeypatch.delenv("FA2GEN_ARCH", raising=False)
    return state


def forget_calls():
    calls._calls.clear()
    calls._kinds.clear()
    calls._problems.clear()


def tensors(batch=2, seqlen_q=37, seqlen_k=53, heads=6, heads_kv=2, head_dim=64):
    return tuple(
        torch.randn(batch, seqlen, n, head_dim).to(torch.bfloat16)
        for seqlen, n in ((seqlen_q, heads), (seqlen_k, heads_kv), (seqlen_k, heads_kv))
    )


def only(state):
    (kernel,) = state.kernels.values()
    return kernel


def test_a_signature_is_prepared_twice(gpu, monkeypatch):
    """At the first call, and at the second, from which on it is remembered."""
    monkeypatch.setattr(calls, "_seen", set())
    for _ in range(4):
        q, k, v = tensors()
        out, lse = calls.forward_cuda(q, k, v, Options(0.1, True))
        assert only(gpu).launched[-1][:5] == tuple(x.data_ptr() for x in (q, k, v, out, lse))
    assert len(only(gpu).prepared) == 2 and len(only(gpu).launched) == 4
    shape, strides, options = only(gpu).prepared[0]
    assert only(gpu).prepared[1] == (shape, strides, options)
    assert shape == (2, 37, 53, 6, 2) and options == Options(0.1, True)
    assert strides["q"] == strides["o"] == (37 * 6 * 64, 6 * 64, 64)


def test_whatever_changes_the_launch_is_part_of_the_signature(gpu):
    q, k, v = tensors()
    transposed = q.transpose(1, 2).contiguous().transpose(1, 2)
    every = [
        lambda: calls.forward_cuda(q, k, v, Options(0.1, True)),
        lambda: calls.forward_cuda(q, k, v, Options(0.2, True)),
        lambda: calls.forward_cuda(q, k, v, Options(0.1, False)),
        lambda: calls.forward_cuda(transposed, k, v, Options(0.1, True)),
        lambda: calls.forward_cuda(q[:, :30], k, v, Options(0.1, True)),
        lambda: calls.forward_cuda(q, k[:, :30], v[:, :30], Options(0.1, True)),
        lambda: calls.forward_cuda(q, k[:, :, :1], v[:, :, :1], Options(0.1, True)),
        lambda: calls.forward_cuda(q.half(), k.half(), v.half(), Options(0.1, True)),
        lambda: calls.forward_cuda(q, k, v, Options(0.1, True), "sm80"),
    ]
    for call in [*every, *every]:
        call()
    assert sum(len(kernel.prepared) for kernel in gpu.kernels.values()) == len(every)


def test_prepared_calls_are_bounded(gpu, monkeypatch):
    monkeypatch.setattr(calls, "_REMEMBERED_CALLS", 8)
    monkeypatch.setattr(calls, "_seen", set())

    def call(seqlen):
        calls.forward_cuda(*tensors(seqlen_q=seqlen), Options(0.1, True))
        assert len(calls._calls) <= 8 and len(calls._seen) <= 8

    for seqlen in range(1, 40):
        call(seqlen)
    assert not calls._calls  # none came again
    for seqlen in range(1, 40):
        call(seqlen)
        call(seqlen)
    assert len(calls._calls) == 8 and len(only(gpu).prepared) == 3 * 39
    for seqlen in range(39, 31, -1):  # the newest are there still
        call(seqlen)
    assert len(only(gpu).prepared) == 3 * 39


def gradients_of(q, k, v, options, **changes):
    """`backward_cuda` of what a forward pass gives, some of it changed."""
    out, lse = calls.forward_cuda(q, k, v, options)
    given = {"dout": torch.zeros_like(out), "q": q, "k": k, "v": v, "out": out, "lse": lse, "dlse": None} | changes
    return calls.backward_cuda(*given.values(), options)


@pytest.mark.parametrize("said", [{"causal": True}, {"window_left": 100, "window_right": 30}, {"chunk": 700}], ids=str)
def test_other_lengths_of_a_known_kind_are_prepared_as_if_they_were_the_first(gpu, said):
    """In whatever order they come: the kernel, its options, sizes and strides are those of these lengths."""
    options = Options(0.1, **said)

    def prepared(seqlens):
        for kernel in gpu.kernels.values():
            kernel.prepared.clear()
        gradients_of(*tensors(1 + seqlens[0] % 3, *seqlens, head_dim=128), options)
        return {name: [*kernel.prepared] for name, kernel in gpu.kernels.items() if kernel.prepared}

    lengths = [(300, 300), (1, 9000), (64, 64), (9000, 1), (33, 700), (700, 33), (20, 20), (2000, 5000)]
    in_turn = [prepared(seqlens) for seqlens in lengths]
    for seqlens, found in reversed([*zip(lengths, in_turn, strict=True)]):
        forget_calls()
        assert prepared(seqlens) == found and len(found) == 2


def test_what_is_wrong_with_another_call_of_a_known_kind(gpu):
    """Batch, lengths and strides are looked at in each; a head dim, dtype or scale makes another kind."""
    q, k, v = tensors()
    options = Options(0.1, True)
    gradients_of(q, k, v, options)
    forward = lambda *given: calls.forward_cuda(*given, options)  # noqa: E731
    for wrong in (
        (q[:1], k, v),
        (q, k[:1], v),
        (q, k, v[:1]),
        (q, k[:, :9], v),
        (q[0], k[0], v[0]),
        (q, k, v[..., ::2]),
    ):
        with pytest.raises((InvalidInput, UnsupportedProblem)):
            forward(*wrong)
    with pytest.raises(InvalidInput, match=r"stride\(-1\)"):
        forward(torch.cat((q, q), -1)[..., ::2], k, v)
    with pytest.raises(InvalidInput, match="softmax_scale"):
        calls.forward_cuda(q, k, v, Options(math.nan, True))
    for name, wrong in {
        "dout": torch.zeros_like(q[:, :9]),
        "out": torch.zeros_like(q[:1]),
        "lse": torch.zeros(2, 6, 36),
        "dlse": torch.zeros(2, 37, 6),
    }.items():
        with pytest.raises(InvalidInput, match=f"^{name} is"):
            gradients_of(q, k, v, options, **{name: wrong})
    launched = len(gpu.kernels)
    forward(torch.cat((q, q[..., :4]), -1)[..., :64], k, v)  # rows 68 elements apart
    assert len(gpu.kernels) == launched
    assert next(iter(gpu.kernels.values())).launched[-1][0] != q.data_ptr()


def test_misaligned_tensors_are_copied(gpu):
    q, k, v = tensors()
    odd_rows = torch.randn(2, 37, 6 * 64 + 1).to(torch.bfloat16)[..., :-1].unflatten(2, (6, 64))  # strides
    buffer = torch.randn(k.numel() + 1).to(torch.bfloat16)
    odd_base = buffer[1:].view(k.shape)  # address
    for a, b in ((odd_rows, k), (q, odd_base), (odd_rows, odd_base)):
        gpu.kernels.clear()
        forget_calls()
        for _ in range(2):
            out, lse = calls.forward_cuda(a, b, v, Options(0.1, False))
            launched = only(gpu).launched[-1]
            assert all(address % 16 == 0 for address in launched[:3])
            assert launched[2] == v.data_ptr() and launched[3:5] == (out.data_ptr(), lse.data_ptr())
        assert len(only(gpu).launched) == 2


@pytest.mark.parametrize(
    "sizes", [{"seqlen_q": 0}, {"seqlen_k": 0}, {"batch": 0}, {"heads": 0, "heads_kv": 0}], ids=str
)
def test_nothing_is_launched_where_there_is_nothing_to_compute(gpu, sizes):
    q, k, v = tensors(**sizes)
    out, lse = calls.forward_cuda(q, k, v, Options(0.1, True))
    assert not gpu.kernels and out.shape == q.shape and not out.any() and lse.isneginf().all()


def test_each_stream_has_a_counter_and_each_captured_call_its_own(gpu):
    q, k, v = tensors()

    def counter():
        calls.forward_cuda(q, k, v, Options(0.1, True))
        return only(gpu).launched[-1][5]

    first = counter()
    assert first and counter() == first and only(gpu).launched[-1][6] == 5
    gpu.stream = 6
    assert counter() != first
    kept = len(calls._scratches)
    gpu.capturing = True
    assert counter() not in (0, first) and len(calls._scratches) == kept == 2


def test_out_alone_is_that_of_the_whole_call(gpu, monkeypatch):
    """Its lse goes to memory of the stream that no tensor has; where that is too small, to fresh memory."""
    q, k, v = tensors()
    for arch in ("sm90", "sm80"):
        if arch == "sm80":
            gpu.kernels.clear()
            forget_calls()
            monkeypatch.setenv("FA2GEN_ARCH", "sm80")
        out = calls.forward_out(q, k, v, Options(0.1, True))
        *addresses, lse, counter, stream = only(gpu).launched[-1]
        assert addresses == [x.data_ptr() for x in (q, k, v, out)] and out.shape == q.shape and out.is_contiguous()
        scratch = calls._scratches[-1, 5]
        assert (lse, counter, stream) == (scratch.lse, scratch.counter if arch == "sm90" else 0, 5)
        assert scratch.lse % 16 == 0 and scratch.lse >= scratch.counter + 4
        assert scratch.lse + 4 * calls.SCRATCH_ROWS <= scratch._keeper.data_ptr() + scratch._keeper.nbytes
    assert len(only(gpu).prepared) == 1 and len(calls._scratches) == 1


def test_out_alone_of_many_rows_has_an_lse_of_its_own(gpu, monkeypatch):
    q, k, v = tensors()
    monkeypatch.setattr(calls, "SCRATCH_ROWS", 2 * 6 * 37)
    calls.forward_out(q, k, v, Options(0.1, True))
    scratch = calls._scratches[-1, 5]
    assert only(gpu).launched[-1][4] == scratch.lse
    monkeypatch.setattr(calls, "SCRATCH_ROWS", 2 * 6 * 37 - 1)
    calls.forward_out(q, k, v, Options(0.1, True))
    assert only(gpu).launched[-1][4] != scratch.lse


def test_a_captured_call_shares_no_memory_with_a_stream(gpu, monkeypatch):
    q, k, v = tensors()
    calls.forward_out(q, k, v, Options(0.1, True))
    kept = calls._scratches[-1, 5]
    made = []
    new = calls.scratch_of_capture
    monkeypatch.setattr(calls, "scratch_of_capture", lambda *which: made.append(new(*which)) or made[-1])
    gpu.capturing = True
    calls.forward_out(q, k, v, Options(0.1, True))
    (own,) = made
    assert only(gpu).launched[-1][4:6] == (own.lse, own.counter) != (kept.lse, kept.counter)
    assert own._keeper.nbytes == CLEARED_BYTES + 4 * 2 * 6 * 37 and len(calls._scratches) == 1
    _, lse = calls.forward_cuda(q, k, v, Options(0.1, True))
    assert only(gpu).launched[-1][4] == lse.data_ptr() and made[-1]._keeper.nbytes == CLEARED_BYTES


def test_out_alone_of_what_needs_more_than_a_launch(gpu):
    q, k, v = tensors()
    odd_base = torch.cat((k.flatten(), k.flatten()))[1 : 1 + k.numel()].view(k.shape)
    calls.forward_out(q, odd_base, v, Options(0.1, False))
    assert all(address % 16 == 0 for address in only(gpu).launched[-1][:3])
    assert only(gpu).launched[-1][1] != odd_base.data_ptr()
    assert not calls.forward_out(q, k[:, :0], v[:, :0], Options(0.1, True)).any() and len(only(gpu).launched) == 1


@pytest.mark.parametrize("layout", ["dense", "transposed", "slice", "one row", "expanded"])
def test_out_is_contiguous_whatever_q_is(gpu, layout):
    """Down to the strides of single elements."""
    q, k, v = tensors(seqlen_q=1 if layout == "one row" else 37)
    if layout == "transposed":
        q = q.transpose(1, 2).contiguous().transpose(1, 2)
    elif layout == "slice":
        q = torch.stack((q, q, q), 2)[:, :, 1]
    elif layout == "one row":  # contiguous to torch, with strides that no fresh tensor has
        q = torch.stack((q, q), 1)[:, 1]
        assert q[:1].is_contiguous()
        q, k, v = q[:1], k[:1], v[:1]
    elif layout == "expanded":
        q = q[:1].expand(2, -1, -1, -1)
    for out in (calls.forward_cuda(q, k, v, Options(0.1, True))[0], calls.forward_out(q, k, v, Options(0.1, True))):
        assert out.stride() == torch.empty(q.shape).stride() and (out.shape, out.dtype) == (q.shape, q.dtype)


def test_the_default_scale_is_prepared_as_the_number_it_is(gpu):
    q, k, v = tensors()
    for scale in (None, 64**-0.5):
        calls.forward_out(q, k, v, Options(scale, True))
        assert only(gpu).prepared[-1][2].scale(64) == 64**-0.5


def test_another_device_is_made_current_for_the_launch(gpu, monkeypatch):
    current = [3]

    @contextlib.contextmanager
    def guard(device):
        before, current[0] = current[0], device
        gpu.guarded += 1
        yield
        current[0] = before

    monkeypatch.setattr(calls, "_current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "device", guard)
    q, k, v = tensors()
    for number, call in enumerate((calls.forward_cuda, calls.forward_out), 1):
        call(q, k, v, Options(0.1, True))
        assert (gpu.guarded, current, len(only(gpu).launched)) == (number, [3], number)
        assert only(gpu).launched[-1][5] == calls._scratches[-1, 5].counter


def test_sm80_kernels_need_no_counter(gpu):
    calls.forward_cuda(*tensors(), Options(0.1, True), "sm80")
    assert only(gpu).launched[-1][5] == 0 and gpu.target == "sm_90"


def test_choice_of_the_kernel(gpu, monkeypatch):
    q, k, v = tensors()
    tiling = default_tiling(Problem(head_dim=64), "sm80")

    def arch(*choice):
        gpu.kernels.clear()
        forget_calls()
        calls.forward_cuda(q, k, v, Options(0.1, False), *choice)
        return only(gpu).plan.arch

    assert arch() == "sm90"
    assert arch("sm80") == arch(None, tiling) == arch("sm80", tiling) == "sm80"
    monkeypatch.setenv("FA2GEN_ARCH", "sm80")
    assert arch() == "sm80" and arch("sm90") == "sm90"
    with pytest.raises(InvalidInput, match=r"'sm90'.*'sm80'.*leave arch out"):
        arch("sm90", tiling)
    with pytest.raises(InvalidInput, match=r"'sm70'.*sm80, sm90"):
        arch("sm70")


def test_other_gpus_are_refused(gpu, monkeypatch):
    for capability in ((7, 5), (10, 0), (12, 0)):
        monkeypatch.setattr(calls, "device_at", lambda index, cc=capability: Device("Some GPU", cc, 101_376, 80))
        for sizes in ({}, {"seqlen_q": 0}):
            with pytest.raises(UnsupportedProblem, match=r"Some GPU.*8\.0.*9\.0"):
                calls.forward_cuda(*tensors(**sizes), Options(0.1, False))


def test_errors_are_not_remembered(gpu):
    q, k, v = tensors()
    for _ in range(2):
        with pytest.raises(InvalidInput, match="heads"):
            calls.forward_cuda(q[:, :, :5], k, v, Options(0.1, False))
    assert not calls._calls


# Ragged batches ---------------------------------------------------------------------------------------------------


def ragged_tensors(total_q=37, total_k=53, head_dim=64):
    """q, k, v, and the four lengths of two sequences."""
    q, k, v = (x[0] for x in tensors(1, total_q, total_k, head_dim=head_dim))
    lengths = [torch.tensor(x, dtype=torch.int32) for x in ([0, 20, 37], [0, 13, 50], [20, 11], [13, 37])]
    return q, k, v, *lengths


RAGGED = Options(0.1, True, varlen=True)


def test_a_ragged_call_is_launched_without_a_look_at_its_lengths(gpu):
    for _ in range(3):
        arguments = ragged_tensors()
        out, lse = forward_ragged(*arguments, RAGGED)
        q, k, v, *lengths = arguments
        assert only(gpu).launched[-1][:9] == tuple(x.data_ptr() for x in (q, k, v, out, lse, *lengths))
    assert len(only(gpu).prepared) == 1 and only(gpu).plan.varlen
    assert [operand.name for operand in only(gpu).plan.operands[5:]] == list(LENGTHS)
    shape, strides, options = only(gpu).prepared[0]
    assert shape == (2, 37, 53, 6, 2) and options == RAGGED and lse.shape == (6, 37)
    assert strides["q"][1:] == strides["o"][1:] == (6 * 64, 64)
    forward_ragged(*arguments[:5], None, None, RAGGED)
    assert only(gpu).launched[-1][7:9] == (0, 0) and len(only(gpu).prepared) == 2


def test_arch_and_tiling_of_a_ragged_call(cuda):
    """Through `attention`, as of a dense one; with what goes beside lengths too."""
    q, k, v, *lengths = ragged_tensors()
    named = dict(zip(LENGTHS, lengths, strict=True))
    tiling = Tiling(arch="sm80", tile_m=64, tile_n=32, num_mma_warps=4)
    out, lse = attention(q, k, v, arch="sm80", **named)
    attention(q, k, v, tiling=tiling, **named)
    attention(q, k, v, tiling=tiling, s_aux=torch.zeros(6), **named)
    selected, given, with_sinks = cuda.kernels.values()
    assert selected.launched[-1][:9] == tuple(x.data_ptr() for x in (q, k, v, out, lse, *lengths))
    assert all(kernel.plan.arch == "sm80" and kernel.plan.varlen for kernel in (selected, given, with_sinks))
    assert given.plan.tiling == with_sinks.plan.tiling == tiling and with_sinks.plan.sink
    with pytest.raises(InvalidInput, match=r"q has 4 dimensions.*\(total_q, heads, head_dim\)"):
        attention(q[None], k, v, arch="sm80", **named)


def test_a_ragged_call_uses_the_scratch_of_its_stream(gpu, monkeypatch):
    """Under a lock, as two kernels follow each other there. A captured call and one with long lists have their own."""
    arguments = ragged_tensors()
    locked = []
    launch = FakeKernel.__call__
    monkeypatch.setattr(FakeKernel, "__call__", lambda self, *given: (locked.append(in_use()), launch(self, *given)))

    def in_use():
        return [scratch.lock.locked() for scratch in calls._scratches.values()]

    forward_ragged(*arguments, RAGGED)
    scratch = calls._scratches[-1, 5]
    assert only(gpu).launched[-1][9] == scratch.work and locked == [[True]] and in_use() == [False]
    assert only(gpu).cleared[-1] == scratch.counter
    assert scratch.work % 128 == scratch.counter % 128 and scratch.work >= scratch.lse + 4 * calls.SCRATCH_ROWS
    forward_ragged_out(*arguments[:3], arguments[3:], RAGGED, None)
    assert only(gpu).launched[-1][4] == scratch.lse and only(gpu).launched[-1][9] == scratch.work
    gpu.capturing = True
    for _ in range(2):
        forward_ragged_out(*arguments[:3], arguments[3:], RAGGED, None)
        assert not {scratch.lse, scratch.work} & {*only(gpu).launched[-1]}
    gpu.capturing = False
    monkeypatch.setattr(calls, "WORK_BYTES", only(gpu).scratch_bytes - 1)
    _, lse = forward_ragged(*arguments, RAGGED)
    assert only(gpu).launched[-1][4] == lse.data_ptr() and only(gpu).launched[-1][9] != scratch.work
    assert only(gpu).cleared[-1] == calls._counters[-1, 5]


def test_gradients_of_small_problems_use_the_scratch_of_their_stream(gpu, monkeypatch):
    """Under a lock, as three kernels follow each other there. A captured call and a larger one have their own."""
    q, k, v = tensors()
    out, lse = calls.forward_cuda(q, k, v, Options(0.1, True))
    locked = []
    launch = FakeKernel.__call__
    monkeypatch.setattr(
        FakeKernel,
        "__call__",
        lambda self, *given: (locked.append(calls._scratches[-1, 5].lock.locked()), launch(self, *given)),
    )

    def scratch():
        calls.backward_cuda(torch.zeros_like(out), q, k, v, out, lse, None, Options(0.1, True))
        *_, kernel = gpu.kernels.values()
        return kernel.launched[-1][-2]

    work = calls._scratches[-1, 5].work
    assert scratch() == work and locked == [True]
    gpu.capturing = True
    assert scratch() != work
    gpu.capturing = False
    monkeypatch.setattr(calls, "WORK_BYTES", 3)
    assert scratch() != work and locked == [True, False, False]


def test_ragged_gradients_are_launched(gpu):
    q, k, v, *lengths = ragged_tensors()
    out, lse = forward_ragged(q, k, v, *lengths, RAGGED)
    for dlse in (None, torch.randn_like(lse)):
        gpu.kernels.clear()
        forget_calls()
        dout = torch.randn(6, 37, 64).to(q.dtype).transpose(0, 1)
        gradients = backward_ragged(dout, q, k, v, out, lse, dlse, *lengths, RAGGED)
        given = (q, k, v, out, dout, *gradients, lse)
        expected = [*(x.data_ptr() for x in given), 0 if dlse is None else dlse.data_ptr()]
        assert [*only(gpu).launched[-1][:14]] == [*expected, *(x.data_ptr() for x in lengths)]
        assert all(x.is_contiguous() and x.shape == y.shape for x, y in zip(gradients, (q, k, v), strict=True))
        assert only(gpu).prepared[0][1]["dout"][1:] == (64, 37 * 64)


def test_a_dense_side_of_a_ragged_call_is_its_rows(gpu):
    q, k, v, of_query, _, _, used = ragged_tensors(total_k=2 * 25)
    k, v = (torch.cat((x, x), 2).unflatten(0, (2, 25))[..., :64] for x in (k, v))  # rows 256 elements apart
    assert not k.is_contiguous()
    forward_ragged(q, k, v, of_query, None, None, used, RAGGED)
    shape, strides, _ = only(gpu).prepared[0]
    assert shape == (2, 37, 50, 6, 2) and strides["k"][1:] == (256, 128)
    assert only(gpu).launched[-1][1:3] == (k.data_ptr(), v.data_ptr())
    out, lse = forward_ragged(k, k, v, None, None, used, None, RAGGED)
    assert out.shape == k.shape and out.is_contiguous() and lse.shape == (2, 50)
    gradients = backward_ragged(
        out.transpose(0, 1).contiguous().transpose(0, 1), k, k, v, out, lse, None, None, None, used, None, RAGGED
    )
    assert all(x.shape == k.shape and x.is_contiguous() for x in gradients)


def test_misaligned_ragged_tensors_are_copied(gpu):
    q, k, v, *lengths = ragged_tensors()
    odd = torch.randn(k.numel() + 1).to(k.dtype)[1:].view(k.shape)
    odd_rows = torch.randn(37, 6 * 64 + 1).to(q.dtype)[:, :-1].unflatten(1, (6, 64))
    for a, b in ((q, odd), (odd_rows, k), (odd_rows, odd)):
        gpu.kernels.clear()
        forget_calls()
        out, lse = forward_ragged(a, b, v, *lengths, RAGGED)
        assert all(address % 16 == 0 for address in only(gpu).launched[-1][:5]) and len(only(gpu).launched) == 1
        backward_ragged(odd_rows, a, b, v, out, lse, None, *lengths, RAGGED)
        assert all(address % 16 == 0 for address in [*gpu.kernels.values()][1].launched[-1][:9])


@pytest.mark.parametrize("sizes", [(0, 53), (37, 0), (0, 0)], ids=str)
def test_nothing_is_launched_for_a_ragged_batch_of_nothing(gpu, sizes):
    q, k, v, *lengths = ragged_tensors(*sizes)
    out, lse = forward_ragged(q, k, v, *lengths, RAGGED)
    assert not gpu.kernels and not out.any() and lse.isneginf().all() and out.shape == q.shape
    for x, y in zip(backward_ragged(out, q, k, v, out, lse, None, *lengths, RAGGED), (q, k, v), strict=True):
        assert x.shape == y.shape and not x.any()
    nothing = [torch.zeros(1, dtype=torch.int32)] * 2
    out, lse = forward_ragged(*ragged_tensors()[:3], *nothing, None, None, RAGGED)
    assert not out.any() and lse.isneginf().all() and not gpu.kernels


def test_the_longest_length_chooses_the_kernel(gpu, monkeypatch):
    """Known on the host or not, it is no part of the launch; and other numbers near it are no other signature."""
    asked = []
    choose = calls.choose
    monkeypatch.setattr(calls, "seqlen_bounds", lambda problem, family: (20, 300))
    monkeypatch.setattr(calls, "choose", lambda *given: asked.append(given[-1]) or choose(*given))
    arguments = ragged_tensors(total_k=500)
    for longest in (None, 17, 20, 31, 32, 257, 400, 10**6):
        forward_ragged(*arguments, RAGGED, longest)
    assert asked == [250, 500] and len(calls._calls) == 4  # 500 / 2, 32, 512 and more are cut to 500
    assert sum(len(kernel.prepared) for kernel in gpu.kernels.values()) == 4


SLOPES = Expression("s - input_0[h] * j", "", "input_0: float", (), ((6,),))
OF_KINDS = {
    "ragged": (RAGGED, None, None, ()),
    "ragged, with sinks": (RAGGED._replace(sink=True), torch.zeros(6), None, ()),
    "ragged, with dropout": (RAGGED._replace(dropout_p=0.1), None, torch.zeros(2, dtype=torch.int64), ()),
    "dense, with an expression": (Options(0.1, True, expression=SLOPES), None, None, (torch.zeros(6),)),
}


def both_passes(kind, q, k, v, lengths, wrong_results=None):
    """Forward and backward of a kind of calls; some of what the second is given replaced."""
    options, *others = OF_KINDS[kind]
    out, lse = forward_general(q, k, v, *lengths, *others, options)
    if kind == "ragged":
        out, lse = forward_ragged(q, k, v, *lengths, options)
    given = {"dout": torch.zeros_like(out), "q": q, "k": k, "v": v, "out": out, "lse": lse, "dlse": None}
    given |= wrong_results or {}
    backward_general(*given.values(), *lengths, *others, options)
    if kind == "ragged":
        backward_ragged(*given.values(), *lengths, options)


@pytest.mark.parametrize("kind", list(OF_KINDS))
def test_other_lengths_of_a_known_kind_of_other_calls(gpu, kind):
    """As of dense ones: in whatever order they come, each is prepared as if it were the first."""

    def prepared(batch, seqlens):
        for kernel in gpu.kernels.values():
            kernel.prepared.clear()
        if OF_KINDS[kind][0].varlen:
            q, k, v, *_ = ragged_tensors(*seqlens)
            bounds, used = torch.zeros(batch + 1, dtype=torch.int32), torch.zeros(batch, dtype=torch.int32)
            both_passes(kind, q, k, v, (bounds, bounds.clone(), None, used))
        else:
            both_passes(kind, *tensors(batch, *seqlens), (None,) * 4)
        return {name: [*kernel.prepared] for name, kernel in gpu.kernels.items() if kernel.prepared}

    lengths = [(2, (300, 300)), (5, (1, 9000)), (1, (64, 64)), (2, (9000, 1)), (3, (33, 700))]
    in_turn = [prepared(*one) for one in lengths]
    assert len(calls._kinds) == (4 if kind == "ragged" else 2)
    for one, found in reversed([*zip(lengths, in_turn, strict=True)]):
        forget_calls()
        assert prepared(*one) == found and len(found) == 2


@pytest.mark.parametrize("said", [{}, {"window_left": 100, "window_right": 30}, {"chunk": 700}], ids=str)
def test_new_totals_of_a_ragged_call(gpu, said):
    """In whatever order they come, each call is launched as if it were the first: by the same kernel, with the same
    options, sizes and strides, and results of its own sizes."""
    options = Options(0.1, **said, varlen=True)

    def prepared(batch, totals, longest):
        for kernel in gpu.kernels.values():
            kernel.prepared.clear()
        q, k, v, *_ = ragged_tensors(*totals)
        bounds = torch.zeros(batch + 1, dtype=torch.int32)
        out, lse = forward_ragged(q, k, v, bounds, bounds.clone(), None, None, options, longest)
        if 0 in (batch, *totals):
            return not out.any() and torch.isneginf(lse).all()
        given = torch.zeros_like(out), q, k, v, out, lse, None
        gradients = backward_ragged(*given, bounds, bounds.clone(), None, None, options, longest)
        assert out.shape == q.shape and lse.shape == (6, totals[0])
        assert [x.shape for x in gradients] == [q.shape, k.shape, v.shape]
        assert all(x.is_contiguous() for x in (out, lse, *gradients))
        return {name: [*kernel.prepared] for name, kernel in gpu.kernels.items() if kernel.prepared}

    totals = [(300, 300), (90, 90), (1, 9000), (64, 64), (20, 20), (2000, 5000), (33, 700), (9000, 1), (90, 20)]
    asked = [(1 + i % 3, each, 100 * (i % 2) or None) for i, each in enumerate(totals * 2)]
    in_turn = [prepared(*one) for one in asked]
    for nothing in ((2, (0, 300), None), (2, (300, 0), None), (0, (300, 300), None)):
        assert prepared(*nothing)
    for one, found in reversed([*zip(asked, in_turn, strict=True)]):
        forget_calls()
        assert prepared(*one) == found and len(found) == 2


def test_what_is_wrong_with_another_plain_ragged_call_of_a_known_kind(gpu):
    """Rows, lengths and results are looked at in each, in both passes."""
    q, k, v, *lengths = ragged_tensors()
    out, lse = forward_ragged(q, k, v, *lengths, RAGGED)
    results = {"dout": out, "out": out, "lse": lse, "dlse": lse}
    both = lambda dout, out, lse, dlse, *given: backward_ragged(dout, *given[:3], out, lse, dlse, *given[3:])  # noqa: E731
    both(*results.values(), q, k, v, *lengths, RAGGED)
    of_query, of_key, used_q, used_k = lengths
    apart = torch.zeros(6, dtype=torch.int32)[::2]
    for wrong in (
        (q, k[:9], v, *lengths),
        (q, k, v[:9], *lengths),
        (q, k, v, of_query[:2], of_key, used_q, used_k),
        (q, k, v, of_query, of_key[:2], used_q, used_k),
        (q, k, v, of_query, of_key, used_q[:1], used_k),
        (q, k, v, of_query, of_key, used_q, of_key),
        (q, k, v, of_query, of_key, used_q, apart[:2]),
        (q, k, v, apart, of_key, used_q, used_k),
    ):
        with pytest.raises(InvalidInput):
            forward_ragged(*wrong, RAGGED)
        with pytest.raises(InvalidInput):
            both(*results.values(), *wrong, RAGGED)
    for name, x in {"dout": out[:9], "out": out[:9], "lse": lse[:, :36], "dlse": lse.mT.contiguous()}.items():
        with pytest.raises(InvalidInput, match=f"^{name} is"):
            both(*{**results, name: x}.values(), q, k, v, *lengths, RAGGED)


@pytest.mark.parametrize("kind", ["ragged", "ragged, with sinks"])
def test_what_is_wrong_with_another_ragged_call_of_a_known_kind(gpu, kind):
    q, k, v, *lengths = ragged_tensors()
    both_passes(kind, q, k, v, lengths)
    of_query, of_key, used_q, used_k = lengths
    twice = torch.zeros(6, dtype=torch.int32)[::2]
    for wrong in (
        (q[:, 0], k, v, lengths),
        (q[None], k, v, lengths),
        (q, k[:9], v, lengths),
        (torch.cat((q, q), -1)[..., ::2], k, v, lengths),
        (q, k, v, (of_query[:2], of_key, used_q, used_k)),
        (q, k, v, (of_query, of_key, used_q[:1], used_k)),
        (q, k, v, (of_query, of_key, used_q, of_key)),
        (q, k, v, (twice, of_key, used_q, used_k)),
        (q, k, v, (of_query, of_key, used_q, twice[:2])),
        (q, k, v, (of_query, of_key[:2], used_q, used_k)),
        (q, k, v, (of_query[None], of_key[None], used_q, used_k)),
        (q, k, v, (of_query, of_key.long(), used_q, used_k)),
    ):
        with pytest.raises((InvalidInput, UnsupportedProblem)):
            both_passes(kind, *wrong)
    for name, wrong in {"dout": q[:9], "out": q[:9], "lse": torch.zeros(6, 36), "dlse": torch.zeros(37, 6)}.items():
        with pytest.raises(InvalidInput, match=f"^{name} is"):
            both_passes(kind, q, k, v, lengths, {name: wrong})


def test_tensors_of_an_expression_are_looked_at_in_each_call_of_a_known_kind(gpu):
    """One has a number a key: right for one length, and wrong for the next."""
    of_keys = Expression("s + input_0[j]", "", "input_0: float", (), ((53,),))
    further = (None, None, None, None, None, None, (torch.zeros(53),), Options(0.1, True, expression=of_keys))
    forward_general(*tensors(), *further)
    forward_general(*tensors(seqlen_q=36), *further)
    with pytest.raises(InvalidInput, match=r"that of j must be 52"):
        forward_general(*tensors(seqlen_k=52), *further)


# Head dims that are no multiple of 8 --------------------------------------------------------------------------------


class ReferenceLaunch:
    """Computes what it is asked for by the reference, from addresses and strides, as the plan says what lies there."""

    scratch_bytes, cleared_bytes = 4, 0

    def __init__(self, plan, shape, strides, options):
        self.plan, self.shape, self.strides, self.options = plan, shape, strides, options
        self.scratch_cleared = all(scratch.cleared for scratch in plan.scratch)

    def tensor(self, operand, address):
        size = operand.shape(self.shape, self.plan.problem)
        steps = (*self.strides[operand.name], 1) if operand.is_tensor else torch.empty(size).stride()
        dtype = {"float": torch.float32, "int": torch.int32}.get(operand.ctype.split("*")[0].split()[0], torch.bfloat16)
        span = 1 + sum((n - 1) * step for n, step in zip(size, steps, strict=True))
        memory = (ctypes.c_byte * (span * dtype.itemsize)).from_address(address)
        return torch.frombuffer(memory, dtype=dtype).as_strided(size, steps)

    def __call__(self, operands, scratch, stream, cleared=0):
        plan, options = self.plan, self.options._asdict()
        assert all(address % 16 == 0 for address in operands[:5])
        x = {o.name: self.tensor(o, at) if at else None for o, at in zip(plan.operands, operands, strict=True)}
        if plan.varlen:
            x |= {name: given if name in LENGTHS or given is None else given[0] for name, given in x.items()}
        lengths = tuple(x[name] for name in LENGTHS) if plan.varlen else ()
        q, k, v, s_aux = x["q"], x["k"], x["v"], x.get("s_aux")
        if plan.problem.direction == "fwd":
            run = attention_ragged if plan.varlen else attention_tiled
            results = dict(zip(("o", "lse"), run(q, k, v, *lengths, s_aux=s_aux, **options), strict=True))
        else:
            run = attention_backward_ragged if plan.varlen else attention_backward_tiled
            given = (x["dout"], q, k, v, x["o"], x["lse"], x["dlse"])
            results = dict(zip(("dq", "dk", "dv"), run(*given, *lengths, **options), strict=True))
            if s_aux is not None:
                results["ds_aux"] = sink_gradient(x["dout"], x["o"], x["lse"], x["dlse"], s_aux)
        for name, result in results.items():
            x[name].copy_(result)


@pytest.mark.parametrize("kind", ["dense", "ragged", "with sinks"])
@pytest.mark.parametrize("pair", [(59, 59), (111, 64), (64, 7)], ids=str)
def test_head_dims_are_padded_for_kernels(gpu, monkeypatch, pair, kind):
    """By the scale of the head dim as it was given, in buffers of the shapes that were asked for, once a signature."""
    monkeypatch.setattr(
        FakeKernel, "prepare", lambda self, *given: self.prepared.append(given) or ReferenceLaunch(self.plan, *given)
    )
    head_dim, head_dim_v = pair
    options = Options(causal=True, varlen=kind == "ragged", sink=kind == "with sinks")
    q, k, _ = tensors(1, head_dim=head_dim)
    v = torch.randn(1, 53, 2, head_dim_v).bfloat16()
    sinks, dlse = torch.randn(6), torch.randn(1, 6, 37)
    dout = torch.randn(1, 37, 6, head_dim_v).bfloat16()
    bounds = [torch.tensor([0, n], dtype=torch.int32) for n in (37, 53)]
    for _ in range(2):
        if kind == "dense":
            out, lse = calls.forward_cuda(q, k, v, options)
            torch.testing.assert_close(calls.forward_out(q, k, v, options), out)
            gradients = calls.backward_cuda(dout, q, k, v, out, lse, dlse, options)
        elif kind == "ragged":
            packed, of_out = [x[0] for x in (q, k, v)], dout[0]
            out, lse = forward_ragged(*packed, *bounds, None, None, options)
            gradients = backward_ragged(of_out, *packed, out, lse, dlse[0], *bounds, None, None, options)
            out, lse, gradients = out[None], lse[None], [x[None] for x in gradients]
        else:
            further = (None, None, None, None, sinks, None, ())
            out, lse = forward_general(q, k, v, *further, options)
            *gradients, of_sinks, _ = backward_general(dout, q, k, v, out, lse, dlse, *further, options)
    s_aux = sinks if kind == "with sinks" else None
    assert check(out, lse, q, k, v, causal=True, s_aux=s_aux).ok
    assert check_gradients(gradients, dout, q, k, v, dlse=dlse, causal=True, s_aux=s_aux).ok
    if s_aux is not None:
        torch.testing.assert_close(of_sinks, sink_gradient(dout, out, lse, dlse, sinks))
    for result, given in zip((out, *gradients), (dout, q, k, v), strict=True):
        assert result.is_contiguous() and result.shape == given.shape
    whole = {-(-n // 8) * 8 for n in pair}
    for kernel in gpu.kernels.values():
        assert {*kernel.plan.problem.head_dims} == whole and len(kernel.prepared) == 1
        assert kernel.prepared[0][2].scale(kernel.plan.head_dim) == head_dim**-0.5


# Plain calls go past the operator -----------------------------------------------------------------------------------


@pytest.fixture
def cuda(gpu, monkeypatch):
    """To their is_cuda too, CPU tensors are on a GPU; where a call goes through the operator, the reference runs."""
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda x: True))
    return gpu


def launches(state):
    return sum(len(kernel.launched) for kernel in state.kernels.values())


def test_plain_calls_are_launched(cuda):
    q, k, v = tensors()
    every = [
        lambda: flash_attn_func(q, k, v),
        lambda: flash_attn_func(q, k, v, causal=True, softmax_scale=0.2),
        lambda: flash_attn_func(q, k, v, window_size=(-1, 0)),
        lambda: flash_attn_func(q, k, v, return_attn_probs=True)[0],
        lambda: flash_attn_func(q, k, v, deterministic=True),
        lambda: attention(q, k, v, causal=True)[0],
        lambda: attention(q, k, v, arch="sm80")[0],
    ]
    for number, call in enumerate(every, 1):
        assert call().shape == q.shape and launches(cuda) == number
    with torch.no_grad():
        flash_attn_func(q.requires_grad_(), k, v)
    with torch.inference_mode():
        flash_attn_func(q, k, v)
    assert launches(cuda) == len(every) + 2
    assert len({id(kernel.prepared) for kernel in cuda.kernels.values()}) == 3  # full, causal, sm80


def test_gradients_of_plain_calls_are_launched(cuda):
    """Both passes go past the operators; what the caller differentiates with may be more than a plain tensor."""
    q, k, v = (x.requires_grad_() for x in tensors())
    for number, call in enumerate((lambda: flash_attn_func(q, k, v), lambda: attention(q, k, v)[0]), 1):
        gradients = torch.autograd.grad(call(), (q, k, v), torch.ones_like(q))
        forward, backward = cuda.kernels.values()
        assert (len(forward.launched), len(backward.launched)) == (number, number)
        assert backward.launched[-1][5:8] == tuple(x.data_ptr() for x in gradients)
    out = flash_attn_func(q, k, v)
    with Listening():
        torch.autograd.grad(out, (q, k, v), torch.ones_like(q))
    assert len(backward.launched) == 2


def test_plain_ragged_calls_are_launched(cuda):
    """Both passes; what a kernel was chosen by in the first one is it in the second too."""
    q, k, v, of_query, of_key, _, _ = ragged_tensors()
    flash_attn_varlen_func(q, k, v, of_query, of_key, 20, 40)
    assert launches(cuda) == 1
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = flash_attn_varlen_func(*leaves, of_query, of_key, 20, 40)
    torch.autograd.grad(out, leaves, torch.ones_like(out))
    forward, backward = cuda.kernels.values()
    assert (len(forward.launched), len(backward.launched)) == (2, 1) and len(forward.prepared) == 1
    assert [key[-1] for key in calls._calls] == [6, 6]
    with Listening():
        flash_attn_varlen_func(*leaves, of_query, of_key, 20, 40)
    assert launches(cuda) == 3


def test_numbers_of_any_type_are_what_they_mean(cuda):
    """1 and 1.0 are one signature, and so are numpy's."""
    import numpy

    q, k, v = tensors()
    for scale in (1.0, 1, numpy.float32(1)):
        for causal in (True, 1, numpy.bool_(True)):
            flash_attn_func(q, k, v, softmax_scale=scale, causal=causal, window_size=[-1, numpy.int64(-1)])
    assert launches(cuda) == 9 and only(cuda).prepared[0][2] == Options(1.0, True) and len(only(cuda).prepared) == 1


@pytest.mark.parametrize(
    ("options", "mask", "expected"),
    [
        ({"window_size": (3, 0)}, "window", Options(None, True, 3)),
        ({"window_size": (2, -1), "causal": True}, "window", Options(None, True, 2)),
        ({"window_size": (2, 4)}, "window", Options(None, False, 2, 4)),
        ({"attention_chunk": 16}, "window", Options(None, False, chunk=16)),
        ({"window_size": (100, 0)}, "causal", Options(None, True)),
        ({"attention_chunk": 64, "causal": True}, "causal", Options(None, True)),
        ({"window_size": (100, 100)}, "full", Options()),
    ],
    ids=str,
)
def test_windows_choose_the_plainest_kernel(cuda, options, mask, expected):
    """Of both passes; what hides nothing at these lengths is left out."""
    leaves = [x.requires_grad_() for x in tensors()]
    torch.autograd.grad(flash_attn_func(*leaves, **options).sum(), leaves)
    for kernel in cuda.kernels.values():
        assert kernel.plan.mask == mask and [options for _, _, options in kernel.prepared] == [expected]
    assert [kernel.plan.problem.direction for kernel in cuda.kernels.values()] == ["fwd", "bwd"]


def test_lse_is_only_made_where_it_is_asked_for(cuda):
    q, k, v = tensors()
    flash_attn_func(q, k, v)
    assert only(cuda).launched[-1][4] == calls._scratches[-1, 5].lse
    for call in (lambda: flash_attn_func(q, k, v, return_attn_probs=True)[:2], lambda: attention(q, k, v)):
        out, lse = call()
        assert lse.shape == (2, 6, 37) and lse.dtype == torch.float32 and lse.is_contiguous()
        assert only(cuda).launched[-1][3:5] == (out.data_ptr(), lse.data_ptr())


class Listening(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class Subclass(torch.Tensor):
    pass


OTHERS_LOOK = {
    "autocast": lambda q, k, v: _in(torch.autocast("cpu", torch.bfloat16), q, k, v),
    "dispatch mode": lambda q, k, v: _in(Listening(), q, k, v),
    "dual level": lambda q, k, v: _in(torch.autograd.forward_ad.dual_level(), q, k, v),
    "vmap": lambda q, k, v: torch.func.vmap(flash_attn_func)(*(x.unsqueeze(1) for x in (q, k, v))).squeeze(1),
    "vjp": lambda q, k, v: torch.func.vjp(flash_attn_func, q, k, v)[0],
    "trace": lambda q, k, v: torch.jit.trace(flash_attn_func, (q, k, v), check_trace=False)(q, k, v),
    "compile": lambda q, k, v: torch.compile(flash_attn_func, fullgraph=True, backend="aot_eager")(q, k, v),
    "parameter": lambda q, k, v: flash_attn_func(q, torch.nn.Parameter(k, requires_grad=False), v),
    "subclass of q": lambda q, k, v: flash_attn_func(q.as_subclass(Subclass), k, v).as_subclass(torch.Tensor),
    "subclass of v": lambda q, k, v: flash_attn_func(q, k, v.as_subclass(Subclass)).as_subclass(torch.Tensor),
}


def _in(context, q, k, v):
    with context:
        return flash_attn_func(q, k, v)


@pytest.mark.filterwarnings("ignore")  # torch.jit.trace speaks of its age
@pytest.mark.parametrize("who", OTHERS_LOOK)
def test_what_others_look_at_goes_through_the_operator(cuda, who):
    q, k, v = tensors()
    expected = attention_tiled(q, k, v, causal=False, softmax_scale=0.125)[0]
    flash_attn_func(q, k, v)  # a plain call of that signature is remembered
    before = launches(cuda)
    torch.testing.assert_close(OTHERS_LOOK[who](q, k, v), expected, rtol=0, atol=0)
    assert launches(cuda) == before
    torch.compiler.reset()


def test_what_is_being_compiled_goes_through_the_operator(cuda, monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    flash_attn_func(*tensors())
    assert not launches(cuda)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"softmax_scale": True}, "softmax_scale must be a number"),  # equal to 1.0, which is remembered
        ({"softmax_scale": float("nan")}, "nan"),
        ({"softmax_scale": [1.0]}, "softmax_scale must be a number"),
        ({"causal": 1.0}, "causal must be True or False"),  # equal to True
        ({"causal": None}, "causal must be True or False"),
        ({"causal": torch.ones(2)}, "causal must be True or False"),
    ],
    ids=str,
)
def test_bad_options_are_refused_though_equal_ones_are_remembered(cuda, options, words):
    q, k, v = tensors()
    flash_attn_func(q, k, v, softmax_scale=1.0, causal=True)
    for _ in range(2):
        with pytest.raises((InvalidInput, UnsupportedProblem), match=words):
            flash_attn_func(q, k, v, **{"softmax_scale": 1.0, "causal": True} | options)
    assert launches(cuda) == 1


def test_plain_calls_in_threads(cuda, monkeypatch):
    """Each on a stream of its own, in turns that the interpreter picks: no call has another's tensors or scratch."""
    stream = threading.local()
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: stream.handle)
    seen, wrong = [], []

    def work(handle):
        stream.handle = handle
        for i in range(200):
            q, k, v = tensors(seqlen_q=1 + i % 3)
            out = flash_attn_func(q, k, v)
            seen.append((handle, *(x.data_ptr() for x in (q, k, v, out)), q, k, v, out))
            if out.shape != q.shape:
                wrong.append(out.shape)

    workers = [threading.Thread(target=work, args=(handle,)) for handle in (11, 12, 13, 14)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    scratches = {stream: (scratch.lse, scratch.counter) for (_, stream), scratch in calls._scratches.items()}
    assert not wrong and len(set(scratches.values())) == len(scratches) == 4
    expected = {(*addresses, *scratches[handle], handle) for handle, *addresses in (one[:5] for one in seen)}
    assert set(only(cuda).launched) == expected and len(only(cuda).prepared) <= 3 * 4


# Backward dispatch ----------------------------------------------------------------------------------------------------


def latest(state):
    """The kernel of the problem that was met last."""
    return [*state.kernels.values()][-1]


def test_one_backward_call(gpu):
    q, k, v = tensors()
    out, dout = torch.zeros_like(q), torch.zeros_like(q).transpose(1, 2).contiguous().transpose(1, 2)
    lse = torch.zeros(q.shape[0], q.shape[2], q.shape[1])
    for dlse in (None, lse.clone()):
        dq, dk, dv = calls.backward_cuda(dout, q, k, v, out, lse, dlse, Options(0.1, True))
        kernel = only(gpu)
        *addresses, of_dlse, scratch, stream = kernel.launched[-1]
        assert addresses == [x.data_ptr() for x in (q, k, v, out, dout, dq, dk, dv, lse)]
        assert of_dlse == (0 if dlse is None else dlse.data_ptr()) and stream == 5 and scratch
        _, strides, options = kernel.prepared[-1]
        assert strides["dout"] == dout.stride()[:3] and strides["dq"] == dq.stride()[:3]
        assert options == Options(0.1, True)
        assert kernel.plan.problem.direction == "bwd" and kernel.plan.mask == "causal"
    assert len(kernel.prepared) == 2
    calls.backward_cuda(dout, q, k, v, out, lse, None, Options(0.1, True))
    assert len(kernel.prepared) == 2, "a signature is prepared once"
    calls.backward_cuda(dout, q, k, v, out, lse, None, Options(0.1, True, deterministic=True))
    assert [kernel.plan.deterministic for kernel in gpu.kernels.values()] == [False, True]


def test_deterministic_algorithms_choose_deterministic_gradients(cuda):
    """torch's own switch, at the time of the backward pass, with its uninitialised memory filled or not."""
    q, k, v = (x.requires_grad_() for x in tensors())
    try:
        for wanted, warn_only, fill in ((False, False, True), (True, False, True), (True, True, False)):
            out = flash_attn_func(q, k, v)
            torch.use_deterministic_algorithms(wanted, warn_only=warn_only)
            torch.utils.deterministic.fill_uninitialized_memory = fill
            gradients = torch.autograd.grad(out, (q, k, v), torch.ones_like(q))
            assert latest(cuda).plan.deterministic is wanted
            assert all(x.isnan().all() for x in gradients) or not (wanted and fill)  # the kernel that wrote nothing
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = True


def test_backward_copies_what_tma_does_not_take(gpu):
    q, k, v = tensors()
    out, lse = torch.zeros_like(q), torch.zeros(q.shape[0], q.shape[2], q.shape[1])
    one = torch.zeros(1, dtype=q.dtype).expand(q.shape)  # stride 0 also along the head dim: the gradient of a sum
    calls.backward_cuda(one, q, k, v, out, lse, None, Options(0.1, False))
    assert only(gpu).prepared[-1][1]["dout"] == out.stride()[:3]


def test_backward_of_nothing_launches_nothing(gpu):
    q, k, v = tensors(seqlen_q=0)
    lse = torch.zeros(q.shape[0], q.shape[2], 0)
    _, dk, dv = calls.backward_cuda(q, q, k, v, q, lse, None, Options(0.1, False))
    assert not dk.any() and not dv.any() and not gpu.kernels


def test_backward_by_another_family(gpu, monkeypatch):
    q, k, v = tensors()
    lse = torch.zeros(q.shape[0], q.shape[2], q.shape[1])
    for arch in (None, "sm80", "sm90"):
        if arch is not None:
            monkeypatch.setenv("FA2GEN_ARCH", arch)
        forget_calls()
        calls.backward_cuda(q, q, k, v, q, lse, None, Options(0.1, False))
        assert latest(gpu).plan.arch == (arch or "sm90")
        gpu.kernels.clear()
