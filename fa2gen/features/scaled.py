"""Caches of 8-bit numbers, each times the scale (descale) of its sequence and head of K or V, on the device.

Kernels multiply in fp16, which holds every e4m3 and int8 number: the scale of K goes into that of scores, the scale of
V into what O is divided by, so that none is applied to an element. What a call appends is divided by its scale.

For kernels that take no 8-bit numbers another one, <kernel>_widen, writes the first keys of each sequence, and their
values, times their scales in 16 bits: once, where each block of a forward kernel's queries would convert them again.
"""

from __future__ import annotations

from fa2gen.features.attention import Operand
from fa2gen.features.base import Feature, Param

__all__ = ["SCALED"]

_NUMBERS = ("k_scale_batch", "k_scale_head", "v_scale_batch", "v_scale_head", "seqlen_wide")


SCALED = Feature(
    "scaled",
    operands=(
        Operand("k_descale", "scale", optional=True),
        Operand("v_descale", "scale", optional=True),
        Operand("k_wide", "wide", out=True, optional=True),
        Operand("v_wide", "wide", of_v=True, out=True, optional=True),
    ),
    params=tuple(Param(name, "int") for name in (*_NUMBERS, "num_wide_blocks")),
    formulas={name: name for name in _NUMBERS},
)
