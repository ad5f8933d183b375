"""Trains one attention layer on sequences that no process has whole, and compares its losses with one process's.

    torchrun --nproc-per-node 2 examples/context_parallel.py
    torchrun --nproc-per-node 8 examples/context_parallel.py --rows 131072 --scheme allgather

On GPUs over NCCL, else on the CPU over gloo. Only attention has to know: all else is done row by row. Says "right".
"""

from __future__ import annotations

import argparse

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from fa2gen import attention
from fa2gen.distributed import context_parallel_attention, positions, shard

VOCABULARY, HEADS, HEAD_DIM, STEPS = 64, 4, 32, 5


class Layer(nn.Module):
    """Logits (batch, rows, vocabulary) of tokens (batch, rows) at positions `at` (rows,)."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, HEADS * HEAD_DIM)
        self.qkv = nn.Linear(HEADS * HEAD_DIM, 3 * HEADS * HEAD_DIM)
        self.out = nn.Linear(HEADS * HEAD_DIM, VOCABULARY)

    def forward(self, tokens: Tensor, at: Tensor, scheme: str | None) -> Tensor:
        q, k, v = self.qkv(self.tokens(tokens)).to(torch.bfloat16).unflatten(-1, (3, HEADS, HEAD_DIM)).unbind(2)
        q, k = rotated(q, at), rotated(k, at)
        if scheme is None:
            mixed, _ = attention(q, k, v, causal=True)
        else:
            mixed, _ = context_parallel_attention(q, k, v, causal=True, scheme=scheme)
        logits: Tensor = self.out(mixed.flatten(2).float())
        return logits


def rotated(x: Tensor, at: Tensor) -> Tensor:
    """Rotary embedding of x (batch, rows, heads, head_dim), by where its rows stand in the whole sequence."""
    angles = at[:, None] * 10000.0 ** (-torch.arange(0, HEAD_DIM, 2, device=x.device) / HEAD_DIM)
    turn = torch.polar(torch.ones_like(angles), angles)[:, None]
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * turn).flatten(-2).to(x.dtype)


def train(tokens: Tensor, targets: Tensor, at: Tensor, scheme: str | None) -> list[float]:
    """The losses of a few steps, over the rows of all processes that take part: of one alone where scheme is None."""
    torch.manual_seed(0)
    layer = Layer().to(tokens.device)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-2)
    losses = []
    for _ in range(STEPS):
        loss = functional.cross_entropy(layer(tokens, at, scheme).flatten(0, 1), targets.flatten())
        loss.backward()
        told = loss.detach()
        if scheme is not None:  # each process has as many rows: means of means
            for x in (told, *(p.grad for p in layer.parameters())):
                dist.all_reduce(x)
                x /= dist.get_world_size()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(told.item())
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=256, help="of a sequence, over all processes")
    parser.add_argument("--scheme", default="auto", choices=["auto", "ring", "allgather", "ulysses"])
    given = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    dist.init_process_group("nccl" if on_gpu else "gloo")
    rank, device = dist.get_rank(), torch.device("cpu")
    if on_gpu:
        device = torch.device("cuda", rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    text = torch.randint(VOCABULARY, (2, given.rows + 1), generator=torch.Generator().manual_seed(0)).to(device)
    tokens, targets, at = text[:, :-1], text[:, 1:], torch.arange(given.rows, device=device)
    spread = train(shard(tokens), shard(targets), positions(given.rows, device=device), given.scheme)
    alone = train(tokens, targets, at, None)
    if rank == 0:
        print(f"{dist.get_world_size()} processes: {' '.join(f'{loss:.4f}' for loss in spread)}")
        print(f"one process:  {' '.join(f'{loss:.4f}' for loss in alone)}")
        print("right" if torch.allclose(torch.tensor(spread), torch.tensor(alone), atol=2e-3) else "WRONG")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
