"""`python -m fa2gen`."""

from fa2gen.cli import main

main()
