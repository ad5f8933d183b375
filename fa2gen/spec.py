"""The declarative spec: a `Problem` (changes the answer) and a `Tiling` (changes only the speed).

Both are frozen and refuse unknown fields. A `KernelSpec` joins them and has a derived name, which is a bijection: the C
symbol, the cache folder, the profiler row and the test id are all that one string.

What is known of a field stands at the field: its type, its range, how it reads in a name and in a sentence, and what it
means. Names both ways, options of the command line, rows of JSON and the schema of spec files are made from that
(`declared`), so that a new field or value is written once.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import re
import reprlib
import shlex
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticUndefined, core_schema

from fa2gen.arch import ArchName
from fa2gen.errors import InvalidInput
from fa2gen.expression import Program, parse
from fa2gen.expression.tree import Type

__all__ = [
    "NO_EXPRESSION",
    "SAME",
    "CacheDType",
    "DType",
    "Declared",
    "Direction",
    "KernelSpec",
    "Mask",
    "Problem",
    "Tiling",
    "anonymous",
    "apart",
    "declared",
    "names_of",
    "program_of",
    "text_of",
]

Direction = Literal["fwd", "bwd", "decode"]
DType = Literal["fp16", "bf16"]
Mask = Literal["full", "causal", "window"]
CacheDType = Literal["same", "e4m3", "int8"]
SAME: CacheDType = "same"

MAX_HEAD_DIM = 256
HEAD_DIM_STEP = 8  # 16 bytes of a 16-bit type: the unit of cp.async and of TMA strides

_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = 120
_shown = _repr.repr  # how a message quotes its input


# What a field's declaration says --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shown:
    """How a field reads in a kernel's name, and in a sentence.

    token     what stands before the value in the name: "d" makes `d128`. Of a flag, its whole word.
    optional  left out of the name where the field has its default.
    place     fields of a lower place stand first in the name; among equals the order of declaration decides.
    phrase    the value in a sentence, "head dim {}". Of a flag or a switch, what is said where it is on.
    """

    token: str = ""
    optional: bool = False
    place: int = 2
    phrase: str = "{}"


@dataclass(frozen=True)
class Range:
    """A whole number that is one of least, least + step, ..., most; `why` says what the step comes from."""

    step: int
    least: int
    most: int
    why: str = ""

    def __str__(self) -> str:
        return (
            f"a multiple of {self.step} from {self.least} to {self.most}"
            if self.step > 1
            else (f"from {self.least} to {self.most}")
        )

    def check(self, value: int | None) -> int | None:
        """`value` if it is in the range, else a ValueError that names the nearest number that is. None stays None."""
        if value is None:
            return None
        if value % self.step or not self.least <= value <= self.most:
            nearest = min(max(-(-value // self.step) * self.step, self.least), self.most)
            raise ValueError(f"must be {self}{self.why and f' ({self.why})'}; nearest {nearest}")
        return value

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        return core_schema.no_info_after_validator_function(self.check, handler(source))

    def __get_pydantic_json_schema__(
        self, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return {**handler(schema), "minimum": self.least, "maximum": self.most, "multipleOf": self.step}


@dataclass(frozen=True)
class OnlyFor:
    """A field that may leave its default in some directions alone, and why."""

    directions: tuple[Direction, ...]
    why: str


@dataclass(frozen=True)
class OnlyWith:
    """A flag that may be set in some directions only where other fields have these values, and why."""

    directions: tuple[Direction, ...]
    fields: tuple[tuple[str, Any], ...]
    why: str


@dataclass(frozen=True)
class Declared:
    """What is known of one field.

    values    all that it may be, where that is a closed set; else `range` says it.
    default   None: it must be given, or stands for what another field says.
    """

    name: str
    help: str
    default: Any
    values: tuple[Any, ...]
    range: Range | None
    shown: Shown
    only_for: OnlyFor | None
    only_with: OnlyWith | None

    @property
    def is_text(self) -> bool:
        """Whether it is a text of the user's: part of an expression, for all of which a name has one word."""
        return not self.values and self.range is None

    @property
    def option(self) -> str:
        """How the command line calls it: `--head-dim`."""
        return "--" + self.name.replace("_", "-")

    @property
    def is_flag(self) -> bool:
        """Whether it is a bool: its word stands in a name where it is set, without a value."""
        return isinstance(self.default, bool)

    @property
    def allowed(self) -> str:
        """`fp16 or bf16`, `a multiple of 8 from 8 to 256`."""
        return (
            "an expression" if self.is_text else str(self.range) if self.range else " or ".join(map(str, self.values))
        )

    def word(self, value: Any) -> str | None:
        """How the value stands in a kernel's name, None where it is left out."""
        if self.is_text or (self.shown.optional and value == self.default):
            return None
        return self.shown.token if self.is_flag else f"{self.shown.token}{value}"

    def value_of(self, word: str) -> Any:
        """The value whose `word` this is, None for any other text."""
        if self.range:
            match = re.fullmatch(f"{self.shown.token}([0-9]{{1,9}})", word)
            return match and int(match[1])
        return next((value for value in self.values if self.word(value) == word), None)

    def phrase(self, value: Any) -> str | None:
        """How the value reads in a sentence, None where nothing is said of it."""
        if value is None or value == SAME or (self.is_text and not value):
            return None
        if self.range and self.shown.optional and value == self.default:
            return None
        if "{}" in self.shown.phrase:
            return self.shown.phrase.format(value)
        return self.shown.phrase if value else None


