"""`--ray` with an address or without: an option whose value may be left out, which typer has none of."""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand


class BareRay(TyperCommand):
    """A verb whose `--ray`, last or before another option, starts a cluster on this machine."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read `--ray` without an address as `--ray=`."""
        following = [*args, "-"][1:]
        bare = [word == "--ray" and after.startswith("-") for word, after in zip(args, following, strict=True)]
        words = ["--ray=" if is_bare else word for word, is_bare in zip(args, bare, strict=True)]
        return super().parse_args(ctx, words)
