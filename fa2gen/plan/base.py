"""What every plan holds, whatever the architecture and direction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from fa2gen.arch import ARCHES
from fa2gen.layout import Panels, align_up
from fa2gen.spec import KernelSpec, Problem, Tiling

__all__ = ["BrokenRule", "EntryPoint", "KernelPlan", "Param", "TensorMapPlan", "bytes_text"]

_STRUCT_CODES = {
    "void const*": "Q",
    "void*": "Q",
    "float*": "Q",
    "float const*": "Q",
    "int*": "Q",
    "int64_t": "q",
    "int": "i",
    "float": "f",
}


@dataclass(frozen=True)
class BrokenRule:
    """One reason why a spec does not fit: `rule` names it, `detail` has the numbers."""

    rule: str
    detail: str


@dataclass(frozen=True)
class Param:
    """One field of the kernel's `Params` struct."""

    name: str
    ctype: str

    @property
    def code(self) -> str:
        """The field's code for Python's struct module."""
        return _STRUCT_CODES[self.ctype]


@dataclass(frozen=True)
class TensorMapPlan:
    """How TMA sees one (batch, seqlen, heads, head_dim) tensor: a box of box_rows x box_cols elements of one head.

    The rows of a box lie swizzle_bytes apart in shared memory, also where they are narrower.

    last_panel  whether it is for the last panel of columns alone, beside a map of the same tensor for the others.
    """

    name: str
    box_cols: int
    box_rows: int
    swizzle_bytes: int
    last_panel: bool = False

    @property
    def argument(self) -> str:
        """What the kernel calls it."""
        return f"map_{self.name}_last" if self.last_panel else f"map_{self.name}"


@dataclass(frozen=True)
class EntryPoint:
    """One `extern "C"` kernel of a source: its symbol, and what a launch of it takes before the shared Params.

    starts_early  programmatic dependent launch: its blocks may start before the kernel before it has ended, and it
                  executes griddepcontrol.wait before it uses what that one writes.
    """

    symbol: str
    num_threads: int
    shared_memory_bytes: int
    tensor_maps: tuple[TensorMapPlan, ...]
    starts_early: bool = False


@dataclass(frozen=True)
class KernelPlan:
    """A spec with every derived number that its template and its launch need. Built by `make_plan` only."""

    spec: KernelSpec

    # Each (arch, direction) says these of itself.
    template: str = ""

    @property
    def problem(self) -> Problem:
        return self.spec.problem

    @property
    def tiling(self) -> Tiling:
        return self.spec.tiling

    @cached_property
    def name(self) -> str:
        return self.spec.name

    @property
    def arch(self) -> str:
        return self.tiling.arch

    @property
    def target(self) -> str:
        """NVRTC's `arch`: "sm_80" or "sm_90a"."""
        return ARCHES[self.tiling.arch].target

    @property
    def head_dim(self) -> int:
        return self.problem.head_dim

    @property
    def dtype(self) -> str:
        return self.problem.dtype

    @property
    def mask(self) -> str:
        return self.problem.mask

    @property
    def causal(self) -> bool:
        return self.problem.mask == "causal"

    @property
    def deterministic(self) -> bool:
        return self.problem.deterministic

    @property
    def tile_m(self) -> int:
        return self.tiling.tile_m

    @property
    def tile_n(self) -> int:
        return self.tiling.tile_n

    @property
    def num_stages(self) -> int:
        return self.tiling.num_stages

    @property
    def num_mma_warps(self) -> int:
        return self.tiling.num_mma_warps

    @property
    def q_tile(self) -> Panels:
        return Panels(self.tile_m, self.head_dim, self.tiling.swizzle_bytes)

    @property
    def kv_tile(self) -> Panels:
        return Panels(self.tile_n, self.head_dim, self.tiling.swizzle_bytes)

    @property
    def num_k_steps_head_dim(self) -> int:
        """Steps of 16 along the head dim; the last reads zeros where the head dim is an odd multiple of 8."""
        return align_up(self.head_dim, 16) // 16

    @property
    def k_steps_per_panel(self) -> int:
        return self.kv_tile.columns // 16

    @property
    def swizzle_shift(self) -> int:
        """16-byte chunk c of row r lies at chunk c ^ ((r >> shift) & mask): see layout.swizzle."""
        return {128: 0, 64: 1, 32: 2}[self.tiling.swizzle_bytes]

    @property
    def swizzle_mask(self) -> int:
        return {128: 7, 64: 3, 32: 1}[self.tiling.swizzle_bytes]

    # What a subclass must give.

    @property
    def num_threads(self) -> int:
        raise NotImplementedError

    @property
    def min_ctas_per_sm(self) -> int:
        return 1

    @property
    def shared_memory_bytes(self) -> int:
        """Dynamic shared memory of one block."""
        raise NotImplementedError

    @property
    def params(self) -> tuple[Param, ...]:
        """Fields of the kernel's Params struct in order; 8-byte fields come first, so that C++ adds no padding."""
        raise NotImplementedError

    @property
    def tensor_maps(self) -> tuple[TensorMapPlan, ...]:
        """The tensor maps that precede Params in the kernel's argument list."""
        return ()

    @property
    def entry_points(self) -> tuple[EntryPoint, ...]:
        """The kernels of this source in the order of their launches; the one called `name` does the work."""
        return (EntryPoint(self.name, self.num_threads, self.shared_memory_bytes, self.tensor_maps),)

    def broken_rules(self) -> Sequence[BrokenRule]:
        """Every feasibility rule that this plan breaks; empty when the kernel can be built."""
        raise NotImplementedError

    @cached_property
    def params_format(self) -> str:
        """`struct.Struct` format of Params, with the trailing padding that C++ adds."""
        codes = "".join(param.code for param in self.params)
        return f"<{codes}" + ("4x" if sum(code in "if" for code in codes) % 2 else "")

    def pack_params(self, values: dict[str, Any]) -> tuple[Any, ...]:
        """The values of Params in struct order, from a dict with those names; it may have others."""
        return tuple(values[param.name] for param in self.params)


def bytes_text(value: int) -> str:
    """`327,680 B`."""
    return f"{value:,} B"
