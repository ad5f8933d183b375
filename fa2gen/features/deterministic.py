"""Gradients of the same bits in every run: blocks of keys add to a block of queries of dQ in their order."""

from __future__ import annotations

from fa2gen.features.base import Feature, Scratch

__all__ = ["DETERMINISTIC"]

DETERMINISTIC = Feature("deterministic", scratch=(Scratch("dq_turns", "int*"),), examples=({"deterministic": True},))
