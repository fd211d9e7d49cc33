"""`python -m fieldmark` is `fieldmark`."""

from fieldmark.cli.app import main

main()
