"""`python -m halfweight` is the command line."""

from halfweight.cli import main

main()
