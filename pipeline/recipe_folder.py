"""A folder of recipes: which files of it are recipes, and what is wrong with it.

Owns names, and what becomes of a name that is almost one. Must not know how recipes are merged, nor what is in them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing

from pipeline.errors import Problem, RecipeError
from pipeline.events import Listener, Note, ignore
from pipeline.reporting.batch_summary import Row, as_text
from pipeline.storage import join_url, open_store, place_of, shown_url, split_url

# How no recipe may be called: the outputs' folder has names of ours that begin so.
_OURS = "_geomerge"
# What a recipe is called; anything else in the folder is left alone.
_SUFFIXES = (".yaml", ".yml")


def find_recipes(recipes_url: str, outputs_url: str) -> tuple[Row, ...]:
    """Return the recipes of a folder with their outputs, sorted by name.

    Raises:
        RecipeError: There are none, two would have one output, or a name cannot be used.
        StorageError: The folder cannot be listed.
    """
    return rows_of(find(recipes_url), recipes_url, outputs_url)


def rows_of(names: Mapping[str, str], recipes_url: str, outputs_url: str) -> tuple[Row, ...]:
    """Return a row for every recipe, by its name and its file's; its URLs are without credentials."""
    recipes, outputs = shown_url(recipes_url), shown_url(outputs_url)
    return tuple(
        Row(recipe=stem, recipe_url=join_url(recipes, name), output=join_url(outputs, stem))
        for stem, name in names.items()
    )


def find(recipes_url: str, listener: Listener = ignore) -> dict[str, str]:
    """Return the names of a folder's recipes by what they are called, sorted.

    Args:
        recipes_url: The folder.
        listener: Told of files that are almost recipes by their names.

    Raises:
        RecipeError: There are none, two would have one output, or a name cannot be used.
        StorageError: The folder cannot be listed.
    """
    with closing(open_store(recipes_url)) as store:
        paths = store.list()
        where = f"recipes {store.location()}"
    names = [path for path in paths if _is_recipe(path)]
    # A suffix in capitals is a slip, or a way to put a recipe aside.
    others = [path for path in paths if not _is_recipe(path) and _is_recipe(path.lower())]
    if not names:
        raise RecipeError(_no_recipes(recipes_url, where, others))
    if others:
        listener(Note(text=f"{where}: left alone, for recipes end in .yaml or .yml: {as_text(', '.join(others))}"))
    # The summary is text, for every program to read.
    problems = [
        Problem(what=f"{name!a} is no UTF-8 text", where=where, remedy="rename it")
        for name in names
        if not _is_text(name)
    ]
    stems: dict[str, list[str]] = {}
    for name in filter(_is_text, names):
        stems.setdefault(name.rpartition(".")[0], []).append(name)
    problems += [
        Problem(what=f"{' and '.join(same)} would have one output", where=where, remedy="rename one")
        for same in stems.values()
        if len(same) > 1
    ]
    problems += [
        Problem(what=f"a recipe may not be called {stem}: such names are ours", where=where, remedy="rename it")
        for stem in stems
        if stem.startswith(_OURS)
    ]
    if problems:
        raise RecipeError(*problems)
    return {stem: same[0] for stem, same in sorted(stems.items())}


def _no_recipes(recipes_url: str, where: str, others: Sequence[str]) -> Problem:
    """Return what is wrong with a place that holds no recipes; `others` are almost recipes by their names."""
    remedy = "name the folder or prefix in which they lie"
    if others:
        remedy = f"rename {as_text(', '.join(others))}: suffixes are in small letters"
    elif _is_file(recipes_url):
        return Problem(what="is a file", where=where, remedy="name its folder, or give the file to geomerge merge")
    return Problem(what="holds no recipes, *.yaml or *.yml", where=where, remedy=remedy)


def _is_file(url: str) -> bool:
    folder, name = split_url(url)
    if not name.lower().endswith(_SUFFIXES):
        return False
    with closing(open_store(folder)) as store:
        return store.exists(name)


def entangled(recipes_url: str, outputs_url: str) -> Iterator[str]:
    """Yield what is confusing about where recipes and outputs lie, though nothing is overwritten."""
    recipes, outputs = place_of(recipes_url), place_of(outputs_url)
    if recipes == outputs:
        yield "RECIPES and OUTPUTS are the same folder: the outputs will lie beside the recipes"
    elif outputs.startswith(recipes):
        yield "OUTPUTS lies in RECIPES: what lists the recipes lists the outputs, too"
    elif recipes.startswith(outputs):
        yield "RECIPES lies in OUTPUTS: what lists the outputs lists the recipes, too"


def _is_text(name: str) -> bool:
    """Return whether a file's name is text: others come with half characters in place of their bytes."""
    return not any("\ud800" <= character <= "\udfff" for character in name)


def _is_recipe(path: str) -> bool:
    """Return whether a path is a recipe of the folder itself, and no hidden file of an editor."""
    return "/" not in path and not path.startswith(".") and path.endswith(_SUFFIXES)
