"""`steerfm recipes`: list, show and copy recipes."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import yaml
from rich.console import Console
from rich.markup import escape
from rich.syntax import Syntax
from rich.table import Table

from steerfm import config
from steerfm.errors import ConfigError, nearest
from steerfm.recipe_files import Library, RecipeFile, header

console = Console(highlight=False)


def run(arguments: argparse.Namespace) -> int:
    """List the recipes, print one as composed, or copy one into ./recipes."""
    library = Library(arguments.recipes)
    if arguments.action == "list":
        _list(library)
    elif arguments.action == "show":
        _show(arguments, _find(library, arguments.recipe))
    else:
        _copy(_find(library, arguments.recipe), arguments.new, library)
    return 0


def _list(library: Library) -> None:
    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("recipe", "what to type", "what it takes"):
        table.add_column(heading, overflow="fold")
    for recipe in library.recipes():
        table.add_row(recipe.name, *(escape(text) for text in _first_line(recipe)))
    console.print(table)


def _first_line(recipe: RecipeFile) -> tuple[str, str]:
    """Return the command and the rest of a recipe's first line, which stand three spaces apart or more."""
    typed, _, rest = recipe.header[0].partition("   ") if recipe.header else ("", "", "")
    return typed.strip(), rest.strip()


def _show(arguments: argparse.Namespace, recipe: RecipeFile) -> None:
    """Print the header of a recipe and what it composes to; nothing is checked or built."""
    overrides = [f"recipe={recipe.name}", *arguments.overrides]
    values = config.preview(overrides, folders=arguments.recipes)
    header = "".join(f"# {line}\n" for line in recipe.header)
    text = header + yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    if console.is_terminal:
        console.print(Syntax(text, "yaml", background_color="default"))
    else:
        console.file.write(text)


def _copy(recipe: RecipeFile, new: str, library: Library) -> None:
    """Write ./recipes/recipe/NEW.yaml; raises ConfigError where that name is taken."""
    if not re.fullmatch(r"[\w-]+(/[\w-]+)*", new):
        raise ConfigError(f"'{new}' is no name for a recipe: use letters, digits, - and _, with / between folders.")
    path = Path("recipes") / "recipe" / f"{new}.yaml"
    if path.exists() or new in library.options("recipe"):
        raise ConfigError(f"A recipe named '{new}' is there already, and is never overwritten: choose another name.")
    text = recipe.path.read_text(encoding="utf-8").replace(f"recipe={recipe.name}", f"recipe={new}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path} cannot be written ({error.strerror}): change to a folder of your own.") from error
    typed, _ = _first_line(RecipeFile(new, path, header(path)))
    console.print(f"Wrote {path}. Change it, then: {typed}", soft_wrap=True)


def _find(library: Library, name: str) -> RecipeFile:
    recipes = {recipe.name: recipe for recipe in library.recipes()}
    if name not in recipes:
        raise ConfigError(f"No recipe is named '{name}'{nearest(name, recipes) or '.'} See: steerfm recipes list.")
    return recipes[name]
