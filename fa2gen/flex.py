"""FlexAttention's score_mod and mask_mod as expressions: what `fa2gen.attention` takes as score, allow and inputs.

torch.fx traces the functions into ATen operations, on one element; each becomes a piece of text, and captured tensors
become inputs under the names that they have in the function. What the language has no word for is refused by name.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from fa2gen.errors import InvalidInput, UnsupportedProblem
from fa2gen.expression import parse
from fa2gen.expression.grammar import FUNCTIONS, NAMES

__all__ = ["FlexExpression", "from_flex"]


class FlexExpression(NamedTuple):
    """`fa2gen.attention(q, k, v, **from_flex(score_mod, mask_mod)._asdict())` is flex_attention's result.

    inputs  the tensors that the functions captured, by name; those of one number have the shape (1,).
    """

    score: str
    allow: str
    inputs: dict[str, Tensor]


def from_flex(
    score_mod: Callable[..., Tensor] | None = None, mask_mod: Callable[..., Tensor] | None = None
) -> FlexExpression:
    """The expressions of score_mod(score, b, h, q_idx, kv_idx) and mask_mod(b, h, q_idx, kv_idx).

    A score_mod that ends in torch.where(condition, score, -inf) gives allow its condition. Numbers that the functions
    hold are written into the text, and so are parts of the kernel; tensors are not. Whole numbers have 32 bits, also
    those of torch.int64.

    Raises UnsupportedProblem for an operation without a word in the language, for control flow by values, and for a
    captured tensor that is not indexed down to one number.
    """
    inputs: dict[str, Tensor] = {}
    score, conditions = "", []
    if score_mod is not None:
        score, hidden = _Reader(score_mod, ("s", "b", "h", "i", "j"), inputs).read()
        conditions += hidden
    if mask_mod is not None:
        condition, _ = _Reader(mask_mod, ("b", "h", "i", "j"), inputs).read()
        conditions.append(condition)
    allow = " and ".join(f"({condition})" for condition in conditions)
    kinds = {name: _kind(x) for name, x in inputs.items()}
    try:
        program = parse(score, allow, kinds)  # type: ignore[arg-type]
    except InvalidInput as error:
        names = " and ".join(_name(x) for x in (score_mod, mask_mod) if x is not None)
        raise UnsupportedProblem(f"what {names} computes is not in the language: {error}") from error
    named = {x.name for x in program.inputs}  # `0 * bias[j]` is gone from the text
    return FlexExpression(program.score, program.allow, {name: x for name, x in inputs.items() if name in named})


_BINARY = {
    "add": "+",
    "sub": "-",
    "mul": "*",
    "div": "/",
    "true_divide": "/",
    "floor_divide": "//",
    "remainder": "%",
    "eq": "==",
    "ne": "!=",
    "lt": "<",
    "le": "<=",
    "gt": ">",
    "ge": ">=",
    "logical_and": "and",
    "logical_or": "or",
    "logical_xor": "!=",
    "bitwise_and": "and",
    "bitwise_or": "or",
    "bitwise_xor": "!=",
}
_FUNCTIONS = {
    "abs": "abs({0})",
    "exp": "exp({0})",
    "log": "log({0})",
    "tanh": "tanh({0})",
    "sigmoid": "sigmoid({0})",
    "sqrt": "sqrt({0})",
    "neg": "-{0}",
    "minimum": "min({0}, {1})",
    "maximum": "max({0}, {1})",
    "logical_not": "not {0}",
    "bitwise_not": "not {0}",
    "relu": "max({0}, 0)",
    "square": "{0} ** 2",
    "reciprocal": "1 / {0}",
    "rsqrt": "1 / sqrt({0})",
    "exp2": "exp({0} * 0.6931472)",
    "log1p": "log(1 + {0})",
    "expm1": "(exp({0}) - 1)",
    "where": "where({0}, {1}, {2})",
    "clamp_min": "max({0}, {1})",
    "clamp_max": "min({0}, {1})",
    "rsub": "{1} - {0}",
    "alias": "{0}",
    "clone": "{0}",
    "detach": "{0}",
    "lift_fresh_copy": "{0}",
    "scalar_tensor": "{0}",
}
_ON_BOOLS = {"logical_and", "logical_or", "logical_xor", "logical_not", "bitwise_and", "bitwise_or", "bitwise_not"}
_ON_BOOLS |= {"bitwise_xor"}
_NARROW = (torch.uint8, torch.int8, torch.int16)
_WRAP = {"abs", "add", "mul", "neg", "pow", "rsub", "square", "sub"}
_ORDERS = {"lt", "le", "gt", "ge"}
_TO_BOOLS = {"mul": "and", "minimum": "and", "add": "or", "maximum": "or"}  # where both sides are conditions


class _Reader:
    """One function's graph, read node by node into text."""

    def __init__(self, function: Callable[..., Tensor], words: Sequence[str], inputs: dict[str, Tensor]) -> None:
        if not callable(function):
            raise InvalidInput(f"score_mod and mask_mod are functions, not {type(function).__name__}")
        self.name = _name(function)
        self.inputs = inputs
        self._captured = _captured(function)
        self._graph = self._traced(function, words)
        self._texts: dict[Any, str] = {}
        self._natural: dict[Any, bool] = {}  # whether a whole number is never negative
        self._words = iter(words)

    def read(self) -> tuple[str, list[str]]:
        """The text, and the conditions outside of which it is -inf."""
        (root,) = (node.args[0] for node in self._graph.graph.nodes if node.op == "output")
        if not isinstance(root, torch.fx.Node) or _value(root).numel() != 1:
            self._refuse("gives something else than one element")
        for node in self._graph.graph.nodes:
            if node.op == "placeholder":
                self._texts[node] = next(self._words)
                self._natural[node] = self._texts[node] != "s"
            elif node.op == "get_attr":
                self._texts[node] = ""  # written where it is used, with its indices
        conditions = []
        while (peeled := self._hides(root)) is not None:
            condition, root = peeled
            conditions.append(condition)
        return self._text(root), conditions

    def _traced(self, function: Callable[..., Tensor], words: Sequence[str]) -> Any:
        device = next((x.device for x in self._captured.values()), torch.device("cpu"))
        dtypes = [torch.float32 if word == "s" else torch.int32 for word in words]
        elements = [torch.zeros(1, dtype=dtype, device=device) for dtype in dtypes]
        taken = _arguments(function)
        if taken is not None and taken != len(words):
            raise InvalidInput(f"{self.name} has {taken} arguments; it is called with {', '.join(words)}")
        try:
            return make_fx(lambda *given: function(*given))(*elements)  # of a method make_fx counts self
        except RuntimeError as error:
            if "data-dependent control flow" in str(error):
                self._refuse("decides by a value (if, while, int()); write torch.where")
            raise UnsupportedProblem(f"{self.name} can not be traced: {str(error).splitlines()[0]}") from error

    def _refuse(self, why: str) -> NoReturn:
        raise UnsupportedProblem(f"{self.name} {why}; the language is that of fa2gen/expression/README.md")

    # Nodes -----------------------------------------------------------------------------------------------------------

    def _hides(self, node: Any) -> tuple[str, Any] | None:
        """Of where(condition, x, -inf): (condition, x)."""
        if node.op != "call_function" or _op(node) != "where":
            return None
        condition, left, right = node.args
        if self._is_minus_infinity(right):
            return self._text(condition), left
        if self._is_minus_infinity(left):
            return f"not {self._text(condition)}", right
        return None

    def _is_minus_infinity(self, node: Any) -> bool:
        if not isinstance(node, torch.fx.Node):
            return bool(node == -math.inf)
        if node.op == "call_function" and _op(node) in ("scalar_tensor", "full_like", "lift_fresh_copy", "full"):
            return self._is_minus_infinity(node.args[-1] if _op(node) in ("full", "full_like") else node.args[0])
        if node.op == "get_attr":
            x = self._tensor(node)
            return x.numel() == 1 and x.device.type == "cpu" and bool(x.item() == -math.inf)
        return False

    def _text(self, node: Any) -> str:
        """Of a node or a number, in parentheses where it is not a word or a call."""
        if not isinstance(node, torch.fx.Node):
            return self._number(node)
        if node.op == "get_attr":
            return self._single(node)
        if node not in self._texts:
            if _value(node).dtype in _NARROW and _op(node) in _WRAP:
                self._refuse(f"computes in {_value(node).dtype}, which wraps; convert it by .int() first")
            text = self._call(node)
            self._texts[node] = text if re.fullmatch(r"\w+(?:\(.*\)|\[.*\])?", text) and _is_one(text) else f"({text})"
            if len(self._texts[node]) > 4000:
                self._refuse("is longer than 4000 characters as a formula")
        return self._texts[node]

    def _number(self, value: Any) -> str:
        if isinstance(value, bool | int) or (isinstance(value, float) and math.isfinite(value)):
            return f"({value!r})" if value < 0 else repr(value)
        if value == -math.inf:
            self._refuse("gives -inf elsewhere than at its end; hide keys by mask_mod")
        self._refuse(f"holds {value!r}, which is no number of the language")

    def _call(self, node: Any) -> str:
        op, args = _op(node), list(node.args)
        self._natural[node] = self._is_natural(op, args)
        if op == "index":
            return self._index(node, *args)
        if op == "_to_copy":
            return self._converted(node, args[0])
        if op in _ON_BOOLS and any(_value(arg).dtype != torch.bool for arg in args):
            self._refuse(f"uses {op} of whole numbers; it is for conditions")
        if op == "div" and node.kwargs.get("rounding_mode") is not None:
            if node.kwargs["rounding_mode"] != "floor":
                self._refuse("rounds a quotient towards zero; write //")
            op = "floor_divide"
        if op in ("floor_divide", "remainder") and _value(node).dtype.is_floating_point:
            return f"({self._text(_whole(args[0]))} {_BINARY[op]} {self._text(_whole(args[1]))}) * 1.0"
        if op in ("add", "sub", "rsub"):
            alpha = [*args[2:], node.kwargs.get("alpha", 1)][0]
            scaled = 0 if op == "rsub" else 1
            args = args[:2]
            if alpha != 1:
                args[scaled] = f"({self._text(args[scaled])} * {self._number(alpha)})"
        texts = [arg if isinstance(arg, str) else self._text(arg) for arg in args if arg is not None]
        first = 1 if op == "where" else 0
        conditions = [not isinstance(arg, str | None) and _value(arg).dtype == torch.bool for arg in args[first:]]
        if all(conditions) and op in _TO_BOOLS:
            return f"{texts[0]} {_TO_BOOLS[op]} {texts[1]}"
        stay = all(conditions) and _value(node).dtype == torch.bool and op not in _ORDERS
        if any(conditions) and not stay:  # true counts as 1
            for place, is_condition in enumerate(conditions, first):
                texts[place] = f"where({texts[place]}, 1, 0)" if is_condition else texts[place]
        if op in ("clamp", "clamp_tensor"):
            return self._clamped(node)
        if op == "pow":
            return self._power(args, texts)
        if op in _BINARY and len(texts) == 2:
            return f"{texts[0]} {_BINARY[op]} {texts[1]}"
        if op in _FUNCTIONS and len(texts) == _FUNCTIONS[op].count("{"):
            return _FUNCTIONS[op].format(*texts)
        self._refuse(f"uses {op}, for which the language has no word")

    def _clamped(self, node: Any) -> str:
        text = self._text(node.args[0])
        low, high = [*node.args[1:], None, None][:2]
        low, high = node.kwargs.get("min", low), node.kwargs.get("max", high)
        text = text if low is None else f"max({text}, {self._text(low)})"
        return text if high is None else f"min({text}, {self._text(high)})"

    def _power(self, args: list[Any], texts: list[str]) -> str:
        base, exponent = args
        if not isinstance(base, torch.fx.Node) and base > 0:
            return f"exp({texts[1]} * {math.log(base)!r})"
        if exponent == 0.5:
            return f"sqrt({texts[0]})"
        if isinstance(exponent, torch.fx.Node) or exponent != int(exponent):
            self._refuse(f"raises to the power {texts[1]}; write exp and log")
        return f"{texts[0]} ** {int(exponent)}"

    def _converted(self, node: Any, of: Any) -> str:
        before, after = _value(of).dtype, _value(node).dtype
        self._natural[node] = self._natural.get(of, False)
        text = self._text(of)
        if before == torch.bool and after != torch.bool:
            return f"where({text}, 1, 0)"
        if after == torch.bool and before != torch.bool:
            return f"{text} != 0"
        if before.is_floating_point and not after.is_floating_point:
            self._refuse("makes a whole number of a float")
        return f"{text} * 1.0" if after.is_floating_point and not before.is_floating_point else text

    def _index(self, node: Any, table: Any, indices: Sequence[Any]) -> str:
        if table.op != "get_attr":
            self._refuse(f"indexes something that it computed, by {_op(table)}; index with b, h, q_idx, kv_idx alone")
        x = self._tensor(table)
        if len(indices) != x.dim() or any(index is None for index in indices):
            self._refuse(f"takes more than one number of a tensor {tuple(x.shape)}")
        places = []
        for index, size in zip(indices, x.shape, strict=True):
            text = self._text(index)
            if not self._natural.get(index, False):  # Python counts from the end; we stop at it
                text = f"where({text} < 0, {text} + {size}, {text})"
            places.append(text)
        return f"{self._input(x)}[{', '.join(places)}]"

    def _is_natural(self, op: str, args: list[Any]) -> bool:
        if op in ("abs", "relu", "remainder", "square"):
            return True
        known = [self._natural.get(arg, False) if isinstance(arg, torch.fx.Node) else _is_positive(arg) for arg in args]
        if op in ("maximum", "clamp_min"):
            return any(known)
        if op == "clamp":
            return any(known[:2]) and all(known[2:])
        return op in ("add", "mul", "floor_divide", "minimum", "clamp_max", "alias", "clone") and all(known)

    # Captured tensors ------------------------------------------------------------------------------------------------

    def _tensor(self, node: Any) -> Tensor:
        found: Tensor = getattr(self._graph, node.target)
        return found

    def _single(self, node: Any) -> str:
        """A captured tensor that is used without an index."""
        x = self._tensor(node)
        if x.numel() != 1:
            self._refuse(f"uses a tensor {tuple(x.shape)} without indices")
        return f"{self._input(x)}[{', '.join(['0'] * max(x.dim(), 1))}]"

    def _input(self, x: Tensor) -> str:
        """The name of a captured tensor, its own where that is free."""
        own = next((name for name, other in self._captured.items() if _is_same(other, x)), "")
        x = x.reshape(1) if x.dim() == 0 else x
        for name, other in self.inputs.items():
            if _is_same(other, x):
                return name
        fits = re.fullmatch(r"[A-Za-z][A-Za-z0-9_]{0,39}", own) and own not in NAMES and own not in FUNCTIONS
        names = itertools.chain([own] if fits else [], (f"tensor{count}" for count in itertools.count()))
        name = next(name for name in names if name not in self.inputs)
        self.inputs[name] = x
        return name


