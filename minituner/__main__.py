"""`python -m minituner` is the command line."""

from minituner.cli import console

console()
