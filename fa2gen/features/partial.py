"""Partial results, in fp32: O of some of the keys, to be merged with that of others by LSE, or gradients, to be added.

O = sum of exp(LSE_i - LSE) O_i, with LSE = log of the sum of exp(LSE_i): rounded to 16 bits before, each part would add
an error as large as that of the whole; and so would each part of dQ, dK and dV. It is what the other kernels round,
stored from registers.
"""

from __future__ import annotations

from fa2gen.features.base import Feature

__all__ = ["PARTIAL"]

PARTIAL = Feature("partial", examples=({"partial": True},))
