"""The tensors of every attention kernel: what Params, tensor maps, checks, strides and memory are derived from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fa2gen.layout import ELEMENT_BYTES, NUMBER_BYTES
from fa2gen.options import AnyShape, CacheShape
from fa2gen.spec import SAME, Direction, Problem

__all__ = ["OPERANDS", "Operand"]


@dataclass(frozen=True)
class Operand:
    """One tensor of a kernel.

    of        whose rows and heads it has: "query" and "key" tensors are (batch, seqlen, heads, head_dim) in the
              kernel's dtype, results of a partial problem in fp32, the head dim contiguous; "row" tensors are (batch,
              num_heads, seqlen_q), fp32, dense; "bounds" (batch + 1,) and "lengths" (batch,), int32, dense; "head"
              (num_heads,), fp32, dense; "state" (4,), int32, 128 random bits.
              "cache" is a tensor with rows of its own, (entries, rows, heads_kv, head_dim), and so are "key" tensors
              that lie in pages; "table" (batch, pages), int32, the numbers of a sequence's pages; "new" keys are
              (batch, seqlen_new, heads_kv, head_dim), in the kernel's dtype; so are "wide" ones (batch, seqlen_wide,
              heads_kv, head_dim) and "angles" (positions, rotary_dim / 2), both dense. "floats" and "ints" are what an
              expression names, fp32 and int32, dense, of any size: a call's options say which. "scale" (batch,
              heads_kv), fp32, of steps that the call says.
    of_v      of a tensor with a head dim: whether it is V's, else that of Q and K.
    out       whether kernels write it.
    optional  whether it may be missing: its address is 0 then.
    """

    name: str
    of: Literal[
        "query",
        "key",
        "row",
        "bounds",
        "lengths",
        "cache",
        "table",
        "new",
        "wide",
        "angles",
        "head",
        "state",
        "floats",
        "ints",
        "scale",
    ]
    of_v: bool = False
    out: bool = False
    optional: bool = False

    def head_dim(self, problem: Problem) -> int:
        """Of a tensor that has one."""
        return problem.head_dims[self.of_v]

    def shape(self, shape: AnyShape, problem: Problem) -> tuple[int, ...]:
        """Its sizes at a call; those of a ragged batch's packed tensors with a batch of one before them."""
        if isinstance(shape, CacheShape) and self.of == "table":
            return (shape.table_rows, shape.seqlen_k // shape.page_size)
        if isinstance(shape, CacheShape) and self.of == "new":
            return (shape.batch, shape.seqlen_new, shape.num_heads_kv, self.head_dim(problem))
        if isinstance(shape, CacheShape) and self.of == "wide":
            return (shape.batch, shape.seqlen_wide, shape.num_heads_kv, self.head_dim(problem))
        if isinstance(shape, CacheShape) and self.of == "angles":
            return (shape.rotary_rows, shape.rotary_dim // 2)
        if isinstance(shape, CacheShape) and self.of in ("cache", "key"):
            return (shape.entries, shape.page_size or shape.seqlen_k, shape.num_heads_kv, self.head_dim(problem))
        if self.of in ("bounds", "lengths"):
            return (shape.batch + (self.of == "bounds"),)
        if self.of == "state":
            return (4,)
        if self.of == "head":
            return (shape.num_heads,)
        if self.of == "scale":
            return (shape.batch, shape.num_heads_kv)
        if self.is_input:
            return ()
        batch = 1 if problem.varlen else shape.batch
        if self.of == "row":
            return (batch, shape.num_heads, shape.seqlen_q)
        if self.of == "key":
            return (batch, shape.seqlen_k, shape.num_heads_kv, self.head_dim(problem))
        return (batch, shape.seqlen_q, shape.num_heads, self.head_dim(problem))

    @property
    def is_tensor(self) -> bool:
        """Whether it is (batch, seqlen, heads, head_dim), with strides."""
        return self.of in ("query", "key", "cache", "new")

    def element_bytes(self, problem: Problem) -> int:
        """Of one of its numbers."""
        if self.of == "cache" and problem.cache_dtype != SAME:
            return 1
        if self.out and problem.partial:
            return NUMBER_BYTES
        return ELEMENT_BYTES if self.is_tensor or self.of in ("angles", "wide") else NUMBER_BYTES

    @property
    def is_input(self) -> bool:
        """Whether an expression names it."""
        return self.of in ("floats", "ints")

    @property
    def ctype(self) -> str:
        """Of the pointer to it in Params."""
        int_or_float = {"row": "float", "head": "float", "bounds": "int", "lengths": "int", "table": "int"}
        int_or_float |= {"floats": "float", "ints": "int", "state": "int", "scale": "float"}
        of = int_or_float.get(self.of, "void")
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
    "decode": (
        Operand("q", "query", out=True),
        Operand("k", "cache", out=True),
        Operand("v", "cache", of_v=True, out=True),
        Operand("o", "query", of_v=True, out=True),
        Operand("lse", "row", out=True),
        Operand("cache_seqlens", "lengths", optional=True),
        Operand("cache_leftpad", "lengths", optional=True),
        Operand("cache_batch_idx", "lengths", optional=True),
        # Of a call that appends: what is written into the caches before, and Q as it is without rotary embeddings.
        Operand("k_new", "new", optional=True),
        Operand("v_new", "new", of_v=True, optional=True),
        Operand("q_given", "query", optional=True),
        Operand("rotary_cos", "angles", optional=True),
        Operand("rotary_sin", "angles", optional=True),
    ),
}
"""Of each pass, in the order in which a launch takes their addresses; scratch memory follows them."""