def _is_same(x: Tensor, y: Tensor) -> bool:
    """Whether both are one view of one memory: a row and a column may begin at the same number."""
    return x is y or all(f(x) == f(y) for f in (Tensor.data_ptr, Tensor.size, Tensor.stride, lambda z: z.dtype))


def _captured(function: Callable[..., Any]) -> dict[str, Tensor]:
    """Tensors that a function sees beside its arguments, by name: also those of the object whose method it is."""
    if isinstance(function, functools.partial):
        return _captured(function.func) | _tensors(function.keywords)
    owner = getattr(function, "__self__", None) if inspect.isroutine(function) else function
    held = _tensors(getattr(owner, "__dict__", {}))
    if isinstance(owner, torch.nn.Module):
        held |= dict(owner.named_parameters(recurse=False)) | dict(owner.named_buffers(recurse=False))
    try:
        seen = inspect.getclosurevars(function)
    except TypeError:  # an object
        return held
    return held | _tensors({**seen.globals, **seen.nonlocals})


def _tensors(named: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name: x for name, x in named.items() if isinstance(x, Tensor)}


def _name(function: Callable[..., Any]) -> str:
    return str(getattr(function, "__name__", type(function).__name__))


def _whole(node: Any) -> Any:
    """What a node made a float of, or itself."""
    if isinstance(node, torch.fx.Node) and _op(node) == "_to_copy":
        of = _value(node.args[0]).dtype
        return node if of.is_floating_point or of == torch.bool else node.args[0]
    return node


def _arguments(function: Callable[..., Tensor]) -> int | None:
    """How many arguments it takes; None where that is not fixed, or not known."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return None
    fixed = all(parameter.kind == parameter.POSITIONAL_OR_KEYWORD for parameter in parameters)
    return sum(parameter.default is parameter.empty for parameter in parameters) if fixed else None


def _op(node: Any) -> str:
    """`add` of torch.ops.aten.add.Tensor."""
    return str(getattr(node.target, "overloadpacket", node.target)).rpartition(".")[2]


def _value(node: Any) -> Tensor:
    """An example of what a node computes."""
    return node.meta["val"] if isinstance(node, torch.fx.Node) else torch.tensor(node)


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and value >= 0


def _kind(x: Tensor) -> str:
    return "bool" if x.dtype == torch.bool else "float" if x.dtype.is_floating_point else "int"


def _is_one(text: str) -> bool:
    """Whether the last bracket of a text closes its first."""
    depth = 0
    for place, character in enumerate(text):
        depth += (character in "([") - (character in ")]")
        if not depth and character in ")]" and place < len(text) - 1:
            return False
    return True
