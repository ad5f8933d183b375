"""The declarative spec: a `Problem` (changes the answer) and a `Tiling` (changes only the speed).

Both are frozen and refuse unknown fields. A `KernelSpec` joins them and has a derived name, which is a bijection: the C
symbol, the cache folder, the profiler row and the test id are all that one string.
"""

from __future__ import annotations

import difflib
import json
import re
import reprlib
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator, model_validator

from fa2gen.arch import ArchName
from fa2gen.errors import InvalidInput

__all__ = ["DType", "Direction", "KernelSpec", "Mask", "Problem", "Tiling"]

Direction = Literal["fwd", "bwd"]
DType = Literal["fp16", "bf16"]
Mask = Literal["full", "causal"]

MAX_HEAD_DIM = 256
HEAD_DIM_STEP = 8  # 16 bytes of a 16-bit type: the unit of cp.async and of TMA strides

_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = 120
_shown = _repr.repr  # how a message quotes its input


class _Model(BaseModel):
    """Frozen, strict about field names, and with errors that name the field and the nearest right one."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            for item in error.errors():
                cause = item.get("ctx", {}).get("error")
                if isinstance(cause, InvalidInput):  # a part's own report, complete in itself
                    raise cause from None
            raise InvalidInput(_explain(type(self), error)) from None


def _explain(model: type[BaseModel], error: ValidationError) -> str:
    lines = [f"{model.__name__} is not valid:"]
    for item in error.errors():
        field = ".".join(str(part) for part in item["loc"]) or "(whole)"
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            close = difflib.get_close_matches(field, model.model_fields, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known fields: {', '.join(model.model_fields)}"
            message = f"unknown field; {hint}"
        elif item["type"] != "missing":
            message = f"{message} (given {_shown(item['input'])})"
        lines.append(f"  {field:<15} {message}")
    return "\n".join(lines)


def _whole_number(value: int, step: int, least: int, most: int, why: str = "") -> int:
    """`value` if it is one of least, least + step, ..., most, else a ValueError that names the nearest of these."""
    if value % step or not least <= value <= most:
        nearest = min(max(-(-value // step) * step, least), most)
        rule = f"a multiple of {step} from {least} to {most}" if step > 1 else f"from {least} to {most}"
        raise ValueError(f"must be {rule}{why}; nearest {nearest}")
    return value


class Problem(_Model):
    """What is computed. Lengths, head counts, strides and the scale are run-time values and are not here.

    direction  "fwd": Algorithm 1 of FlashAttention-2; "bwd": Algorithm 2, the gradients of Q, K and V.
    head_dim   a multiple of 8 from 8 to 256, the same for Q, K and V.
    dtype      of Q, K, V and O: "fp16" or "bf16". Sums are kept in fp32.
    mask       "full", or "causal" aligned to the bottom right: query i sees key j iff j <= i + seqlen_k - seqlen_q.
    deterministic
               "bwd" only: blocks of keys add to dQ in one order, so that gradients are the same bits in every run.
    """

    direction: Direction = "fwd"
    head_dim: int
    dtype: DType = "bf16"
    mask: Mask = "full"
    deterministic: bool = False

    @field_validator("head_dim")
    @classmethod
    def _head_dim_is_supported(cls, head_dim: int) -> int:
        return _whole_number(head_dim, HEAD_DIM_STEP, HEAD_DIM_STEP, MAX_HEAD_DIM)

    @field_validator("deterministic")
    @classmethod
    def _backward_alone_has_a_choice(cls, deterministic: bool, info: ValidationInfo) -> bool:
        if deterministic and info.data.get("direction") == "fwd":
            raise ValueError('is for direction "bwd": a forward kernel always is; nearest False')
        return deterministic


class Tiling(_Model):
    """How it is computed: no field changes the result beyond rounding.

    arch           which instructions: "sm80" (mma.sync, cp.async) or "sm90" (wgmma, TMA).
    tile_m         query rows of one tile.
    tile_n         keys of one block.
    num_stages     depth of the rings that hold blocks of K and of V in shared memory.
    num_mma_warps  warps that multiply; sm90 adds one producer warpgroup (4 warps).
    swizzle_bytes  width of a shared-memory panel, 128, 64 or 32 bytes: a head dim that does not fill its last panel
                   wastes the rest of it, and narrower panels need more copies.
    lazy_rescale   keep a row's old maximum while the new one is at most 2^8 times above it, so that O is seldom
                   rescaled: the division at the end makes the result the same.
    """

    arch: ArchName
    tile_m: int
    tile_n: int
    num_stages: int = 2
    num_mma_warps: int
    swizzle_bytes: Literal[128, 64, 32] = 128
    lazy_rescale: Literal[0, 1] = 0

    @field_validator("tile_m", "tile_n")
    @classmethod
    def _is_tile(cls, value: int) -> int:
        return _whole_number(value, 16, 16, 256, " (the k of one 16-bit matrix instruction is 16)")

    @field_validator("num_stages")
    @classmethod
    def _is_depth(cls, value: int) -> int:
        return _whole_number(value, 1, 1, 8)

    @field_validator("num_mma_warps")
    @classmethod
    def _is_warp_count(cls, value: int) -> int:
        return _whole_number(value, 1, 1, 16)


# Fields that a name always carries, then those it carries only where they differ from the default.
_NAMED = (("m", "tile_m"), ("n", "tile_n"), ("s", "num_stages"), ("w", "num_mma_warps"))
_OPTIONAL = (("z", "swizzle_bytes"), ("r", "lazy_rescale"))
_NUMBER = "[0-9]{1,9}"
_NAME = re.compile(
    rf"fa2_(?P<direction>[a-z]+)_(?P<arch>sm{_NUMBER})_(?P<dtype>[a-z0-9]+)_d(?P<head_dim>{_NUMBER})(?P<causal>_causal)?(?P<det>_det)?"
    + "".join(rf"_{letter}(?P<{field}>{_NUMBER})" for letter, field in _NAMED)
    + "".join(rf"(?:_{letter}(?P<{field}>{_NUMBER}))?" for letter, field in _OPTIONAL)
)


class KernelSpec(_Model):
    """One kernel: a problem and the tiling that computes it."""

    problem: Problem
    tiling: Tiling

    @model_validator(mode="before")
    @classmethod
    def _take_instances_only(cls, values: Any) -> Any:
        # pydantic would report a dict's errors as its own; building the parts first names the right model.
        return {
            key: model(**value)
            if (model := {"problem": Problem, "tiling": Tiling}.get(key)) and isinstance(value, dict)
            else value
            for key, value in values.items()
        }

    @property
    def name(self) -> str:
        """`fa2_fwd_sm90_bf16_d128_causal_m128_n128_s2_w8`: derived, never typed; `from_name` is its inverse."""
        problem, tiling = self.problem, self.tiling
        parts = ["fa2", problem.direction, tiling.arch, problem.dtype, f"d{problem.head_dim}"]
        if problem.mask == "causal":
            parts.append("causal")
        if problem.deterministic:
            parts.append("det")
        parts += [f"{letter}{getattr(tiling, field)}" for letter, field in _NAMED]
        parts += [
            f"{letter}{getattr(tiling, field)}"
            for letter, field in _OPTIONAL
            if getattr(tiling, field) != Tiling.model_fields[field].default
        ]
        return "_".join(parts)

    @classmethod
    def from_name(cls, name: str) -> KernelSpec:
        """The spec whose `name` this is. Raises InvalidInput for any other text."""
        match = _NAME.fullmatch(name)
        if match is None:
            raise InvalidInput(
                f"{_shown(name)} is not a kernel name; names look like fa2_fwd_sm90_bf16_d128_causal_m128_n128_s2_w8"
            )
        found: dict[str, Any] = match.groupdict()
        numbers: dict[str, Any] = {
            field: int(found[field]) for _, field in (*_NAMED, *_OPTIONAL) if found[field] is not None
        }
        for field, allowed in (("direction", Direction), ("dtype", DType), ("arch", ArchName)):
            if found[field] not in get_args(allowed):
                raise InvalidInput(
                    f"{name!r} is not a kernel name: {field} {found[field]!r} is none of {get_args(allowed)}"
                )
        spec = cls(
            problem=Problem(
                direction=found["direction"],
                head_dim=int(found["head_dim"]),
                dtype=found["dtype"],
                mask="causal" if found["causal"] else "full",
                deterministic=found["det"] is not None,
            ),
            tiling=Tiling(arch=found["arch"], **numbers),
        )
        if spec.name != name:  # leading zeros, or a default spelt out: one spec has one name
            raise InvalidInput(f"{name!r} is not a kernel name; this kernel is called {spec.name!r}")
        return spec

    def canonical_json(self) -> str:
        """Sorted keys, no spaces, every field: equal specs give equal text."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
