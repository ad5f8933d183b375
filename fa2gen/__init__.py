"""fa2gen generates exact-attention CUDA kernels from small declarative specs.

    from fa2gen import flash_attn_func
    out = flash_attn_func(q, k, v, causal=True)     # (batch, seqlen, heads, head_dim), fp16 or bf16

Importing the package imports neither torch nor cuda: each public name is loaded when it is first used, and so are the
operators torch.ops.fa2gen.fwd and bwd, which saved programs ask for by name.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fa2gen._lazy_operators import plant
from fa2gen._version import __version__ as __version__
from fa2gen._when_imported import when_imported

# name -> module. No name here is also a module's: `fa2gen.render` is the module, `fa2gen.render.render` the function.
_HOME = {
    "flash_attn_func": "ops",
    "flash_attn_kvpacked_func": "ops",
    "flash_attn_qkvpacked_func": "ops",
    "flash_attn_varlen_func": "ops",
    "flash_attn_varlen_kvpacked_func": "ops",
    "flash_attn_varlen_qkvpacked_func": "ops",
    "flash_attn_with_kvcache": "ops",
    "merge_states": "ops",
    "reshape_and_cache": "ops",
    "attention": "ops",
    "enable_sdpa": "integrations.sdpa",
    "install_as_flash_attn": "shim",
    "Problem": "spec",
    "Tiling": "spec",
    "KernelSpec": "spec",
    "KernelPlan": "plan",
    "make_plan": "plan",
    "catalogue": "catalog",
    "default_tiling": "plan",
    "compile_kernel": "compile",
    "Fa2GenError": "errors",
    "CompileError": "errors",
    "InfeasibleSpec": "errors",
    "InvalidInput": "errors",
    "RenderError": "errors",
    "StoreError": "errors",
    "UnsupportedProblem": "errors",
}

if TYPE_CHECKING:  # the same, for type checkers and editors
    from fa2gen.catalog import catalogue
    from fa2gen.compile import compile_kernel
    from fa2gen.errors import (
        CompileError,
        Fa2GenError,
        InfeasibleSpec,
        InvalidInput,
        RenderError,
        StoreError,
        UnsupportedProblem,
    )
    from fa2gen.integrations.sdpa import enable_sdpa
    from fa2gen.ops import (
        attention,
        flash_attn_func,
        flash_attn_kvpacked_func,
        flash_attn_qkvpacked_func,
        flash_attn_varlen_func,
        flash_attn_varlen_kvpacked_func,
        flash_attn_varlen_qkvpacked_func,
        flash_attn_with_kvcache,
        merge_states,
        reshape_and_cache,
    )
    from fa2gen.plan import KernelPlan, default_tiling, make_plan
    from fa2gen.shim import install_as_flash_attn
    from fa2gen.spec import KernelSpec, Problem, Tiling

__all__ = [
    "CompileError",
    "Fa2GenError",
    "InfeasibleSpec",
    "InvalidInput",
    "KernelPlan",
    "KernelSpec",
    "Problem",
    "RenderError",
    "StoreError",
    "Tiling",
    "UnsupportedProblem",
    "attention",
    "catalogue",
    "compile_kernel",
    "default_tiling",
    "enable_sdpa",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    "install_as_flash_attn",
    "make_plan",
    "merge_states",
    "reshape_and_cache",
]


if not TYPE_CHECKING:  # to a type checker it would promise every name

    def __getattr__(name: str) -> Any:
        if (module := _HOME.get(name)) is None:
            raise AttributeError(f"module 'fa2gen' has no attribute {name!r}")
        try:
            value = getattr(import_module(f"fa2gen.{module}"), name)
        except ModuleNotFoundError as error:
            if error.name != "torch":
                raise
            raise ImportError(
                f"fa2gen.{name} needs torch: pip install torch, from the index that fits your driver. Plans, renders "
                "and builds of kernels need none: see `fa2gen --help`"
            ) from error
        globals()[name] = value  # found here the next time, without coming through this function
        return value


when_imported("torch", plant)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
