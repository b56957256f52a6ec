"""YAML text as plain data with a line number for every key and value.

Owns the reading of YAML: syntax, duplicate keys, tags, aliases and their limits. Knows nothing of recipes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import yaml

from pipeline.errors import Problem, RecipeError

# A step into a document: a key of a mapping or an index of a list.
Path = tuple[str | int, ...]

# A recipe for 1000 models has some 10 000 values; a file whose aliases expand beyond this is an accident or an attack.
_MAXIMUM_NODES = 200_000
# The deepest legal value is models[i].parameters.weight[j].value[k]; the rest is room for readable errors.
_MAXIMUM_DEPTH = 32
_TAG = "tag:yaml.org,2002:"
_SCALAR_TAGS = frozenset(_TAG + name for name in ("str", "int", "float", "bool", "null"))
# A plain date or "=" is text: no key of a recipe is a date.
_UNWANTED_TAGS = frozenset({_TAG + "timestamp", _TAG + "value"})


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader without dates."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - the type is PyYAML's
        first: [(tag, pattern) for tag, pattern in resolvers if tag not in _UNWANTED_TAGS]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a value stands, and where its keys and parts stand.

    Attributes:
        line: Line of the value, from 1.
        keys: Line of each key, for a mapping.
        parts: Place of each value of a mapping or a list.
    """

    line: int
    keys: Mapping[str, int] = field(default_factory=dict)
    parts: Mapping[str | int, Place] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """One YAML document.

    Attributes:
        source: The file's name, for messages.
        data: Plain Python values: dict with text keys, list, str, int, float, bool, None.
        place: Lines of `data`.
        problems: What was wrong but did not stop the reading, with its line.
    """

    source: str
    data: object
    place: Place
    problems: tuple[tuple[int, Problem], ...]

    def line(self, path: Path, *, key: bool = False) -> int:
        """Return the line of a value, or of the key in front of it; steps that do not exist are passed over.

        Args:
            path: Keys and indices from the root.
            key: Whether the key's line is wanted instead of the value's.

        Returns:
            Line number from 1.
        """
        place, line = self.place, self.place.line
        for step in path:
            part = place.parts.get(step)
            if part is not None:
                line = place.keys.get(str(step), part.line) if key else part.line
                place = part
        return line


def read_document(text: str, source: str) -> Document:
    """Read one YAML document.

    Args:
        text: The file's content.
        source: The file's name, for messages.

    Returns:
        Data with line numbers; duplicate keys and odd tags are in its `problems`.

    Raises:
        RecipeError: The text is no YAML, is empty, nests too deeply, or expands too far.
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
    except yaml.YAMLError as error:
        raise RecipeError(_syntax_problem(error, source)) from error
    except RecursionError as error:
        raise RecipeError(Problem(what="the YAML is nested too deeply", where=source)) from error
    if node is None:
        raise RecipeError(Problem(what="the recipe is empty", where=source, remedy="give merge_method and models"))
    builder = _Builder(loader, source)
    data, place = builder.build(node, 0)
    return Document(source=source, data=data, place=place, problems=tuple(builder.problems))


def _syntax_problem(error: yaml.YAMLError, source: str) -> Problem:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        if "single document" in str(error.context):
            what, remedy = "there is more than one document in the file", "write one merge per file"
        else:
            context = f" {error.context}" if error.context else ""
            what, remedy = f"this is no valid YAML: {error.problem}{context}", "check quotes, colons and indentation"
        return Problem(what=what, where=f"{source}:{error.problem_mark.line + 1}", remedy=remedy)
    return Problem(what=f"this is no YAML text: {' '.join(str(error).split())}", where=source)


class _Builder:
    """Turns composed nodes into data, counting what it builds so that aliases cannot explode."""

    def __init__(self, loader: _Loader, source: str) -> None:
        self.problems: list[tuple[int, Problem]] = []
        self._loader = loader
        self._source = source
        self._nodes = 0

    def build(self, node: yaml.Node, depth: int) -> tuple[object, Place]:
        line = node.start_mark.line + 1
        self._nodes += 1
        if self._nodes > _MAXIMUM_NODES or depth > _MAXIMUM_DEPTH:
            limit = "nests too deeply" if depth > _MAXIMUM_DEPTH else f"has more than {_MAXIMUM_NODES} values"
            raise RecipeError(
                Problem(what=f"the YAML {limit} once its aliases are expanded", where=f"{self._source}:{line}")
            )
        if isinstance(node, yaml.MappingNode) and node.tag == _TAG + "map":
            return self._build_mapping(node, depth)
        if isinstance(node, yaml.SequenceNode) and node.tag == _TAG + "seq":
            built = [self.build(part, depth + 1) for part in node.value]
            places: dict[str | int, Place] = dict(enumerate(place for _, place in built))
            return [data for data, _ in built], Place(line=line, parts=places)
        return self._build_scalar(node, line), Place(line=line)

    def _build_scalar(self, node: yaml.Node, line: int) -> object:
        if not isinstance(node, yaml.ScalarNode) or node.tag not in _SCALAR_TAGS:
            self._add(line, f"the YAML tag {node.tag.replace(_TAG, '!!')} is not allowed", "write plain values")
            return None
        try:
            return self._loader.construct_object(node)
        except (ValueError, KeyError):
            self._add(line, f"{node.value[:60]!r} is no {node.tag.removeprefix(_TAG)}", "write plain values")
            return None

    def _build_mapping(self, node: yaml.MappingNode, depth: int) -> tuple[dict[str, object], Place]:
        data: dict[str, object] = {}
        keys: dict[str, int] = {}
        parts: dict[str | int, Place] = {}
        merged: list[yaml.Node] = []
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if key_node.tag == _TAG + "merge":
                merged += value_node.value if isinstance(value_node, yaml.SequenceNode) else [value_node]
                continue
            if key_node.tag != _TAG + "str" or not isinstance(key_node, yaml.ScalarNode):
                self._add(line, f"the key {_key_text(key_node)} is not text", "put it in quotes")
                continue
            key = str(key_node.value)
            if key in keys:
                self._add(line, f"the key `{key}` is given twice, first in line {keys[key]}", "keep one of them")
                continue
            keys[key] = line
            data[key], parts[key] = self.build(value_node, depth + 1)
        # As YAML says: the mapping's own keys win, then the first mapping merged in.
        for other in merged:
            other_data, other_place = self.build(other, depth + 1)
            if not isinstance(other_data, dict):
                self._add(other.start_mark.line + 1, "`<<` merges mappings only", "")
                continue
            for key in (key for key in other_data if key not in data):
                data[key], keys[key], parts[key] = other_data[key], other_place.keys[key], other_place.parts[key]
        return data, Place(line=node.start_mark.line + 1, keys=keys, parts=parts)

    def _add(self, line: int, what: str, remedy: str) -> None:
        self.problems.append((line, Problem(what=what, where=f"{self._source}:{line}", remedy=remedy)))


def _key_text(node: yaml.Node) -> str:
    return f"`{node.value}`" if isinstance(node, yaml.ScalarNode) else "of this entry"