@functools.cache
def declared(model: type[BaseModel]) -> dict[str, Declared]:
    """What each field of `Problem` or `Tiling` is declared to be, in their order."""

    def of(name: str) -> Declared:
        info = model.model_fields[name]
        found = {type(item): item for item in info.metadata}
        literal = get_origin(info.annotation) is Literal
        return Declared(
            name=name,
            help=info.description or "",
            default=None if info.default is PydanticUndefined else info.default,
            values=get_args(info.annotation) if literal else (False, True) if info.annotation is bool else (),
            range=found.get(Range),
            shown=found[Shown],
            only_for=found.get(OnlyFor),
            only_with=found.get(OnlyWith),
        )

    return {name: of(name) for name in model.model_fields}


class _Model(BaseModel):
    """Frozen, strict about field names, and with errors that name the field and the nearest right one."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    def __init__(self, /, **values: Any) -> None:
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
            field, message = _cut(field), f"unknown field; {hint}"
        elif item["type"] != "missing":
            message = f"{message} (given {_shown(item['input'])})"
        lines.append(f"  {field:<15} {message}")
    return "\n".join(lines)


def _cut(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."


class _Fields(_Model):
    """A model whose fields are all `declared`: what `Problem` and `Tiling` have in common."""

    @field_validator("*", mode="before")
    @classmethod
    def _is_of_its_kind(cls, value: Any, info: ValidationInfo) -> Any:
        # True == 1 == 1.0, which is enough for a Literal.
        field = declared(cls)[str(info.field_name)]
        if isinstance(value, bool | float) and field.values and not field.is_flag:
            raise ValueError(f"Input should be {field.allowed}")
        return value

    @property
    def text(self) -> str:
        """All fields in words: `fwd, head dim 128, bf16, causal mask`."""
        phrases = (field.phrase(getattr(self, name)) for name, field in declared(type(self)).items())
        return ", ".join(phrase for phrase in phrases if phrase)

    @property
    def words(self) -> tuple[str, ...]:
        """All fields as they stand in a kernel's name: `("fwd", "bf16", "d128", "causal")`."""
        words = (self.word(field) for model, field in _in_name() if model is type(self))
        return tuple(word for word in words if word is not None)

    def word(self, field: Declared) -> str | None:
        """How a field stands in a kernel's name, None where it is left out."""
        return field.word(getattr(self, field.name))

    @property
    def options(self) -> str:
        """What the command line is told to mean it: `--head-dim 128 --mask causal`, without what it means by itself."""
        given = {name: getattr(self, name) for name in declared(type(self))}
        return " ".join(
            field.option if field.is_flag else f"{field.option} {shlex.quote(str(given[name]))}"
            for name, field in declared(type(self)).items()
            if given[name] != field.default
        )


