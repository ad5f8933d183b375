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
    contiguous tensor after the other, as many from and to each."""
    mine = group.rank()
    works = [
        _swap_one(list(to_each), list(from_each), group)
        for to_each, from_each in zip(zip(*sent, strict=True), zip(*into, strict=True), strict=True)
    ]
    for x, found in zip(sent[mine], into[mine], strict=True):  # while the others travel
        found.copy_(x)
    return Pending(result, [work for some in works for work in some], sent)


def _swap_one(sent: list[Tensor], into: list[Tensor], group: ProcessGroup) -> list[Any]:
    """sent[r] to the r-th process, but for this one, and into[r] from it. gloo has messages alone; NCCL takes a list in
    one call, where twelve messages took the host 0.8 ms, for which a GPU with nothing else to do waited."""
    mine = group.rank()
    if sent[mine].is_cuda and len(sent) > 1:
        sent[mine], into[mine] = sent[mine].new_empty(0), into[mine].new_empty(0)  # which NCCL passes by
        return [dist.all_to_all(into, sent, group=group, async_op=True)]
    others = [(rank, dist.get_global_rank(group, rank)) for rank in range(group.size()) if rank != mine]
    operations = [dist.P2POp(_send, sent[rank], other, group) for rank, other in others]
    operations += [dist.P2POp(_receive, into[rank], other, group) for rank, other in others]
    return list(dist.batch_isend_irecv(operations)) if operations else []


def hop(tensors: Sequence[Tensor], distance: int, group: ProcessGroup) -> Pending[list[Tensor]]:
    """Those of the process `distance` ranks before this one, round the end; this one's go as far ahead."""
    rank, world = group.rank(), group.size()
    sent = [x.contiguous() for x in tensors]
    found = [torch.empty_like(x) for x in sent]
    to, source = (dist.get_global_rank(group, (rank + step) % world) for step in (distance, -distance))
    operations = [dist.P2POp(_send, x, to, group) for x in sent]
    operations += [dist.P2POp(_receive, x, source, group) for x in found]
    return Pending(found, dist.batch_isend_irecv(operations), sent)
