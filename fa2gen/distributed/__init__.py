"""Context parallel: attention of a sequence that lies on several devices, forward and backward, over torch.distributed.

    from fa2gen.distributed import context_parallel_attention, positions, shard

    x = shard(x, group)     # (batch, seqlen, ...) -> this process's (batch, seqlen / W, ...)
    ...                     # q, k, v of these rows, with positions(seqlen, group) for rotary embeddings
    out, lse = context_parallel_attention(q, k, v, group=group, causal=True)

W is the number of processes of the group. Each has as many rows: with layout "contiguous" the rank-th part of the
sequence, with "zigzag" the rank-th part of 2 W from the front and the one from the back, so that under a causal mask
all have the same work. Results lie as the inputs do. Three schemes, of which each is right for every mask:

    ulysses     all rows of H / W heads instead of S / W rows of all heads: two exchanges, and one plain call.
    allgather   K and V of all processes, some heads at a time; this process's queries.
    ring        K and V go from process to process; partial results are merged in fp32 by their LSE.

What the next call needs travels while a call computes: collectives are asynchronous, on the backend's own stream.
Sums of what several processes have for one row are made in fp32, in the order of ranks, so that results are the same
bits in every run (of dq, where deterministic). What is merged, outputs in the ring and gradients also in allgather,
kernels give in fp32, and it is rounded once, when it is whole.
"""

from __future__ import annotations

from fa2gen.distributed.attention import context_parallel_attention, context_parallel_varlen_attention
from fa2gen.distributed.layout import positions, shard, unshard

__all__ = ["context_parallel_attention", "context_parallel_varlen_attention", "positions", "shard", "unshard"]
