"""A window: each query sees keys about its own place alone, so many before and after it, and of its own chunk.

One kernel serves every window, with a causal mask or not, since all of it are numbers of the call. It is the most
general of the masks.
"""

from __future__ import annotations

from fa2gen.features.base import Feature, Param

__all__ = ["WINDOW"]


WINDOW = Feature(
    "window",
    rooms={"mask": "window"},
    params=tuple(Param(name, "int") for name in ("window_left", "window_right", "chunk", "chunk_before")),
    # A limit that hides nothing stands for none. None goes beyond the lengths, so that no sum exceeds 32 bits. Without
    # chunks all keys are one, and chunk_before, the end of what queries before key 0 may see, is as long.
    formulas={
        "window_left": "limited(window_left, seqlen_k)",
        "window_right": "limited(window_right, seqlen_q)",
        "chunk": "limited(chunk - 1, max(seqlen_q, seqlen_k) - 1) + 1",
        "chunk_before": "(chunk < 1) * max(seqlen_q, seqlen_k)",
    },
    uneven=True,
    right_edge=True,
    left_edge=True,
    general=True,
    examples=(
        {"causal": True, "window_left": 128},
        {"window_left": 64, "window_right": 32},
        {"window_left": 0, "window_right": 17},
        {"window_right": 100},
        {"causal": True, "chunk": 48},
        {"window_left": 16, "chunk": 128},
    ),
)
