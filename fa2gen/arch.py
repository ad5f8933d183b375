"""What each GPU family offers to a kernel: the limits that plans are checked against, each with its source."""

from __future__ import annotations

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
    targets: tuple[str, ...]
    """What NVRTC can compile its kernels for; cubins of the first are used wherever they load."""
    shared_memory_per_block: int
    """Bytes of dynamic shared memory one block can ask for (CUDA C++ Programming Guide, technical specifications)."""
    registers_per_sm: int
    max_registers_per_thread: int

    @property
    def target(self) -> str:
        """NVRTC's `arch` option."""
        return self.targets[0]


ARCHES: dict[ArchName, Arch] = {
    # 163 KiB of the 164 KiB of an A100 SM: one KiB per block is reserved by the driver.
    "sm80": Arch("sm80", ("sm_80", "sm_86", "sm_87", "sm_89", "sm_90"), 166_912, 65_536, 255),
    # 227 KiB of the 228 KiB of an H100/H200 SM. wgmma and setmaxnreg exist only on the architecture-specific target.
    "sm90": Arch("sm90", ("sm_90a",), 232_448, 65_536, 255),
}
