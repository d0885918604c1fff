"""The application that commands register with."""

import typer

__all__ = ["app", "recipes_app"]

app = typer.Typer(
    name="vitcompress",
    help="Make vision transformers small and fast after training.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
recipes_app = typer.Typer(help="List, show and check recipes.", no_args_is_help=True)
app.add_typer(recipes_app, name="recipes")
