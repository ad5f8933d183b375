"""The runner on a device: compiles ahead in threads, checks with the project's rule, times as `fa2gen bench` does.

Threads, not processes: NVRTC releases the GIL, rendering takes 2 ms, and the GPU is kept busy ahead of the host, so
what little Python the compiling threads run does not show in the medians.
"""

from __future__ import annotations

import functools
import hashlib
import math
import statistics
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from fa2gen import env
from fa2gen.arch import ArchName
from fa2gen.bench.points import HIDDEN, TOKENS, Point
from fa2gen.bench.protocol import PROTOCOL, CudaTimer, interleaved, significant
from fa2gen.bench.provenance import current_device, versions
from fa2gen.errors import Fa2GenError
from fa2gen.launch import ForwardShape
from fa2gen.plan import make_plan
from fa2gen.select import kernel_arch
from fa2gen.spec import KernelSpec, Problem
from fa2gen.store import Entry, Store
from fa2gen.tune.search import Built, DeviceLost

if TYPE_CHECKING:
    from fa2gen.kernel import Kernel
    from fa2gen.reference import GradientVerdict, Verdict

__all__ = ["GpuRunner"]

# What a candidate is checked at: ragged in both lengths with grouped heads, and several whole tiles with more queries
# than keys, so that a causal mask leaves rows without any.
CHECKS = (ForwardShape(2, 337, 523, 4, 2), ForwardShape(1, 1024, 768, 2, 2))


@dataclass(frozen=True)
class _Tensors:
    """Inputs and results of a pass: (q, k, v) and (out, lse); or (q, k, v, dout, out, lse) and (dq, dk, dv)."""

    inputs: tuple[Any, ...]
    results: tuple[Any, ...]


def _scale(problem: Problem) -> float:
    scale: float = problem.head_dim**-0.5
    return scale


