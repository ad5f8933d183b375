"""torch's context_parallel over fa2gen on the CPU, one process of several: RANK WORLD STORE, a file that they share.

Exits with an error where out or gradients of its part are not those of one process.
"""

from __future__ import annotations

import os
import sys

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.experimental import context_parallel
from torch.distributed.tensor.experimental._attention import context_parallel_unshard

from fa2gen.integrations.sdpa import Overrides

SEQLEN = 64


def attend(q, k, v, dout):
    """out and gradients, by the operator that F.scaled_dot_product_attention calls on a GPU."""
    out = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True)[0]
    return out, *torch.autograd.grad(out, (q, k, v), dout)


def main(rank: int, world: int, store: str) -> None:
    dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=world)
    overrides = Overrides("CPU")
    mesh = init_device_mesh("cpu", (world,))
    torch.manual_seed(0)
    whole = [torch.randn(1, 4, SEQLEN, 16).bfloat16() for _ in range(4)]
    *leaves, dout = (x.clone() for x in whole)
    expected = attend(*(x.requires_grad_() for x in leaves), dout)
    with context_parallel(mesh, buffers=whole, buffer_seq_dims=[2] * 4):  # shards them, in place
        *parts, dout = (DTensor.from_local(x.clone(), mesh, [Shard(2)]) for x in whole)
        found = attend(*(x.requires_grad_() for x in parts), dout)
        local = [x.detach().to_local() for x in found]
    assert local[0].shape[2] == SEQLEN // world
    for name, x, right in zip(
        ("out", "dq", "dk", "dv"), context_parallel_unshard(mesh, local, [2] * 4), expected, strict=True
    ):
        torch.testing.assert_close(x, right.detach(), rtol=0, atol=3e-2, msg=lambda m, name=name: f"{name}: {m}")
    overrides.remove()
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
    os._exit(0)  # a thread of torch's that still runs would abort the interpreter's end: about one of three did
