"""The library's logger, `fa2gen`: what FA2GEN_LOG_LEVEL does to it, and warnings that are given once.

A library leaves the printing to its application. But who sets the variable in front of a program that configures no
logging wants to see something, and Python's last resort prints warnings alone: such a program gets a handler on
standard error, which keeps quiet once the application has its own.
"""

from __future__ import annotations

import logging
from collections.abc import Hashable

__all__ = ["logger", "set_level", "warn_once"]

logger = logging.getLogger("fa2gen")
_warned: set[Hashable] = set()


def set_level(level: str | None) -> None:
    """Show what is logged from this level up; None leaves everything to the application."""
    if level is None:
        return
    logger.setLevel(level)
    if not any(isinstance(handler, _LastResort) for handler in logger.handlers):
        logger.addHandler(_LastResort())


def warn_once(subject: Hashable, message: str) -> None:
    """Log a warning, unless this process has given one about the subject."""
    if subject not in _warned:
        _warned.add(subject)
        logger.warning("%s", message)


class _LastResort(logging.StreamHandler):  # type: ignore[type-arg]
    """Prints to standard error while nobody else would."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(logging.Formatter("fa2gen: %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        if not logging.getLogger().handlers:
            super().emit(record)
