"""Every error that fa2gen raises on purpose.

A message says what was asked, which rule it broke with numbers, and the nearest thing that works. Callers that only
want to know "was it fa2gen" catch `Fa2GenError`.
"""

from __future__ import annotations

__all__ = [
    "CompileError",
    "Fa2GenError",
    "InfeasibleSpec",
    "InvalidInput",
    "RenderError",
    "StoreError",
    "UnsupportedProblem",
]


class Fa2GenError(Exception):
    """The base of all errors that fa2gen raises on purpose."""


class InvalidInput(Fa2GenError, ValueError):
    """An argument breaks a rule that no kernel could relax: a wrong shape, dtype, device or option."""


class UnsupportedProblem(Fa2GenError, NotImplementedError):
    """A meaningful problem that fa2gen does not compute (yet): the message names it, and the nearest that works."""


class InfeasibleSpec(Fa2GenError, ValueError):
    """A kernel spec that does not fit its architecture: the message lists every rule it breaks, and the nearest fit."""


class RenderError(Fa2GenError):
    """A template did not render; always a defect of fa2gen or of an edited template, never of the user's input."""


class CompileError(Fa2GenError):
    """NVRTC refused a rendered kernel; the message maps its lines back to template lines."""


class StoreError(Fa2GenError):
    """A kernel that must come from a store is not there, or a store cannot be used as asked."""
