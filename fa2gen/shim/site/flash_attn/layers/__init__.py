"""Rotary embeddings; flash_attn's other layers are not here."""
