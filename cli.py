"""`python cli.py ...` in a checkout is the installed command `fa2gen ...`."""

from fa2gen.cli import main

main()
