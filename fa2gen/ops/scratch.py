"""Memory of a stream's launches: `counter`, CLEARED_BYTES that are 0 between them, `lse`, rows that nobody reads, and
`work` of any content, for launches of several kernels: they hold `lock`, so that no other thread's comes between."""

from __future__ import annotations

import threading
from typing import Any

import torch

from fa2gen.layout import align_up

__all__ = ["CLEARED_BYTES", "WORK_BYTES", "StreamScratch", "scratch_of_capture", "scratch_of_stream", "zeros_of_stream"]

WORK_BYTES = 1 << 16  # a ragged batch of 500 sequences and 30,000 rows takes as much

CLEARED_BYTES = 128  # the place of two counters, and an alignment that suffices for what lies behind it

_WORK_ALIGNMENT = 128


class StreamScratch:
    """Addresses in one piece of zeroed memory, and what keeps it: None where it is never freed."""

    __slots__ = ("_keeper", "counter", "lock", "lse", "work")

    def __init__(self, address: int, rows: int, keeper: Any = None) -> None:
        self.counter, self.lse, self._keeper = address, address + CLEARED_BYTES, keeper
        self.work = address + _work_at(rows)
        self.lock = threading.Lock()


def _work_at(rows: int) -> int:
    return align_up(CLEARED_BYTES + 4 * rows, _WORK_ALIGNMENT)


def scratch_of_stream(device: int, stream: int, rows: int) -> StreamScratch:
    """For all launches on a stream (its handle) from now on, for the rest of the process.

    From the driver, not from torch's allocator: that would take it out of the memory pool which the caller has put in
    force (`torch.cuda.use_mem_pool`, the warm-up runs of torch.compile's CUDA graphs), and memory that outlives the
    call keeps a pool in use; CUDA graph trees refuse to go on when they find it.
    """
    from fa2gen.kernel import zeroed_memory

    return StreamScratch(zeroed_memory(device, _work_at(rows) + WORK_BYTES, stream), rows)


def scratch_of_capture(device: int, rows: int) -> StreamScratch:
    """For one launch that is being captured, without `work`: from the graph's own pool, zeroed by a node of the graph,
    and freed for what the graph does later as soon as the caller drops it."""
    memory = torch.zeros(CLEARED_BYTES // 4 + rows, dtype=torch.int32, device=f"cuda:{device}")
    return StreamScratch(memory.data_ptr(), rows, memory)


def zeros_of_stream(device: int, stream: int, num_bytes: int) -> int:
    """Address of zeros for all launches on a stream, each of which leaves them so; as in `scratch_of_stream`."""
    from fa2gen.kernel import zeroed_memory

    return zeroed_memory(device, num_bytes, stream)
