"""`--ray` with an address, without one, and not at all."""

from __future__ import annotations

from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from fieldmark.cli.options import BareRay


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["a"], "a None x"),
        (["a", "--ray"], "a '' x"),
        (["--ray", "--name", "y", "a"], "a '' y"),
        (["a", "--ray", "auto"], "a 'auto' x"),
        (["a", "--ray=ray://host:10001", "--name", "y"], "a 'ray://host:10001' y"),
        (["a", "--ray", "--"], "a '' x"),
    ],
)
def test_the_address_may_be_left_out(words, told):
    app = typer.Typer()

    @app.command(cls=BareRay)
    def verb(
        photos: str,
        ray: Annotated[str | None, typer.Option("--ray")] = None,
        name: Annotated[str, typer.Option()] = "x",
    ) -> None:
        typer.echo(f"{photos} {ray!r} {name}")

    answer = CliRunner().invoke(app, words)
    assert answer.output == told + "\n"
