"""`python -m workflows.cli` is `recua`."""

from workflows.cli.main import main

main()
