"""Many specs to cubins: in parallel, with progress, into the cache or into a folder that is loaded with no compiler.

Threads, not processes: NVRTC releases the GIL, and four kernels on two threads take little more than half the time.
A spec that fails is a result with an error, not an exception: who builds forty kernels wants to hear of every failure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fa2gen import env
from fa2gen.arch import ARCHES
from fa2gen.compile import Unit, plan_unit
from fa2gen.errors import Fa2GenError, InvalidInput, StoreError
from fa2gen.plan import make_plan
from fa2gen.store import Entry, Store, key_of, read_current, refusal, write_entry, write_manifest

if TYPE_CHECKING:
    from fa2gen.spec import KernelSpec

__all__ = ["BuildResult", "build"]


@dataclass(frozen=True)
class BuildResult:
    """What became of one spec. `error` says why there is no kernel; its numbers are then None.

    target           NVRTC's architecture, e.g. "sm_90a"; "" when the spec did not get as far.
    spill_bytes      stores and loads together, per thread; stack_bytes likewise.
    compile_seconds  of the compilation, also when that was an earlier one (`cached`).
    kept             whether it is on disk now, in the folder or else the cache: a full or refused cache keeps nothing.
    notes            warnings and C75xx notes of the compiler, with their template lines.
    """

    spec: KernelSpec
    target: str = ""
    registers: int | None = None
    spill_bytes: int | None = None
    stack_bytes: int | None = None
    shared_memory_bytes: int | None = None
    compile_seconds: float | None = None
    notes: tuple[str, ...] = ()
    cached: bool = False
    kept: bool = True
    error: str | None = None

    @property
    def name(self) -> str:
        return self.spec.name

    def to_json(self) -> dict[str, Any]:
        """Every field, as JSON values; of the spec what every listing says of it."""
        own = {item.name: getattr(self, item.name) for item in fields(self) if item.name != "spec"}
        return {**self.spec.row(), **own, "notes": list(self.notes)}


def build(
    specs: Iterable[KernelSpec],
    out: Path | None = None,
    jobs: int | None = None,
    *,
    target: str | None = None,
    progress: Callable[[BuildResult], None] | None = None,
    store: Store | None = None,
) -> list[BuildResult]:
    """Compiles every spec that is not compiled already. Results are in the order of specs.

    out       folder for FA2GEN_AOT_DIR: out/<kernel>/{kernel.cu, kernel.cubin, meta.json} and out/manifest.json. What
              earlier builds of this fa2gen version put there stays: a folder may be filled in several calls.
    jobs      kernels compiled at once; default FA2GEN_JOBS, else the usable cores.
    target    NVRTC target in place of each plan's own, e.g. "sm_90" for sm80 kernels on a 9.0 device.
    progress  called in this thread with each result as it comes, in order of completion.
    store     the cache, which serves and keeps the kernels of `out` too; default the user's.

    Raises InvalidInput, before anything is compiled, for a folder that FA2GEN_AOT_DIR would refuse, that cannot be
    written or has another's manifest.json; StoreError when out/manifest.json cannot be written. All that befalls one
    kernel is in its result. FA2GEN_DISABLE_JIT does not apply: to build is to ask for it.
    """
    if out is not None and (why := refusal(out)):
        raise InvalidInput(f"kernels cannot be built into {out}: {why}")
    specs, store = list(specs), store or Store()
    with ThreadPoolExecutor(jobs or env.jobs()) as pool:
        futures = [pool.submit(_build_one, spec, out, target, store) for spec in specs]
        try:
            for future in as_completed(futures):
                result = future.result()
                if progress:
                    progress(result)
        except BaseException:  # Ctrl-C too: do not compile the rest first
            pool.shutdown(cancel_futures=True)
            raise
    results = [future.result() for future in futures]
    if out is not None and any(result.error is None for result in results):
        try:
            write_manifest(out)
        except OSError as error:
            raise StoreError(f"the kernels are in {out}, but not its manifest: {error}") from error
    return results


def _build_one(spec: KernelSpec, out: Path | None, target: str | None, store: Store) -> BuildResult:
    blank = BuildResult(spec)
    try:
        arch = ARCHES[spec.tiling.arch]
        plan = make_plan(spec, arch.targets.get(target or arch.target))
        unit = plan_unit(plan, target)
        # A family's own target needs no mention; a second one for the same kernel lies beside it.
        folder = out and out / (unit.name if unit.target == plan.target else f"{unit.name}-{unit.target}")
        entry, cached = _entry(unit, folder, store)
        kept = folder is not None or store.keeps(key_of(unit))
    except (Fa2GenError, OSError) as error:
        return replace(blank, error=str(error))
    report = entry.report
    return replace(
        blank,
        target=unit.target,
        registers=report.registers,
        spill_bytes=report.spill_bytes,
        stack_bytes=report.stack_bytes,
        shared_memory_bytes=report.shared_memory_bytes,
        compile_seconds=report.compile_seconds,
        notes=report.notes,
        cached=cached,
        kept=kept,
    )


def _entry(unit: Unit, folder: Path | None, store: Store) -> tuple[Entry, bool]:
    """The unit's entry, also in `folder` now, and whether it was compiled before. Raises CompileError, OSError."""
    key = key_of(unit)
    if folder and (entry := read_current(folder, key)):
        return entry, True
    found = store.try_load(key)
    entry = found or store.compile_once(unit)
    if folder:
        write_entry(folder, entry)
    return entry, found is not None
