"""One process of test_distributed.py: python distributed_worker.py RANK WORLD FILE

Reads cases from standard input, and answers each with what this process has of the results, or with the text of an
error; both as pickles.
"""

from __future__ import annotations

import os
import pickle
import sys
import traceback
from datetime import timedelta

import torch
import torch.distributed as dist

from fa2gen.distributed import (
    context_parallel_attention,
    context_parallel_varlen_attention,
    positions,
    shard,
    unshard,
)


def inputs(case):
    """(q, k, v, dout, dlse) of all processes together."""
    generator = torch.Generator().manual_seed(case.get("seed", 0))
    batch, rows, heads, heads_kv = case["sizes"]
    lead = (rows,) if "cu_seqlens" in case else (batch, rows)
    values = case.get("head_dim_v", 32)
    sizes = ((heads, 32), (heads_kv, 32), (heads_kv, values), (heads, values))
    tensors = [torch.randn(*lead, *size, generator=generator).to(torch.bfloat16) for size in sizes]
    return *tensors, torch.randn(*lead[:-1], heads, rows, generator=generator)


def attend(case, group):
    """Results and gradients of this process's rows."""
    packed = "cu_seqlens" in case
    layout, at = case["options"].get("layout", "zigzag"), 0 if packed else 1
    whole = inputs(case)
    q, k, v, dout = (shard(x, group, at, layout) for x in whole[:4])
    dlse = shard(whole[4], group, whole[4].dim() - 1, layout)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    options = dict(case["options"], group=group)
    if case.get("sinks"):
        leaves.append(torch.linspace(-1, 2, q.shape[-2]).requires_grad_())
        options["s_aux"] = leaves[-1]
    if packed:
        cu_seqlens = torch.tensor(case["cu_seqlens"], dtype=torch.int32)
        out, lse = context_parallel_varlen_attention(q, k, v, cu_seqlens, **options)
    else:
        out, lse = context_parallel_attention(q, k, v, **options)
    found = [out.detach(), lse.detach()]
    if case.get("lse_on") == "some" and group.rank() % 2:
        torch.autograd.backward([out], [dout])
    else:
        torch.autograd.backward([out, lse.masked_fill(torch.isneginf(lse), 0.0)], [dout, dlse])
    return found + [x.grad for x in leaves]


def rows(case, group):
    """What the functions of layouts say here: (a shard, its whole, positions)."""
    x = torch.arange(48).view(2, 24).float()
    here = shard(x, group, 1, case["layout"])
    packed = positions(24, group, case["layout"], cu_seqlens=torch.tensor([0, 5, 5, 18, 22], dtype=torch.int32))
    return here, unshard(here, group, 1, case["layout"]), positions(24, group, case["layout"]), packed


def main(rank, world, meeting):
    cases, answers = os.fdopen(0, "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what others print is no answer
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{meeting}", timedelta(seconds=60), world_size=world, rank=rank)
    groups = {}
    while (case := pickle.load(cases)) is not None:
        members = tuple(case["members"])
        if members not in groups:
            groups[members] = dist.new_group(members)
        if rank in members:
            try:
                answer = {"attend": attend, "rows": rows}[case.get("do", "attend")](case, groups[members])
            except Exception:
                answer = traceback.format_exc()
            pickle.dump(answer, answers)
            answers.flush()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
