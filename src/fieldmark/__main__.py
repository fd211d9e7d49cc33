"""`python -m fieldmark` is `fieldmark`."""

from __future__ import annotations

from fieldmark.cli.app import main

main()
