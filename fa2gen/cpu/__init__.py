"""Kernels on the CPU: the same templates over templates/cpu/, which models the machine (see its README).

`run_kernel` runs a forward kernel, or the three of a backward pass; `RunOptions` says how: schedule seed, sanitizers,
counters. Needs g++ or clang++.
"""

from __future__ import annotations

from fa2gen.cpu.build import Library, build_library, find_compiler
from fa2gen.cpu.kernel import Report, RunOptions, run_kernel
from fa2gen.cpu.run import PRIMITIVES, Count, KernelFault
from fa2gen.cpu.stats import counts_table

__all__ = [
    "PRIMITIVES",
    "Count",
    "KernelFault",
    "Library",
    "Report",
    "RunOptions",
    "build_library",
    "counts_table",
    "find_compiler",
    "run_kernel",
]
