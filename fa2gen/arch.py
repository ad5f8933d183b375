"""What each GPU family offers to a kernel: the limits that plans are checked against, each with its source."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

__all__ = ["ARCHES", "Arch", "ArchName"]

ArchName = Literal["sm80", "sm90"]


@dataclass(frozen=True)
class Arch:
    """One kernel family.

    The name says which instructions its kernels use, not the one GPU that they run on: sm80 kernels (mma.sync,
    cp.async) also serve 8.6 and 8.9, and 9.0 on request.
    """

    name: ArchName
    targets: Mapping[str, int]
    """What NVRTC can compile its kernels for, cubins of the first are used wherever they load; and bytes of dynamic
    shared memory that one block can ask for there (CUDA C++ Programming Guide, technical specifications)."""
    registers_per_sm: int
    max_registers_per_thread: int

    @property
    def target(self) -> str:
        """NVRTC's `arch` option."""
        return next(iter(self.targets))

    @property
    def shared_memory_per_block(self) -> int:
        """Of a block on the first target."""
        return self.targets[self.target]


ARCHES: dict[ArchName, Arch] = {
    # 163 KiB of the 164 KiB of an A100 SM, 99 of 100 on 8.6 and 8.9: one KiB per block is reserved by the driver.
    "sm80": Arch(
        "sm80", {"sm_80": 166_912, "sm_86": 101_376, "sm_87": 166_912, "sm_89": 101_376, "sm_90": 232_448}, 65_536, 255
    ),
    # 227 KiB of the 228 KiB of an H100/H200 SM. wgmma and setmaxnreg exist only on the architecture-specific target.
    "sm90": Arch("sm90", {"sm_90a": 232_448}, 65_536, 255),
}
