"""A bias of scores that is learned: one number a head and distance, by gradients that the kernels make.

    python examples/learned_bias.py

On a GPU if there is one. A teacher attends with numbers of its own; a student that begins at 0 is trained to give what
it gives. Says "right".
"""

from __future__ import annotations

import torch
from torch import Tensor

from fa2gen import attention

HEADS, HEAD_DIM, ROWS, DISTANCES, STEPS = 2, 32, 64, 8, 40


def attend(q: Tensor, k: Tensor, v: Tensor, far: Tensor) -> Tensor:
    """Causal attention, out (batch, rows, heads, head_dim); far (heads, distances) fp32, of which the last is that of
    all keys that are farther away."""
    return attention(q, k, v, causal=True, score="s + far[h, i - j]", inputs={"far": far})[0].float()


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(HEADS, DISTANCES, generator=generator).to(device)
    far = torch.zeros_like(teacher).requires_grad_()
    optimizer = torch.optim.Adam([far], lr=0.2)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, STEPS)
    losses = []
    for step in range(STEPS):
        q, k, v = (
            torch.randn(2, ROWS, HEADS, HEAD_DIM, generator=generator).to(device, torch.float16) for _ in range(3)
        )
        loss = (attend(q, k, v, far) - attend(q, k, v, teacher)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if step % 10 == 0:
            print(f"step {step:2}  loss {losses[-1]:.1e}")
    print(f"loss {losses[0]:.1e}, then {losses[-1]:.1e}")
    print("right" if losses[-1] < losses[0] / 100 else "WRONG")


if __name__ == "__main__":
    main()
