"""Memory of a stream's launches: `counter`, an int32 that is 0 between them, and `lse`, rows that nobody reads."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["StreamScratch", "scratch_of_capture", "scratch_of_stream"]

_LSE_AT = 16  # bytes behind the counter, as rows are stored 16 bytes at once


class StreamScratch:
    """Addresses in one piece of zeroed memory, and what keeps it: None where it is never freed."""

    __slots__ = ("_keeper", "counter", "lse")

    def __init__(self, address: int, keeper: Any = None) -> None:
        self.counter, self.lse, self._keeper = address, address + _LSE_AT, keeper


def scratch_of_stream(device: int, stream: int, rows: int) -> StreamScratch:
    """For all launches on a stream (its handle) from now on, for the rest of the process.

    From the driver, not from torch's allocator: that would take it out of the memory pool which the caller has put in
    force (`torch.cuda.use_mem_pool`, the warm-up runs of torch.compile's CUDA graphs), and memory that outlives the
    call keeps a pool in use; CUDA graph trees refuse to go on when they find it.
    """
    from fa2gen.kernel import zeroed_memory

    return StreamScratch(zeroed_memory(device, _LSE_AT + 4 * rows, stream))


def scratch_of_capture(device: int, rows: int) -> StreamScratch:
    """For one launch that is being captured: from the graph's own pool, zeroed by a node of the graph, and freed for
    what the graph does later as soon as the caller drops it."""
    memory = torch.zeros(_LSE_AT // 4 + rows, dtype=torch.int32, device=f"cuda:{device}")
    return StreamScratch(memory.data_ptr(), memory)
