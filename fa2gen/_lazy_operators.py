"""What torch knows of fa2gen in a process that has imported both, and nothing of it that imports torch: its operators
in `torch.ops.fa2gen`, and the name "fa2gen" in the registry of flash attention's makers.

A program that was saved by torch.export asks for its operators by name. The first look at one imports `fa2gen.ops`,
which registers them. `fa2gen.integrations.sdpa` is imported where that flash attention is activated.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any

__all__ = ["plant"]


def plant() -> None:
    """Have torch.ops.fa2gen fill itself when it is looked into. torch has been imported."""
    torch: Any = sys.modules["torch"]

    class LazyNamespace(torch._ops._OpNamespace):
        __module__ = torch._ops.__name__  # saved programs hold it as a part of an operator's name

        def __getattr__(self, name: str) -> Any:
            if not name.startswith("_"):
                import_module("fa2gen.ops")
            return super().__getattr__(name)

    torch.ops.fa2gen.__class__ = LazyNamespace
    torch.nn.attention.register_flash_attention_impl("fa2gen", register_fn=_overrides)


def _overrides() -> Any:
    """Made by torch, which keeps it as long as fa2gen is its flash attention."""
    return import_module("fa2gen.integrations.sdpa").Overrides()
