"""Rotary embeddings; flash_attn's other operators are not here."""
