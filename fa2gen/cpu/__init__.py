"""Kernels on the CPU: the same templates over templates/cpu/, which models the machine (see its README).

`forward_into` runs a forward kernel, `run_backward` the three of a backward pass; `Options` says how: schedule seed,
sanitizers, counters. Needs g++ or clang++.
"""

from __future__ import annotations

from fa2gen.cpu.backward import run_backward
from fa2gen.cpu.build import Library, build_library, find_compiler
from fa2gen.cpu.forward import Options, Report, forward_into, run_forward
from fa2gen.cpu.run import PRIMITIVES, Count, KernelFault
from fa2gen.cpu.stats import counts_table

__all__ = [
    "PRIMITIVES",
    "Count",
    "KernelFault",
    "Library",
    "Options",
    "Report",
    "build_library",
    "counts_table",
    "find_compiler",
    "forward_into",
    "run_backward",
    "run_forward",
]
