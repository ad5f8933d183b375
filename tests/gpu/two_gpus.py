"""Training on two GPUs, one process each: python tests/gpu/two_gpus.py DDP | fully_shard | DTensor | context_parallel

Says "right" where the gradients are those of one GPU.
"""

from __future__ import annotations

import itertools
import socket
import sys

import torch

from fa2gen.distributed import (
    context_parallel_attention,
    context_parallel_varlen_attention,
    shard,
    unshard,
)
from fa2gen.ops import attention, flash_attn_func
from fa2gen.reference import check, check_gradients


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = torch.nn.Linear(256, 3 * 256, bias=False)
        self.out = torch.nn.Linear(256, 256, bias=False)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 64)).unbind(2)
        return x + self.out(flash_attn_func(q, k, v, causal=True).flatten(2))


def _block(device):
    torch.manual_seed(0)
    return Block().to(device, torch.bfloat16)


def _ddp(rank, device):
    model = torch.nn.parallel.DistributedDataParallel(_block(device), device_ids=[rank])
    return model, lambda: [p.grad for p in model.parameters()]


def _fsdp(rank, device):
    from torch.distributed.fsdp import fully_shard

    model = _block(device)
    fully_shard(model)
    return model, lambda: [p.grad.full_tensor() for p in model.parameters()]


def _trains(make, rank):
    """Each rank has half of the batch; the gradients are those of the whole."""
    device = torch.device("cuda", rank)
    x = torch.randn(4, 200, 256, generator=torch.Generator().manual_seed(1)).to(device, torch.bfloat16)
    whole = _block(device)
    whole(x).float().square().mean().backward()
    model, gradients = make(rank, device)
    model(x[2 * rank : 2 * rank + 2]).float().square().mean().backward()
    for found, expected in zip(gradients(), (p.grad for p in whole.parameters()), strict=True):
        torch.testing.assert_close(found, expected, rtol=5e-2, atol=2e-5)


def _dtensors(rank):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cuda", (2,))
    generator = torch.Generator().manual_seed(0)
    q, k, v, dout = (
        torch.randn(2, 150, heads, 64, generator=generator).to(f"cuda:{rank}", torch.bfloat16) for heads in (4, 2, 2, 4)
    )
    xs = [x.requires_grad_() for x in (q, k, v)]
    for placement in (Shard(0), Shard(2), Replicate(), Shard(1)):
        spread = [distribute_tensor(x.detach(), mesh, [placement]).requires_grad_() for x in xs]
        out, _ = attention(*spread, causal=True)
        found = torch.autograd.grad(out, spread, distribute_tensor(dout, mesh, out.placements))
        assert (out.placements == (placement,)) is (placement != Shard(1))
        assert torch.equal(out.full_tensor(), attention(*xs, causal=True)[0])
        verdict = check_gradients(tuple(x.full_tensor() for x in found), dout, *xs, causal=True)
        assert verdict.ok, verdict
        capped = {"causal": True, "score": "cap * tanh(s / cap)", "inputs": {"cap": 5.0}}
        out, _ = attention(*spread, **capped)
        found = torch.autograd.grad(out, spread, distribute_tensor(dout, mesh, out.placements))
        whole, _ = attention(*xs, **capped)
        assert torch.equal(out.full_tensor(), whole)
        for x, y in zip(found, torch.autograd.grad(whole, xs, dout), strict=True):
            torch.testing.assert_close(x.full_tensor(), y, rtol=2e-2, atol=2e-2)


def _context_parallel(rank):
    """Every scheme and mask by the project's rule, dense and packed; with `deterministic`, the same bits again."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, dout = (
        torch.randn(1, 1200, heads, 64, generator=generator).to(f"cuda:{rank}", torch.bfloat16)
        for heads in (4, 2, 2, 4)
    )
    ends = [0, 300, 301, 777, 1200]
    cu_seqlens = torch.tensor(ends, dtype=torch.int32, device=q.device)
    for scheme, packed, options in itertools.product(
        ("ring", "allgather", "ulysses"),
        (False, True),
        ({"causal": True}, {"causal": False}, {"causal": True, "window_size": (200, 0)}),
    ):
        runs = []
        for _ in range(2):
            xs = [shard(x).requires_grad_() for x in (q, k, v)]
            said = dict(options, scheme=scheme, deterministic=True)
            if packed:
                out, lse = context_parallel_varlen_attention(*(x[0] for x in xs), cu_seqlens, **said)
                out, lse = out[None], lse[None]
            else:
                out, lse = context_parallel_attention(*xs, **said)
            gradients = torch.autograd.grad(out, xs, shard(dout))
            whole = [unshard(x.detach()) for x in (out, *gradients)]
            runs.append([*whole, unshard(lse.detach(), dim=2)])
        assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True)), (scheme, packed, options)
        out, *gradients, lse = runs[0]
        left, _ = options.get("window_size", (-1, -1))
        said = {"causal": options["causal"], "window_left": left}
        for a, b in itertools.pairwise(ends) if packed else [(0, 1200)]:
            rows = [x[:, a:b] for x in (q, k, v)]
            verdict = check(out[:, a:b], lse[..., a:b], *rows, **said)
            assert verdict.ok, (scheme, packed, options, verdict)
            verdict = check_gradients(tuple(x[:, a:b] for x in gradients), dout[:, a:b], *rows, **said)
            assert verdict.ok, (scheme, packed, options, verdict)


WORK = {
    "context_parallel": _context_parallel,
    "DDP": lambda rank: _trains(_ddp, rank),
    "fully_shard": lambda rank: _trains(_fsdp, rank),
    "DTensor": _dtensors,
}


def _worker(rank, port, what):
    torch.cuda.set_device(rank)
    torch.distributed.init_process_group("nccl", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    try:
        WORK[what](rank)
    finally:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        free = found.getsockname()[1]
    torch.multiprocessing.spawn(_worker, (free, sys.argv[1]), nprocs=2)
    print("right")
