"""Between padded batches and packed ones: what flash_attn's bert_padding does, on torch alone, differentiable.

A padded batch is (batch, seqlen, ...) with a mask of the rows that count; a packed one has those rows one behind the
other, (total, ...), as `fa2gen.flash_attn_varlen_func` takes them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fa2gen.errors import InvalidInput
from fa2gen.ops.validate import refuse_non_tensors, refuse_tensor_kinds

__all__ = [
    "index_first_axis",
    "index_first_axis_residual",
    "index_put_first_axis",
    "pad_input",
    "unpad_input",
    "unpad_input_for_concatenated_sequences",
]


def unpad_input(
    hidden_states: Tensor, attention_mask: Tensor, unused_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """(packed, indices, cu_seqlens, max_seqlen, seqused) of a padded batch.

    hidden_states   (batch, seqlen, ...).
    attention_mask  (batch, seqlen), bool or whole numbers: 1 for the rows that count.
    unused_mask     likewise: rows that get a place, and do not count; none of the others.

    packed      (total, ...), the rows of either mask.
    indices     (total,) int64: where they lie in hidden_states.flatten(0, 1).
    cu_seqlens  (batch + 1,) int32.
    max_seqlen  of the longest sequence, with its unused rows; 0 in an empty batch.
    seqused     (batch,) int32: the rows of attention_mask.

    Waits for the device, which alone knows how many rows there are.

    Raises InvalidInput where a mask is not of the batch.
    """
    given = {"hidden_states": hidden_states, "attention_mask": attention_mask, "unused_mask": unused_mask}
    refuse_non_tensors(**{name: x for name, x in given.items() if x is not None or name != "unused_mask"})
    refuse_tensor_kinds(given, given.values())
    for name, mask in (("attention_mask", attention_mask), ("unused_mask", unused_mask)):
        if mask is not None and (mask.dim() != 2 or mask.shape != hidden_states.shape[:2]):
            raise InvalidInput(
                f"{name} has shape {tuple(mask.shape)}, hidden_states {tuple(hidden_states.shape)}; the mask must be "
                "(batch, seqlen), as hidden_states begins"
            )
    placed = attention_mask if unused_mask is None else attention_mask + unused_mask
    lengths = placed.sum(dim=-1, dtype=torch.int32)
    used = attention_mask.sum(dim=-1, dtype=torch.int32)
    indices = torch.nonzero(placed.flatten(), as_tuple=False).flatten()
    bounds = torch.nn.functional.pad(lengths.cumsum(dim=0, dtype=torch.int32), (1, 0))
    longest = int(lengths.max().item()) if lengths.numel() else 0
    return index_first_axis(hidden_states.flatten(0, 1), indices), indices, bounds, longest, used


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """(batch, seqlen, ...) of packed rows (total, ...), which `indices` says the places of; 0 in all others."""
    padded = hidden_states.new_zeros((batch * seqlen, *hidden_states.shape[1:]))
    return padded.index_copy(0, indices, hidden_states).unflatten(0, (batch, seqlen))


def index_first_axis(x: Tensor, indices: Tensor) -> Tensor:
    """Rows `indices` (total,) of x (rows, ...)."""
    return x.index_select(0, indices)


def index_first_axis_residual(x: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """(`index_first_axis`, x): the rows, and all of them for who adds to them later."""
    return index_first_axis(x, indices), x


def index_put_first_axis(values: Tensor, indices: Tensor, first_axis_dim: int) -> Tensor:
    """(first_axis_dim, ...): rows `indices` (total,) are those of values (total, ...), all others 0."""
    return values.new_zeros((first_axis_dim, *values.shape[1:])).index_copy(0, indices, values)


def unpad_input_for_concatenated_sequences(
    hidden_states: Tensor, attention_mask_in_length: Tensor
) -> tuple[Tensor, Tensor, Tensor, int]:
    """(packed, indices, cu_seqlens, max_seqlen) of a padded batch whose rows hold several sequences each.

    attention_mask_in_length  (batch, seqlen), whole numbers: the lengths of a row's sequences, one behind the other
                              from its first place on, then 0.

    The others as in `unpad_input`. Waits for the device. Raises InvalidInput where the lengths are not of the batch.
    """
    given = {"hidden_states": hidden_states, "attention_mask_in_length": attention_mask_in_length}
    refuse_non_tensors(**given)
    refuse_tensor_kinds(given, given.values())
    if attention_mask_in_length.dim() != 2 or attention_mask_in_length.shape != hidden_states.shape[:2]:
        raise InvalidInput(
            f"attention_mask_in_length has shape {tuple(attention_mask_in_length.shape)}, hidden_states "
            f"{tuple(hidden_states.shape)}; the lengths must be (batch, seqlen), as hidden_states begins"
        )
    columns = torch.arange(hidden_states.shape[1], device=hidden_states.device)
    counts = columns < attention_mask_in_length.sum(dim=1, keepdim=True)
    lengths = attention_mask_in_length[attention_mask_in_length > 0]
    indices = torch.nonzero(counts.flatten(), as_tuple=False).flatten()
    bounds = torch.nn.functional.pad(lengths.cumsum(dim=0, dtype=torch.int32), (1, 0))
    longest = int(lengths.max().item()) if lengths.numel() else 0
    return index_first_axis(hidden_states.flatten(0, 1), indices), indices, bounds, longest
