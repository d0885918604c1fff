"""Commands about recipes."""

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from vitcompress.cli.application import recipes_app
from vitcompress.effort import resolve_recipe
from vitcompress.recipe import available_recipes, load_recipe
from vitcompress.terminal import out

__all__ = ["recipes_list", "recipes_show", "recipes_validate"]


@recipes_app.command("list")
def recipes_list() -> None:
    """List the shipped recipes."""
    table = Table()
    for column in ("name", "scheme", "passes", "what it is"):
        table.add_column(column)
    for name in available_recipes():
        recipe = load_recipe(name)
        steps = " > ".join(step.name for step in recipe.passes)
        table.add_row(name, str(recipe.scheme), steps, recipe.description)
    out.print(table)


@recipes_app.command("show")
def recipes_show(
    name: Annotated[str, typer.Argument(help="Recipe name, name-wNaM, or YAML file")],
    scheme: Annotated[str | None, typer.Option(help="Widths that w and a stand for")] = None,
) -> None:
    """Print a recipe with every default written out."""
    recipe = resolve_recipe(scheme=scheme, recipe=name)
    typer.echo(recipe.to_yaml(), nl=False)


@recipes_app.command("validate")
def recipes_validate(file: Annotated[str, typer.Argument(help="YAML file")]) -> None:
    """Check a recipe without loading a model."""
    recipe = load_recipe(file if file.endswith((".yaml", ".yml")) else Path(file))
    out.print(
        f"{escape(file)}: valid; {recipe.label}, {len(recipe.passes)} passes", soft_wrap=True
    )