class GpuRunner:
    """A `Runner` on torch's current CUDA device and stream.

    One problem's forward kernels at a time are kept loaded. Backward kernels go through fa2gen.ops, which keeps them:
    they need scratch memory, and there are a dozen a problem.
    """

    def __init__(self, arch: ArchName, jobs: int | None = None, store: Store | None = None) -> None:
        torch = self._torch = import_module("torch")
        self._device = current_device()
        _, self._target = kernel_arch(self._device, arch)
        self.circumstances = (self._device.name, str(versions()["nvrtc"]), PROTOCOL)
        self._store = store or Store()
        # The thread that times gets a core of its own.
        self._pool = ThreadPoolExecutor(jobs or max(1, env.jobs() - 1), thread_name_prefix="fa2gen-compile")
        self._futures: dict[KernelSpec, Future[Entry]] = {}
        self._timer = CudaTimer()
        self._counter = torch.zeros(1, dtype=torch.int32, device="cuda")
        self._known: dict[tuple[Problem, ForwardShape], _Tensors] = {}  # of one problem at a time

    def close(self) -> None:
        """Stop compiling what is not needed any more."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def build_ahead(self, specs: Sequence[KernelSpec]) -> None:
        for spec in specs:
            if spec not in self._futures:
                self._futures[spec] = self._pool.submit(self._store.get_or_compile, make_plan(spec), self._target)

    def build(self, spec: KernelSpec) -> Built:
        self.build_ahead([spec])
        entry = self._futures.pop(spec).result()
        digest = hashlib.sha256(entry.source.encode()).hexdigest()[:16]
        return Built(spec, digest, entry.report, functools.cache(lambda: self._load(spec, entry.cubin)))

    def check(self, built: Built) -> str | None:
        from fa2gen.reference import check, check_gradients

        torch, problem = self._torch, built.spec.problem
        causal = problem.mask == "causal"
        for shape in CHECKS:
            tensors = self._tensors(problem, shape)
            for x in tensors.results:
                x.fill_(math.nan)
            call = self._call(built, shape, tensors)
            with self._judged(built):
                call()
                torch.cuda.synchronize()
            verdict: Verdict | GradientVerdict
            with torch.no_grad():
                if problem.direction == "bwd":
                    q, k, v, dout, *_ = tensors.inputs
                    verdict = check_gradients(tensors.results, dout, q, k, v, causal=causal)
                else:
                    verdict = check(*tensors.results, *tensors.inputs, causal=causal)
            if not verdict.ok:
                return f"{shape}: {verdict}"
        return None

    def time(self, kernels: Sequence[Built], seqlen: int, rounds: int) -> list[float]:
        problem = kernels[0].spec.problem
        heads = max(1, HIDDEN // problem.head_dim)
        shape = ForwardShape(max(1, TOKENS // seqlen), seqlen, seqlen, heads, heads)
        point = Point(
            preset="tune",
            direction=problem.direction,
            head_dim=problem.head_dim,
            dtype=problem.dtype,
            causal=problem.mask == "causal",
            batch=shape.batch,
            seqlen=seqlen,
            heads=heads,
            heads_kv=heads,
        )
        tensors = self._tensors(problem, shape)
        calls = {built.spec.name: self._call(built, shape, tensors) for built in kernels}
        with self._judged(kernels[0]):
            times = interleaved(calls, self._timer, rounds)
        return [significant(point.flops / statistics.median(times[built.spec.name]) / 1e9) for built in kernels]

    # Details

    def _load(self, spec: KernelSpec, cubin: bytes) -> Kernel:
        from fa2gen.kernel import Kernel

        return Kernel(make_plan(spec), cubin, self._torch.cuda.current_device())

    def _tensors(self, problem: Problem, shape: ForwardShape) -> _Tensors:
        """Of a shape: random, and the same for all candidates of a problem."""
        if any(owner != problem for owner, _ in self._known):
            self._known.clear()
        if (problem, shape) not in self._known:
            self._known[problem, shape] = self._fresh(problem, shape)
        return self._known[problem, shape]

    def _fresh(self, problem: Problem, shape: ForwardShape) -> _Tensors:
        torch = self._torch
        dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[problem.dtype]
        generator = torch.Generator(device="cuda").manual_seed(shape.seqlen_q * 4099 + problem.head_dim)

        def random(seqlen: int, heads: int) -> Any:
            size = (shape.batch, seqlen, heads, problem.head_dim)
            return torch.randn(size, generator=generator, device="cuda", dtype=dtype)

        q = random(shape.seqlen_q, shape.num_heads)
        k, v = random(shape.seqlen_k, shape.num_heads_kv), random(shape.seqlen_k, shape.num_heads_kv)
        if problem.direction == "bwd":
            from fa2gen.ops.dispatch import forward_cuda

            dout = random(shape.seqlen_q, shape.num_heads)
            out, lse = forward_cuda(q, k, v, _scale(problem), problem.mask == "causal")
            return _Tensors((q, k, v, dout, out, lse), tuple(torch.empty_like(x) for x in (q, k, v)))
        lse = torch.empty(shape.batch, shape.num_heads, shape.seqlen_q, device="cuda", dtype=torch.float32)
        return _Tensors((q, k, v), (torch.empty_like(q), lse))

    def _call(self, built: Built, shape: ForwardShape, tensors: _Tensors) -> Any:
        """What is timed: with nothing left to do but to enqueue it."""
        if built.spec.problem.direction == "bwd":
            return self._backward(built, tensors)
        (q, k, v), (out, lse) = tensors.inputs, tensors.results
        kernel: Kernel = built.handle()
        strides = {name: x.stride()[:3] for name, x in zip("qkvo", (q, k, v, out), strict=True)}
        launch = kernel.prepare(shape, softmax_scale=_scale(built.spec.problem), **strides)
        at_q, at_k, at_v, at_out, at_lse, at_counter = (x.data_ptr() for x in (q, k, v, out, lse, self._counter))
        stream = self._torch.cuda.current_stream().cuda_stream
        return lambda: launch(at_q, at_k, at_v, at_out, at_lse, at_counter, stream)

    def _backward(self, built: Built, tensors: _Tensors) -> Any:
        from fa2gen.ops.backward import backward_cuda

        q, k, v, dout, out, lse = tensors.inputs
        problem, tiling = built.spec.problem, built.spec.tiling
        scale, causal = _scale(problem), problem.mask == "causal"
        return lambda: backward_cuda(
            dout, q, k, v, out, lse, None, scale, causal, problem.deterministic, tiling, tensors.results
        )

    @contextmanager
    def _judged(self, built: Built) -> Iterator[None]:
        """Raises DeviceLost when the context does not survive the body, Fa2GenError for any other failure of it.

        After an illegal access, say, no call on the device succeeds any more in this process.
        """
        try:
            yield
        except (RuntimeError, Fa2GenError) as error:
            try:
                self._torch.cuda.synchronize()
            except RuntimeError:
                reason = str(error).splitlines()[0]
                raise DeviceLost(
                    f"{built.spec.name} broke the CUDA context ({reason}): run the same command again, it goes on"
                ) from error
            raise Fa2GenError(str(error).splitlines()[0]) from error