class Problem(_Fields):
    """What is computed. Lengths, head counts, strides and the scale are run-time values and are not here."""

    direction: Annotated[
        Direction,
        Shown(place=0),
        Field(
            description="fwd: Algorithm 1 of FlashAttention-2; bwd: Algorithm 2, the gradients of Q, K and V; decode: "
            "a few queries of each sequence over a cache of keys and values, whose lengths lie on the device."
        ),
    ] = "fwd"
    head_dim: Annotated[
        int,
        Range(HEAD_DIM_STEP, HEAD_DIM_STEP, MAX_HEAD_DIM),
        Shown("d", phrase="head dim {}"),
        Field(description="Elements of a row of Q and K."),
    ]
    head_dim_v: Annotated[
        int | None,
        Range(HEAD_DIM_STEP, HEAD_DIM_STEP, MAX_HEAD_DIM),
        Shown("v", optional=True, phrase="of V and O {}"),
        OnlyFor(("fwd", "bwd"), "caches of K and of V have one head dim"),
        Field(description="Elements of a row of V and O, where they are not as many."),
    ] = None
    dtype: Annotated[DType, Shown(place=1), Field(description="Of Q, K, V and O. Sums are kept in fp32.")] = "bf16"
    mask: Annotated[
        Mask,
        Shown(optional=True, phrase="{} mask"),
        Field(
            description="Which keys a query sees; causal: key j iff j <= d = i + seqlen_k - seqlen_q; window: those of "
            "d's chunk from d - window_left to d + window_right."
        ),
    ] = "full"
    varlen: Annotated[
        bool,
        Shown("varlen", optional=True, phrase="ragged batches"),
        OnlyFor(("fwd", "bwd"), "a cache's sequences have lengths of their own anyway"),
        Field(description="Sequences of their own lengths, packed into one: (total, heads, head_dim)."),
    ] = False
    sink: Annotated[
        bool,
        Shown("sink", optional=True, phrase="attention sinks"),
        Field(description="One more logit a query head in each softmax's sum, s_aux, which no value stands for."),
    ] = False
    dropout: Annotated[
        bool,
        Shown("drop", optional=True, phrase="dropout"),
        OnlyFor(("fwd", "bwd"), "who decodes drops nothing"),
        Field(description="Elements of P are dropped with the call's probability, by random bits in device memory."),
    ] = False
    partial: Annotated[
        bool,
        Shown("partial", optional=True, phrase="results in fp32"),
        OnlyFor(("fwd", "bwd"), "over a cache the kernel itself merges parts"),
        OnlyWith(
            ("fwd", "bwd"),
            (("sink", False), ("dropout", False), ("paged", False), ("score", ""), ("allow", "")),
            "parts are merged of plain softmaxes, and sinks come in at the end",
        ),
        Field(
            description="Results are not rounded: O is fp32, to be merged with that of other keys by LSE, or dQ, dK "
            "and dV are, to be added to those of other calls."
        ),
    ] = False
    deterministic: Annotated[
        bool,
        Shown("det", optional=True, phrase="deterministic"),
        OnlyFor(("bwd",), "the other kernels always are"),
        Field(description="Blocks of keys add to dQ in one order: gradients are the same bits in every run."),
    ] = False
    score: Annotated[
        str,
        Shown(phrase="scores of an expression"),
        Field(
            description="What becomes of a score: an expression of s, the scaled product of a query and a key, their "
            "positions i and j, heads, and numbers and tensors of the call by any other name."
        ),
    ] = ""
    allow: Annotated[
        str,
        Shown(phrase="keys of an expression"),
        Field(
            description="Which keys a query may see, of those that the mask shows: an expression that is true or not."
        ),
    ] = ""
    inputs: Annotated[
        str,
        Shown(phrase=""),
        Field(description='What their names are, as far as it is not inferred: "document: int, cap: float".'),
    ] = ""
    learned: Annotated[
        str,
        Shown(phrase="gradients of {}"),
        OnlyFor(("bwd",), "forward kernels are the same whatever learns"),
        Field(description='Tensors of the score whose gradients are made beside those of Q, K and V: "bias, slope".'),
    ] = ""

    cache_dtype: Annotated[
        CacheDType,
        Shown(optional=True, phrase="{} caches"),
        OnlyFor(("decode",), "there is no cache"),
        Field(
            description="What caches of K and V hold: numbers of Q's type (same), or of 8 bits, e4m3 or int8, each "
            "times a number of its sequence and head."
        ),
    ] = SAME
    paged: Annotated[
        bool,
        Shown("paged", optional=True, phrase="pages"),
        OnlyFor(("decode", "fwd"), "gradients are of K and V where they lie"),
        OnlyWith(("fwd",), (("varlen", True), ("dropout", False)), "pages hold a ragged batch's keys, all of them"),
        Field(description="K and V lie in pages of any size, found in a table: (pages, page size, heads, head_dim)."),
    ] = False

    @property
    def head_dims(self) -> tuple[int, int]:
        """Of Q and K, and of V and O."""
        return self.head_dim, self.head_dim_v or self.head_dim

    @property
    def head_dims_text(self) -> str:
        """`head dim 128`, `head dims 192 and 128`."""
        q, v = self.head_dims
        return f"head dim {q}" if q == v else f"head dims {q} and {v}"

    @field_validator("head_dim_v")
    @classmethod
    def _is_another(cls, value: int | None, info: ValidationInfo) -> int | None:
        """None where it is head_dim's: one problem has one name."""
        return None if value == info.data.get("head_dim") else value

    @field_validator("*")
    @classmethod
    def _is_for_its_direction(cls, value: Any, info: ValidationInfo) -> Any:
        field = declared(cls)[str(info.field_name)]
        direction = info.data.get("direction")
        if field.only_for and value != field.default and direction not in (None, *field.only_for.directions):
            named = " or ".join(f'"{one}"' for one in field.only_for.directions)
            nearest = "none" if field.default == "" else field.default
            raise ValueError(f"is for direction {named}: {field.only_for.why}; nearest {nearest}")
        return value

    @model_validator(mode="after")
    def _has_plain_expressions(self) -> Problem:
        """Equal kernels are of equal problems: texts as the grammar writes them, with names of its own."""
        if self.score or self.allow or self.inputs or self.learned:
            program = parse(self.score, self.allow, types_of(self.inputs))
            learned = ", ".join(_learned_tokens(program, self.learned))
            plain = anonymous(program)
            given = {"score": plain.score, "allow": plain.allow, "inputs": text_of(plain.types), "learned": learned}
            for name, text in given.items():
                object.__setattr__(self, name, text)
            if self.has_expression:
                _known[self._expression_word] = given
        return self

    @model_validator(mode="after")
    def _goes_together(self) -> Problem:
        if why := apart(dict(self)):
            raise ValueError(why)
        return self

    @property
    def has_expression(self) -> bool:
        return bool(self.score or self.allow)

    @property
    def program(self) -> Program:
        """The expressions, of scores as they are where there are none."""
        return program_of(self.score, self.allow, self.inputs)

    @property
    def _expression_word(self) -> str:
        key = self.program.key
        return f"x{hashlib.sha256(f'{key} {self.learned}'.encode()).hexdigest()[:8] if self.learned else key}"

    def word(self, field: Declared) -> str | None:
        """All expressions have one word together, where the first is declared."""
        if field.name == "score" and self.has_expression:
            return self._expression_word
        return super().word(field)


