"""transformers on fa2gen: `register()`, then `attn_implementation="fa2gen"` wherever transformers takes one.

    from fa2gen.integrations.transformers import register
    register()
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16, attn_implementation="fa2gen")

Dense, padded and packed batches (by position_ids or by cu_seq_lens), generation with every cache, gradients,
checkpointing, torch.compile. A padded batch is not copied together: kernels are told where its sequences lie, which is
worked out once a forward pass. What fa2gen refuses runs by transformers' sdpa, with one warning that says why.

`report(model)` says of each attention module what will run. transformers 4.57 or later, and 5.
"""

from __future__ import annotations

from fa2gen.integrations.transformers.attention import attention_by
from fa2gen.integrations.transformers.masks import mask
from fa2gen.integrations.transformers.report import Line, report

__all__ = ["Line", "register", "report"]


def register(name: str = "fa2gen", fallback: str | None = "sdpa") -> str:
    """Have transformers know attention and masks of fa2gen by `name`, which is returned; again changes the fallback.

    fallback  "sdpa": what fa2gen refuses is done by transformers' sdpa, with a warning; None: it raises
              UnsupportedProblem.

    Raises ValueError for a name with "flash" in it: transformers looks for those on its hub.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    if "flash" in name.lower() or not name:
        raise ValueError(f"name is {name!r}; transformers takes names with 'flash' for its own: take another, 'fa2gen'")
    if fallback not in ("sdpa", None):
        raise ValueError(f"fallback is {fallback!r}; it must be 'sdpa', or None: no fallback")
    AttentionInterface.register(name, attention_by(fallback))
    AttentionMaskInterface.register(name, mask)
    return name
