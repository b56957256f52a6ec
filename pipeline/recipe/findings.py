"""The collector of everything that is wrong or odd in one recipe.

Owns problems with their lines, warnings, and the search for the nearest known word; knows no key by name.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from pipeline.errors import Problem, RecipeError
from pipeline.recipe.document import Document, Path


def path_text(path: Path) -> str:
    """Return a path as people write it: models[0].parameters.weight."""
    text = ""
    for step in path:
        text += f"[{step}]" if isinstance(step, int) else f".{step}" if text else step
    return text


def nearest(word: str, known: Iterable[str]) -> str:
    """Return advice that names the known word nearest to a misspelt one, or all known words.

    Args:
        word: What was written.
        known: What may be written here.

    Returns:
        A remedy for a `Problem`.
    """
    words = list(known)
    lower = {candidate.lower(): candidate for candidate in reversed(words)}
    close = difflib.get_close_matches(word.lower(), lower, n=1)
    if close:
        return f"did you mean `{lower[close[0]]}`?"
    return f"known here: {', '.join(words)}" if words else "nothing may be written here"


class Findings:
    """Problems and warnings of one document, in the order of its lines.

    Args:
        document: Where the lines come from; its own problems are the first findings.
    """

    def __init__(self, document: Document) -> None:
        self._document = document
        self._problems = list(document.problems)
        self._warnings: list[tuple[int, str]] = []

    def add(self, path: Path, what: str, remedy: str = "", *, key: bool = False) -> None:
        """Note a problem.

        Args:
            path: The value it is about.
            what: The fact.
            remedy: What to do about it.
            key: Whether the key is at fault, not the value.
        """
        line = self._document.line(path, key=key)
        self._problems.append((line, Problem(what=what, where=f"{self._document.source}:{line}", remedy=remedy)))

    def warn(self, path: Path, text: str) -> None:
        """Note something legal that the user should know.

        Args:
            path: The key it is about.
            text: The fact.
        """
        line = self._document.line(path, key=True)
        self._warnings.append((line, f"{self._document.source}:{line}: {text}"))

    def line(self, path: Path) -> int:
        """Return the line of a value, for a message that names a second place."""
        return self._document.line(path)

    @property
    def warnings(self) -> tuple[str, ...]:
        """All warnings, by line."""
        return tuple(text for _, text in sorted(self._warnings, key=lambda found: found[0]))

    def raise_problems(self) -> None:
        """Raise everything found wrong at once, by line; return when there is nothing.

        Raises:
            RecipeError: There is at least one problem.
        """
        if self._problems:
            raise RecipeError(*(problem for _, problem in sorted(self._problems, key=lambda found: found[0])))