def apart(fields: Mapping[str, Any]) -> str | None:
    """Why a problem's fields, each of which is allowed, do not go together, or None."""
    for field in declared(Problem).values():
        rule = field.only_with
        if rule and fields[field.name] and fields["direction"] in rule.directions:
            for name, value in rule.fields:
                if fields[name] != value:
                    return f"{field.name} goes with {f'{name} {value}' if value != '' else f'no {name}'}: {rule.why}"
    return None


NO_EXPRESSION = {"score": "", "allow": "", "inputs": "", "learned": ""}
"""The fields of a problem whose scores are as they are."""

_EXPRESSION_WORD = re.compile("x[0-9a-f]{8}")
_known: dict[str, dict[str, str]] = {}  # word of a name -> the fields that it stands for, of all problems so far


@functools.lru_cache(maxsize=1024)
def program_of(score: str, allow: str, inputs: str) -> Program:
    """The expressions of a problem's fields, parsed once."""
    return parse(score, allow, types_of(inputs))


def types_of(inputs: str) -> dict[str, Type]:
    """`{"cap": "float"}` of `"cap: float"`. Raises InvalidInput."""
    found: dict[str, Any] = {}
    for item in filter(None, map(str.strip, inputs.split(","))):
        name, colon, kind = (part.strip() for part in item.partition(":"))
        if not colon or name in found:
            raise InvalidInput(
                f'inputs has {_shown(item)}; it is a list of names and types, "document: int, cap: float"'
            )
        found[name] = kind
    return found


