"""Collectives that travel while something else is computed.

Each is started at once and waited for where its result is used: on a GPU the current stream waits then, not the host.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

__all__ = ["Pending", "all_gather", "all_to_all", "hop", "swap"]


Result = TypeVar("Result")
_send: Callable[..., Any] = dist.isend
_receive: Callable[..., Any] = dist.irecv


class Pending(Generic[Result]):
    """A result that is on its way."""

    def __init__(self, result: Result, works: Sequence[Any], sent: Any = None) -> None:
        self._result, self._works = result, works
        self._sent = sent  # memory that must stay until it is sent

    def wait(self) -> Result:
        """The result, for what is computed from now on."""
        for work in self._works:
            work.wait()
        self._works, self._sent = (), None
        return self._result


def all_gather(x: Tensor, group: ProcessGroup) -> Pending[Tensor]:
    """(W, ...): x of each process, in the order of ranks."""
    x = x.contiguous()
    found = x.new_empty((group.size(), *x.shape))
    work = dist.all_gather_into_tensor(found.flatten(0, 1), x, group=group, async_op=True)
    return Pending(found, [work], x)


def all_to_all(x: Tensor, group: ProcessGroup) -> Pending[Tensor]:
    """Of x (W, ...), which has a part for each process, the parts for this one: (W, ...), in the order of ranks."""
    x = x.contiguous()
    found = torch.empty_like(x)
    work = dist.all_to_all_single(found, x, group=group, async_op=True)
    return Pending(found, [work], x)


def swap(sent: Sequence[Tensor], into: Sequence[Tensor], group: ProcessGroup) -> Pending[Sequence[Tensor]]:
    """`into`, once all has come: sent[r] goes to the r-th process, and what that sends here comes into into[r]. All are
    contiguous.

    gloo has messages alone; NCCL takes a list in one call, where twelve messages took the host 0.8 ms, for which a GPU
    with nothing else to do waited.
    """
    mine = group.rank()
    if sent[mine].is_cuda and len(sent) > 1:
        nothing = sent[mine].new_empty(0)  # which NCCL passes by
        to, source = ([nothing if rank == mine else x for rank, x in enumerate(side)] for side in (sent, into))
        works = [dist.all_to_all(source, to, group=group, async_op=True)]
    else:
        others = [(rank, dist.get_global_rank(group, rank)) for rank in range(group.size()) if rank != mine]
        operations = [dist.P2POp(_send, sent[rank], other, group) for rank, other in others]
        operations += [dist.P2POp(_receive, into[rank], other, group) for rank, other in others]
        works = dist.batch_isend_irecv(operations) if operations else []
    into[mine].copy_(sent[mine])  # while the others travel
    return Pending(into, works, sent)


def hop(tensors: Sequence[Tensor], distance: int, group: ProcessGroup) -> Pending[list[Tensor]]:
    """Those of the process `distance` ranks before this one, round the end; this one's go as far ahead."""
    rank, world = group.rank(), group.size()
    sent = [x.contiguous() for x in tensors]
    found = [torch.empty_like(x) for x in sent]
    to, source = (dist.get_global_rank(group, (rank + step) % world) for step in (distance, -distance))
    operations = [dist.P2POp(_send, x, to, group) for x in sent]
    operations += [dist.P2POp(_receive, x, source, group) for x in found]
    return Pending(found, dist.batch_isend_irecv(operations), sent)
