"""Tensors amid NaN: a kernel that reads too far shows it in its result, one that writes too far in the guard."""

from __future__ import annotations

import torch

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
NAN = float("nan")
GUARD_ROWS = 3  # of NaN, behind the rows of each batch


def amid_nan(values: torch.Tensor) -> torch.Tensor:
    """The same tensor, (batch, seqlen, ...), with NaN behind the rows of each batch."""
    batch, seqlen, *rest = values.shape
    buffer = values.new_full((batch, seqlen + GUARD_ROWS, *rest), NAN)
    buffer[:, :seqlen] = values
    return buffer[:, :seqlen]


def assert_guard_is_intact(values: torch.Tensor) -> None:
    """Of a tensor that amid_nan made: what is not NaN is in its rows."""
    whole = values.as_strided((values.stride(0) * values.shape[0],), (1,))  # with the guard rows
    assert int((~whole.isnan()).sum()) == int((~values.isnan()).sum()), "rows behind a batch were written"
