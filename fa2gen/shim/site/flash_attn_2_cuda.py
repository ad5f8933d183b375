"""Where flash_attn has its extension module. Its functions are there to be looked at; called, they raise."""

from typing import Any, NoReturn

from fa2gen.errors import UnsupportedProblem

__all__ = ["bwd", "fwd", "fwd_kvcache", "varlen_bwd", "varlen_fwd"]


def _refuse(*_: Any, **__: Any) -> NoReturn:
    raise UnsupportedProblem(
        "this flash_attn is fa2gen's, and has no extension module: call the functions of flash_attn or "
        "flash_attn.flash_attn_interface"
    )


fwd = varlen_fwd = bwd = varlen_bwd = fwd_kvcache = _refuse
