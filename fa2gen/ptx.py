"""Operand lists of inline assembly, computed here because CUDA C++ cannot generate them.

The templates in templates/ptx/ call these as `ptx.<function>`; everything else about an instruction is in the template.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["MNEMONIC", "Wgmma", "constraint_lines", "constraints", "register_lines", "registers"]

MNEMONIC = {"fp16": "f16", "bf16": "bf16"}
"""How PTX spells a dtype."""


def registers(count: int, first: int = 0) -> str:
    """The PTX vector operand `{%first, ..., %(first + count - 1)}`."""
    return "{" + ", ".join(f"%{first + i}" for i in range(count)) + "}"


def constraints(constraint: str, array: str, count: int) -> str:
    """`"+f"(d[0]), "+f"(d[1]), ...`: one C++ operand for each register of an array."""
    return ", ".join(f'"{constraint}"({array}[{i}])' for i in range(count))


def register_lines(count: int, first: int = 0) -> list[str]:
    """`registers`, broken after every 16th, for lists that no line would hold."""
    return _broken(registers(count, first), 16)


def constraint_lines(constraint: str, array: str, count: int) -> list[str]:
    """`constraints`, broken after every 8th."""
    return _broken(constraints(constraint, array, count), 8)


def _broken(text: str, per_line: int) -> list[str]:
    items = text.split(" ")
    return [" ".join(items[i : i + per_line]) for i in range(0, len(items), per_line)]


@dataclass(frozen=True)
class Wgmma:
    """One shape of wgmma.mma_async m64nNk16 (PTX ISA, "wgmma.mma_async").

    n            columns of the accumulator, a multiple of 8 up to 256.
    a            "shared" (through a matrix descriptor, K-major) or "registers" (four 32-bit registers of 16-bit pairs).
    b_transposed whether B lies MN-major in shared memory ([k][n] rows, as V does), not K-major ([n][k], as K does).
    a_transposed likewise for A in shared memory: [k][m] rows. Registers are always K-major.
    """

    dtype: str
    n: int
    a: str
    b_transposed: bool
    a_transposed: bool = False

    @property
    def function(self) -> str:
        """The wrapper's name. `wgmma_m64n128k16_ss_kk`: both shared, K-major; `rs_km`: A in registers, B MN-major."""
        source = "ss" if self.a == "shared" else "rs"
        majors = "".join("m" if transposed else "k" for transposed in (self.a_transposed, self.b_transposed))
        return f"wgmma_m64n{self.n}k16_{source}_{majors}"

    @property
    def num_accumulators(self) -> int:
        """fp32 accumulator registers of one thread: 64 * n / 128."""
        return self.n // 2

    @property
    def instruction(self) -> str:
        element = MNEMONIC[self.dtype]
        return f"wgmma.mma_async.sync.aligned.m64n{self.n}k16.f32.{element}.{element}"

    @property
    def operands(self) -> str:
        """Everything after the accumulator list: A, B, scale-d predicate, signs of A and B, transposes."""
        first = self.num_accumulators
        transpose_a, transpose_b = int(self.a_transposed), int(self.b_transposed)
        if self.a == "shared":
            return f"%{first}, %{first + 1}, p, 1, 1, {transpose_a}, {transpose_b}"
        return f"{registers(4, first)}, %{first + 4}, p, 1, 1, {transpose_b}"

    @property
    def accumulate_operand(self) -> str:
        """The operand that is 0 when the accumulator's old content is to be ignored."""
        return f"%{self.num_accumulators + (2 if self.a == 'shared' else 5)}"
