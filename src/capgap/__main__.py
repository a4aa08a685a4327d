"""`python -m capgap` is the command `capgap`."""

from capgap.cli import main

main()
