"""The version, which modules of every layer write into what they keep; pyproject.toml reads it here too."""

__version__ = "0.1.0"
