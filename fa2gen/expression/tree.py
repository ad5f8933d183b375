"""Trees of expressions: what a text is read into, what derivatives and code are made from.

A node is one of a kind: the same operation on the same nodes is the same object, so that `==` and hashing cost nothing
and what is shared in a formula is shared in its code.

op          args                     type
"const"     -                        int, float or bool; value: the number
"name"      -                        a name of the language, or of generated code; value: the name
"number"    -                        value: the user's name of a number of the call
"tensor"    its indices              value: the user's name of a tensor of the call
lowest highest  the other indices   of a tensor over a tile; value: (its name, "i" or "j", the axis that this is)
+ *         two or more              int or float, that of all args
/ // %      two                      / float, the others int
neg recip   one
< <= == !=  two of one type          bool
and or not  bools                    bool
where       bool, two of one type    that of the two
min max     two or more              int or float
abs sign    one                      int or float
float       an int                   float
exp log tanh sigmoid sqrt exp2 log2  float
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal
from weakref import WeakValueDictionary

__all__ = ["Node", "Type", "const", "make", "name", "rebuilt", "substitute", "walk"]

Type = Literal["float", "int", "bool"]


@dataclass(frozen=True, eq=False, slots=True, weakref_slot=True)
class Node:
    """One operation, name or number; see the module. `make` is how one comes to be."""

    op: str
    args: tuple[Node, ...]
    type: Type
    value: Any

    @property
    def number(self) -> int | float | None:
        """Of a constant that is no bool."""
        return self.value if self.op == "const" and self.type != "bool" else None


_known: WeakValueDictionary[tuple[Any, ...], Node] = WeakValueDictionary()
_lock = threading.Lock()
# A child that is forked while another thread makes a node would wait for that thread, which it has not.
os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release)


def make(op: str, *args: Node, type: Type, value: Any = None) -> Node:
    """The node of this operation: the same object for the same arguments."""
    key = (op, args, type, repr(value))  # 0.0 and -0.0, 1 and True are equal to Python
    with _lock:
        found = _known.get(key)
        if found is None:
            found = _known[key] = Node(op, args, type, value)
        return found


def const(value: bool | int | float) -> Node:
    type: Type = "bool" if isinstance(value, bool) else "int" if isinstance(value, int) else "float"
    return make("const", type=type, value=value)


def name(value: str, type: Type = "int") -> Node:
    return make("name", type=type, value=value)


def walk(*roots: Node) -> Iterator[Node]:
    """Every node of these trees once, arguments before what they are arguments of."""
    seen: set[Node] = set()

    def visit(node: Node) -> Iterator[Node]:
        if node not in seen:
            seen.add(node)
            for arg in node.args:
                yield from visit(arg)
            yield node

    for root in roots:
        yield from visit(root)


def rebuilt(node: Node, args: Sequence[Node]) -> Node:
    """The same operation of other arguments."""
    return make(node.op, *args, type=node.type, value=node.value)


def substitute(root: Node, replaced: dict[Node, Node]) -> Node:
    """The tree with other nodes in the place of these."""
    made: dict[Node, Node] = {}
    for node in walk(root):
        args = tuple(made[arg] for arg in node.args)
        made[node] = replaced.get(node) or (node if args == node.args else rebuilt(node, args))
    return made[root]
