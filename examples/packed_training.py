"""Trains on documents of their own lengths, packed one behind the other: nothing is padded, and none sees another.

    python examples/packed_training.py

On a GPU if there is one. Compares the losses with those of the same documents padded to the longest. Says "right".
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from fa2gen import flash_attn_func, flash_attn_varlen_func
from fa2gen.padding import unpad_input

VOCABULARY, HEADS, HEAD_DIM, STEPS = 64, 4, 32, 5
LENGTHS = (130, 9, 64, 97, 1, 40)


class Layer(nn.Module):
    """Logits (..., vocabulary) of tokens (...): packed with cu_seqlens, else (batch, seqlen)."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, HEADS * HEAD_DIM)
        self.qkv = nn.Linear(HEADS * HEAD_DIM, 3 * HEADS * HEAD_DIM)
        self.out = nn.Linear(HEADS * HEAD_DIM, VOCABULARY)

    def forward(self, tokens: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        qkv = self.qkv(self.tokens(tokens)).to(torch.bfloat16).unflatten(-1, (3, HEADS, HEAD_DIM))
        q, k, v = qkv.unbind(-3)
        if cu_seqlens is None:
            mixed = flash_attn_func(q, k, v, causal=True)
        else:
            mixed = flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, causal=True)
        logits: Tensor = self.out(mixed.flatten(-2).float())
        return logits


def train(tokens: Tensor, targets: Tensor, cu_seqlens: Tensor | None) -> list[float]:
    """The losses of a few steps; a target of -100 does not count."""
    torch.manual_seed(0)
    layer = Layer().to(tokens.device)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-2)
    losses = []
    for _ in range(STEPS):
        loss = functional.cross_entropy(layer(tokens, cu_seqlens).flatten(0, -2), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    text = torch.randint(VOCABULARY, (len(LENGTHS), max(LENGTHS) + 1), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    text, mask = text.to(device), mask.to(device)
    tokens, targets = text[:, :-1], text[:, 1:]
    packed, indices, cu_seqlens, _, _ = unpad_input(tokens.unsqueeze(-1), mask)  # cu_seqlens (documents + 1,) int32
    of_packed = train(packed.squeeze(-1), targets.flatten()[indices], cu_seqlens)
    of_padded = train(tokens, targets.masked_fill(~mask, -100), None)
    print(f"packed: {packed.shape[0]:4} rows, losses {' '.join(f'{loss:.4f}' for loss in of_packed)}")
    print(f"padded: {mask.numel():4} rows, losses {' '.join(f'{loss:.4f}' for loss in of_padded)}")
    print("right" if torch.allclose(torch.tensor(of_packed), torch.tensor(of_padded), atol=2e-3) else "WRONG")


if __name__ == "__main__":
    main()
