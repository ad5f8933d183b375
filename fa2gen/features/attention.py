"""The tensors of every attention kernel: what Params, tensor maps, checks, strides and memory are derived from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fa2gen.options import Shape
from fa2gen.spec import Direction, Problem

__all__ = ["OPERANDS", "Operand"]


@dataclass(frozen=True)
class Operand:
    """One tensor of a kernel.

    of        whose rows and heads it has: "query" and "key" tensors are (batch, seqlen, heads, head_dim) in the
              kernel's dtype, the head dim contiguous; "row" tensors are (batch, num_heads, seqlen_q), fp32, dense;
              "bounds" (batch + 1,) and "lengths" (batch,), int32, dense; "head" (num_heads,), fp32, dense.
    of_v      of a "query" or "key" tensor: whether its head dim is V's, else that of Q and K.
    out       whether kernels write it.
    optional  whether it may be missing: its address is 0 then.
    """

    name: str
    of: Literal["query", "key", "row", "bounds", "lengths", "head"]
    of_v: bool = False
    out: bool = False
    optional: bool = False

    def head_dim(self, problem: Problem) -> int:
        """Of a "query" or "key" tensor."""
        return problem.head_dims[self.of_v]

    def shape(self, shape: Shape, problem: Problem) -> tuple[int, ...]:
        """Its sizes at a call; those of a ragged batch's packed tensors with a batch of one before them."""
        if self.of in ("bounds", "lengths"):
            return (shape.batch + (self.of == "bounds"),)
        if self.of == "head":
            return (shape.num_heads,)
        batch = 1 if problem.varlen else shape.batch
        if self.of == "row":
            return (batch, shape.num_heads, shape.seqlen_q)
        if self.of == "key":
            return (batch, shape.seqlen_k, shape.num_heads_kv, self.head_dim(problem))
        return (batch, shape.seqlen_q, shape.num_heads, self.head_dim(problem))

    @property
    def is_tensor(self) -> bool:
        """Whether it is (batch, seqlen, heads, head_dim), with strides."""
        return self.of in ("query", "key")

    @property
    def ctype(self) -> str:
        """Of the pointer to it in Params."""
        of = {"row": "float", "head": "float", "bounds": "int", "lengths": "int"}.get(self.of, "void")
        return of + ("*" if self.out else " const*")


OPERANDS: dict[Direction, tuple[Operand, ...]] = {
    "fwd": (
        Operand("q", "query"),
        Operand("k", "key"),
        Operand("v", "key", of_v=True),
        Operand("o", "query", of_v=True, out=True),
        Operand("lse", "row", out=True),
    ),
    "bwd": (
        Operand("q", "query"),
        Operand("k", "key"),
        Operand("v", "key", of_v=True),
        Operand("o", "query", of_v=True),
        Operand("dout", "query", of_v=True),
        Operand("dq", "query", out=True),
        Operand("dk", "key", out=True),
        Operand("dv", "key", of_v=True, out=True),
        Operand("lse", "row"),
        Operand("dlse", "row", optional=True),
    ),
}
"""Of each pass, in the order in which a launch takes their addresses; scratch memory follows them."""
