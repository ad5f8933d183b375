"""Attention whose scores are an expression: it is differentiated by symbols and written into the kernel.

    python examples/score_expression.py

On a GPU if there is one. Compares results and gradients with PyTorch's own of the same definition. Says "right".
"""

from __future__ import annotations

import torch
from torch import Tensor

from fa2gen import attention

HEADS, HEAD_DIM, ROWS, CAP = 4, 64, 150, 3.0


def capped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention with softly capped scores, as it is defined; q, k, v (batch, rows, heads, head_dim)."""
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * HEAD_DIM**-0.5
    scores = CAP * torch.tanh(scores / CAP)
    hidden = torch.ones(ROWS, ROWS, dtype=torch.bool, device=q.device).triu(1)
    return torch.einsum("bhij,bjhd->bihd", scores.masked_fill(hidden, float("-inf")).softmax(-1), v)


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)
    q, k, v, dout = (
        torch.randn(2, ROWS, HEADS, HEAD_DIM, generator=generator).to(device, torch.bfloat16) for _ in range(4)
    )
    ours, exact = ([x.to(dtype).requires_grad_() for x in (q, k, v)] for dtype in (torch.bfloat16, torch.float32))
    out, _ = attention(*ours, causal=True, score="cap * tanh(s / cap)", inputs={"cap": CAP})
    expected = capped(*exact)
    found = (out, *torch.autograd.grad(out, ours, dout))
    truth = (expected, *torch.autograd.grad(expected, exact, dout.float()))
    right = True
    for name, x, y in zip(("out", "dq", "dk", "dv"), found, truth, strict=True):
        error = ((x.float() - y).norm() / y.norm()).item()
        right = right and error < 0.01
        print(f"{name:3} {error:.1e} from its definition")
    print("right" if right else "WRONG")


if __name__ == "__main__":
    main()
