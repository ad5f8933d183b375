"""The runner on a device: compiles ahead in threads, checks with the project's rule, times as `fa2gen bench` does.

Threads, not processes: NVRTC releases the GIL, rendering takes 2 ms, and the GPU is kept busy ahead of the host, so
what little Python the compiling threads run does not show in the medians.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import statistics
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from typing import TYPE_CHECKING

from fa2gen import cases, env
from fa2gen.arch import ArchName
from fa2gen.bench.points import HIDDEN, TOKENS, flops_of
from fa2gen.bench.protocol import PROTOCOL, CudaTimer, interleaved, significant
from fa2gen.bench.provenance import versions
from fa2gen.cases import Case
from fa2gen.errors import Fa2GenError
from fa2gen.features import examples_of
from fa2gen.gpus import current_device
from fa2gen.options import Shape
from fa2gen.plan import make_plan
from fa2gen.select import kernel_arch
from fa2gen.spec import KernelSpec, Problem
from fa2gen.store import Entry, Store
from fa2gen.tune.search import Built, DeviceLost

if TYPE_CHECKING:
    from fa2gen.kernel import Kernel

__all__ = ["GpuRunner"]

# What a candidate is checked at: ragged in both lengths with grouped heads, and several whole tiles with more queries
# than keys, so that a causal mask leaves rows without any.
CHECKS = (Shape(2, 337, 523, 4, 2), Shape(1, 1024, 768, 2, 2))
QUERY_HEADS = 4  # of a group, over a cache


class GpuRunner:
    """A `Runner` on torch's current CUDA device and stream.

    The tensors of one problem at a time are kept, the same for all of its candidates.
    """

    def __init__(self, arch: ArchName, jobs: int | None = None, store: Store | None = None) -> None:
        self._torch = import_module("torch")
        self._device = current_device()
        _, self._target = kernel_arch(self._device, arch)
        self.circumstances = (self._device.name, str(versions()["nvrtc"]), PROTOCOL)
        self.shared_memory_limit = self._device.shared_memory_per_block
        self._store = store or Store()
        # The thread that times gets a core of its own.
        self._pool = ThreadPoolExecutor(jobs or max(1, env.jobs() - 1), thread_name_prefix="fa2gen-compile")
        self._futures: dict[KernelSpec, Future[Entry]] = {}
        self._timer = CudaTimer()
        self._known: dict[tuple[Problem, Shape], Case] = {}  # of one problem at a time

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
        problem = built.spec.problem
        for shape, options in itertools.product(CHECKS, examples_of(problem)):
            case = cases.make(built.spec, shape, options, device="cuda")
            with self._judged(built):
                cases.prepare(built.handle(), case)()
                self._torch.cuda.synchronize()
            verdict = cases.verdict(case)
            if not verdict.ok:
                return f"{shape}: {verdict}"
        return None

    def time(self, kernels: Sequence[Built], seqlen: int, rounds: int) -> list[float]:
        problem = kernels[0].spec.problem
        heads = max(1, HIDDEN // problem.head_dim)
        shape = Shape(max(1, TOKENS // seqlen), seqlen, seqlen, heads, heads)
        if problem.direction == "decode":  # one query, whose heads share keys
            shape = shape._replace(seqlen_q=1, num_heads=QUERY_HEADS * heads)
        calls = {built.spec.name: cases.prepare(built.handle(), self._case(built.spec, shape)) for built in kernels}
        with self._judged(kernels[0]):
            times = interleaved(calls, self._timer, rounds)
        flops = flops_of(problem, shape, examples_of(problem)[0])
        return [significant(flops / statistics.median(times[built.spec.name]) / 1e9) for built in kernels]

    # Details

    def _load(self, spec: KernelSpec, cubin: bytes) -> Kernel:
        from fa2gen.kernel import Kernel

        return Kernel(make_plan(spec), cubin, self._torch.cuda.current_device())

    def _case(self, spec: KernelSpec, shape: Shape) -> Case:
        """Of a kernel, with the tensors of all candidates of its problem."""
        if any(owner != spec.problem for owner, _ in self._known):
            self._known.clear()
        if (spec.problem, shape) not in self._known:
            self._known[spec.problem, shape] = cases.make(spec, shape, device="cuda", large=True)
        return replace(self._known[spec.problem, shape], spec=spec)

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