def names_of(learned: str) -> tuple[str, ...]:
    """`("bias", "slope")` of `"bias, slope"`."""
    return tuple(filter(None, map(str.strip, learned.split(","))))


def _learned_tokens(program: Program, learned: str) -> Iterator[str]:
    """Of the tensors that these names are, in the order of the program. Raises InvalidInput."""
    differentiable = {access.token for access in program.accesses}
    known = {x.name: x for x in program.inputs if x.is_tensor and x.token in differentiable}
    names = names_of(learned)
    for name in names:
        if name not in known:
            raise InvalidInput(
                f"learned has {_shown(name)}; it is a list of tensors that the score depends on: "
                f"{', '.join(known) or 'here there are none'}. A number learns as a tensor of one element, cap[0]"
            )
    yield from (x.token for x in known.values() if x.name in names)


def text_of(types: Iterable[tuple[str, str]]) -> str:
    """The inverse of `types_of`."""
    return ", ".join(f"{name}: {kind}" for name, kind in types)


def anonymous(program: Program) -> Program:
    """The same expressions with number_0, input_1 and so on in the place of a user's names."""
    tokens = {x.name: x.token for x in program.inputs}

    def renamed(text: str) -> str:
        return re.sub(r"(?<![\w.])[A-Za-z_]\w*", lambda match: tokens.get(match[0], match[0]), text)

    types = {tokens[name]: kind for name, kind in dict(program.types).items()}
    return parse(renamed(program.score), renamed(program.allow), types)


_TILE = Range(16, 16, 256, "the k of one 16-bit matrix instruction is 16")


class Tiling(_Fields):
    """How it is computed: no field changes the result beyond rounding."""

    arch: Annotated[
        ArchName,
        Shown(place=0),
        Field(description="Kernel family: sm80 (mma.sync, cp.async) or sm90 (wgmma, TMA)."),
    ]
    tile_m: Annotated[int, _TILE, Shown("m", phrase="{} query rows"), Field(description="Query rows of one tile.")]
    tile_n: Annotated[int, _TILE, Shown("n", phrase="{} keys"), Field(description="Keys of one block.")]
    num_stages: Annotated[
        int,
        Range(1, 1, 8),
        Shown("s", phrase="{} stages"),
        Field(description="Depth of the rings that hold blocks of K and of V in shared memory."),
    ] = 2
    num_mma_warps: Annotated[
        int,
        Range(1, 1, 16),
        Shown("w", phrase="{} mma warps"),
        Field(description="Warps that multiply; sm90 adds one producer warpgroup (4 warps)."),
    ]
    # A head dim that does not fill its last panel wastes the rest of it, and narrower panels need more copies.
    swizzle_bytes: Annotated[
        Literal[128, 64, 32],
        Shown("z", optional=True, phrase="{}-byte panels"),
        Field(description="Width of a shared-memory panel, in bytes."),
    ] = 128
    # The division at the end makes the result the same.
    lazy_rescale: Annotated[
        Literal[0, 1],
        Shown("r", optional=True, phrase="lazy rescale"),
        Field(description="1: keep a row's old maximum while the new one is at most 2^8 times above it."),
    ] = 0
    lag: Annotated[
        Literal[0, 1],
        Shown("l", optional=True, phrase="dQ a step later"),
        Field(
            description="1: of a gradient, dQ of a block of queries is made a step later than its dK and dV, so that "
            "mma warpgroups need not be in step."
        ),
    ] = 0
    heads_abreast: Annotated[
        Literal[0, 1],
        Shown("h", optional=True, phrase="heads abreast"),
        Field(
            description="1: of a gradient, a block of keys takes all query heads of its group at a block of queries, "
            "the last one first, before it goes on to the next."
        ),
    ] = 0
    keys_in_turn: Annotated[
        Literal[0, 1],
        Shown("t", optional=True, phrase="blocks of keys in turn"),
        Field(
            description="1: of a gradient whose dQ lags, a block of threads takes one block of keys after the other, "
            "and loads the next one under the last products of the one before."
        ),
    ] = 0
    group_parts: Annotated[
        int,
        Range(1, 1, 32),
        Shown("g", optional=True, phrase="groups in {} parts"),
        Field(
            description="Of a gradient: blocks that share the query heads of a head of K and V, for the same keys. It "
            "must divide them."
        ),
    ] = 1
    tail_parts: Annotated[
        int,
        Range(1, 1, 8),
        Shown("e", optional=True, phrase="last blocks of keys in {} parts"),
        Field(
            description="Of a gradient: blocks of threads that share the queries of each block of keys of the last "
            "wave, so that they fill it."
        ),
    ] = 1
    page_rows: Annotated[
        Literal[0, 1],
        Shown("p", optional=True, phrase="pages row by row"),
        Field(
            description="1: sm90's kernels over pages copy each row of K and V by itself, with cp.async, whatever a "
            "page's size; 0: boxes of rows, with TMA, as far as a page holds them."
        ),
    ] = 0
    pack_heads: Annotated[
        Literal[0, 1],
        Shown("q", optional=True, phrase="heads of groups as rows"),
        Field(
            description="1: over pages, sm90's query rows are of all heads that share K and V, so that few queries of "
            "a sequence fill a tile. Groups of 1, 2, 4, 8 or 16 heads."
        ),
    ] = 0
    split_keys: Annotated[
        Literal[0, 1],
        Shown("k", optional=True, phrase="keys in parts"),
        Field(
            description="1: over pages, sm90's tiles have their keys in parts, each a block of threads', which a "
            "kernel of its own puts together, so that few queries over many keys fill a device."
        ),
    ] = 0


