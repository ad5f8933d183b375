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


def swap(
    sent: Sequence[Sequence[Tensor]], into: Sequence[Sequence[Tensor]], result: Result, group: ProcessGroup
) -> Pending[Result]:
    """`result`, once all has come: sent[r] goes to the r-th process, and what that sends here comes into into[r], one
    contiguous tensor after the other."""
    operations = []
    for rank, (to, source) in enumerate(zip(sent, into, strict=True)):
        if rank != group.rank():
            other = dist.get_global_rank(group, rank)
            operations += [dist.P2POp(_send, x, other, group) for x in to]
            operations += [dist.P2POp(_receive, x, other, group) for x in source]
    works = dist.batch_isend_irecv(operations) if operations else ()
    for x, found in zip(sent[group.rank()], into[group.rank()], strict=True):  # while the others travel
        found.copy_(x)
    return Pending(result, works, sent)


def hop(tensors: Sequence[Tensor], distance: int, group: ProcessGroup) -> Pending[list[Tensor]]:
    """Those of the process `distance` ranks before this one, round the end; this one's go as far ahead."""
    rank, world = group.rank(), group.size()
    sent = [x.contiguous() for x in tensors]
    found = [torch.empty_like(x) for x in sent]
    to, source = (dist.get_global_rank(group, (rank + step) % world) for step in (distance, -distance))
    operations = [dist.P2POp(_send, x, to, group) for x in sent]
    operations += [dist.P2POp(_receive, x, source, group) for x in found]
    return Pending(found, dist.batch_isend_irecv(operations), sent)
