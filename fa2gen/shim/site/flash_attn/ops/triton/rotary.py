"""Rotary embeddings, by torch."""

from fa2gen.shim.rotary import apply_rotary

__all__ = ["apply_rotary"]
