"""Kernels on the CPU: the same templates over templates/host/, which models the machine (see its README).

`forward_into` runs a forward kernel, `run_backward` the three of a backward pass; `Options` says how: schedule seed,
sanitizers, counters. Needs g++ or clang++.
"""

from __future__ import annotations

from fa2gen.host.backward import run_backward
from fa2gen.host.build import Library, build_library, find_compiler
from fa2gen.host.forward import Options, Report, forward_into, run_forward
from fa2gen.host.run import PRIMITIVES, Count, KernelFault
from fa2gen.host.stats import counts_table

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