# Names ----------------------------------------------------------------------------------------------------------------

_EXAMPLE = "names look like fa2_fwd_sm90_bf16_d128_causal_m128_n128_s2_w8"
_LONGEST_NAME = 200


@functools.cache
def _in_name() -> tuple[tuple[type[_Fields], Declared], ...]:
    """The fields of a kernel, in the order in which they stand in its name."""
    fields = [(model, field) for model in (Problem, Tiling) for field in declared(model).values()]
    return tuple(sorted(fields, key=lambda item: item[1].shown.place))


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
        parts: dict[type[_Fields], _Fields] = {Problem: self.problem, Tiling: self.tiling}
        words = (parts[model].word(field) for model, field in _in_name())
        return "_".join(("fa2", *(word for word in words if word is not None)))

    @classmethod
    def from_name(cls, name: str) -> KernelSpec:
        """The spec whose `name` this is. Raises InvalidInput for any other text."""
        first, *words = name.split("_") if len(name) <= _LONGEST_NAME else [""]
        if first != "fa2":
            raise InvalidInput(f"{_shown(name)} is not a kernel name; {_EXAMPLE}")
        values: dict[type[_Fields], dict[str, Any]] = {Problem: {}, Tiling: {}}
        left = iter(words)
        word = next(left, None)
        for model, field in _in_name():
            if field.name == "score" and word is not None and _EXPRESSION_WORD.fullmatch(word):
                values[model] |= _expression_of(word, name)
                word = next(left, None)
            elif field.is_text:
                continue
            elif word is not None and (value := field.value_of(word)) is not None:
                values[model][field.name] = value
                word = next(left, None)
            elif not field.shown.optional:
                raise InvalidInput(
                    f"{_shown(name)} is not a kernel name: {_shown(word or '')} is no {field.name} "
                    f"({field.shown.token}{'N, ' if field.range else ''}{field.allowed}); {_EXAMPLE}"
                )
        spec = cls(problem=Problem(**values[Problem]), tiling=Tiling(**values[Tiling]))
        if spec.name != name:  # leading zeros, a default spelt out, words that follow: one spec has one name
            raise InvalidInput(f"{_shown(name)} is not a kernel name; this kernel is called {spec.name!r}")
        return spec

    def row(self) -> dict[str, Any]:
        """What a listing's JSON says of the kernel: its name, family and every field of its problem."""
        return {"name": self.name, "arch": self.tiling.arch, **self.problem.model_dump()}


def _expression_of(word: str, name: str) -> dict[str, str]:
    """The fields that a word of a name stands for. A name has no room for them: raises InvalidInput where no spec of
    this process said them."""
    if word not in _known:
        raise InvalidInput(
            f"{_shown(name)} is a kernel of an expression, and a name has only a hash of that, {word}: give its spec "
            "(SPEC.toml with score or allow), or what `fa2gen list` shows of FA2GEN_SPECS"
        )
    return _known[word]
