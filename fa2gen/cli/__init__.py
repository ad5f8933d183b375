"""The command line: `fa2gen`, `python -m fa2gen`, and `python cli.py` in a checkout.

What a command computes lives in the library; here are its options, its tables and its exit status. Everything heavy is
imported inside the command that needs it, so that `--help` is quick and `build` never imports torch.

With `--json`, standard output holds exactly one JSON document. Progress, notes and errors go to standard error.
"""

from fa2gen.cli.app import app, main
from fa2gen.cli.console import ExitStatus

__all__ = ["ExitStatus", "app", "main"]
