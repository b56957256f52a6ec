"""The rooms import downwards only, third-party packages stay in their rooms, and files keep the house's form."""

import ast
import importlib
import inspect
import pickle
import pkgutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import pipeline
from pipeline.errors import PipelineError, Problem

ROOT = Path(pipeline.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
NAMES = [path.relative_to(ROOT).as_posix() for path in FILES]

# Lowest first; rooms of one line do not know each other.
ORDER = (
    ("errors", "units", "events", "signals"),
    ("storage",),
    ("checkpoints",),
    ("recipe",),
    ("numerics",),
    ("methods",),
    ("planning",),
    ("engine",),
    ("reporting", "calibration"),
    ("merging", "recipe_folder"),
    ("batch", "cleaning"),
    ("cli_options",),
    ("cli",),
    ("__main__",),
)
LEVEL = {room: level for level, rooms in enumerate(ORDER) for room in rooms}

# Package -> the only places that may import it, as paths below pipeline/.
THIRD_PARTY = {
    "fsspec": ("storage/",),
    "pyarrow": ("checkpoints/",),
    "pydantic": ("recipe/",),
    "yaml": ("recipe/", "reporting/model_card.py"),
    "torch": ("numerics/", "engine/", "calibration/"),
    "transformers": ("calibration/opening.py", "calibration/layers.py"),
    "numpy": ("numerics/", "methods/", "engine/", "reporting/observations.py", "storage/mapped.py"),
    "ml_dtypes": ("numerics/dtypes.py",),
    "xxhash": ("engine/loaded.py",),
    "llvmlite": ("numerics/vector_code.py", "storage/bus_errors.py"),
    "ray": ("engine/executors/ray",),
    "rich": ("reporting/", "cli.py"),
    "click": ("cli.py", "cli_options.py"),
}


def _imports(path: Path) -> Iterator[tuple[int, str]]:
    """Every imported module with its line, those inside functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} is a relative import"
            assert node.module is not None
            yield node.lineno, node.module
            if node.module == "pipeline":
                yield from ((node.lineno, f"pipeline.{alias.name}") for alias in node.names)


def _room(name: str) -> str:
    return name.split("/")[0].removesuffix(".py")


def _edges() -> list[tuple[str, int, str]]:
    """(file, line, imported room) for every import of ours."""
    found = []
    for path, name in zip(FILES, NAMES, strict=True):
        for line, module in _imports(path):
            parts = module.split(".")
            if parts[0] == "pipeline" and len(parts) > 1 and parts[1] != "__version__":
                found.append((name, line, parts[1]))
    return found


def test_every_room_has_a_level() -> None:
    rooms = {_room(name) for name in NAMES} - {"__init__"}
    assert rooms == set(LEVEL)


def test_no_room_imports_from_one_above_it() -> None:
    edges = _edges()
    assert len(edges) > 100  # the parser sees the imports at all
    upward = [
        f"{name}:{line} imports {room}"
        for name, line, room in edges
        if _room(name) != room and LEVEL[room] >= LEVEL[_room(name)]
    ]
    assert upward == []


def test_the_package_itself_imports_nothing() -> None:
    assert list(_imports(ROOT / "__init__.py")) == []


def test_third_party_packages_stay_in_their_rooms() -> None:
    strays, used = [], set()
    for path, name in zip(FILES, NAMES, strict=True):
        for line, module in _imports(path):
            package = module.split(".")[0]
            if package == "pipeline" or package in sys.stdlib_module_names:
                continue
            used.add(package)
            if not any(name.startswith(place) for place in THIRD_PARTY.get(package, ())):
                strays.append(f"{name}:{line} imports {package}")
    assert strays == []
    assert used == set(THIRD_PARTY)  # the table has no entry that has fallen out of use


@pytest.mark.parametrize("name", NAMES)
def test_a_file_is_short_and_says_what_it_is_for(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    docstring = ast.get_docstring(ast.parse(text))
    assert docstring is not None
    assert docstring.strip()
    assert len(text.splitlines()) <= 400


@pytest.mark.parametrize("name", NAMES)
def test_no_file_swallows_everything_or_prints(name: str) -> None:
    tree = ast.parse((ROOT / name).read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        assert not isinstance(node, ast.Assert), f"{name}:{node.lineno} asserts"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id != "print", f"{name}:{node.lineno} prints"
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"{name}:{node.lineno} is a bare except"


def _error_classes() -> list[type[PipelineError]]:
    for info in pkgutil.walk_packages(pipeline.__path__, "pipeline."):
        if not info.name.endswith("__main__"):
            importlib.import_module(info.name)
    found: list[type[PipelineError]] = [PipelineError]
    for kind in found:
        found += [child for child in kind.__subclasses__() if child not in found]
    return [kind for kind in found if kind.__module__.startswith("pipeline.")]


def test_every_error_survives_pickling_with_its_text() -> None:
    classes = _error_classes()
    assert len(classes) >= 10
    problems = (Problem(what="a", where="b", remedy="c"), Problem(what="ünd"))
    for kind in classes:
        for arguments in (problems[:1], problems):
            error = kind(*arguments)
            for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
                copy = pickle.loads(pickle.dumps(error, protocol=protocol))
                assert type(copy) is kind
                assert copy.problems == arguments
                assert str(copy) == str(error)
                assert copy.exit_code == kind.exit_code


def test_exit_codes_tell_the_classes_apart() -> None:
    direct = [kind for kind in _error_classes() if kind.__bases__ == (PipelineError,)]
    codes = [kind.exit_code for kind in direct]
    assert len(set(codes)) == len(codes)
    assert PipelineError.exit_code == 1
    assert all(1 < code < 64 for code in codes)


def test_public_functions_have_a_docstring() -> None:
    bare = []
    for info in pkgutil.walk_packages(pipeline.__path__, "pipeline."):
        if info.name.endswith("__main__"):
            continue
        module = importlib.import_module(info.name)
        for name, value in vars(module).items():
            local = getattr(value, "__module__", "") == info.name
            if local and not name.startswith("_") and (inspect.isfunction(value) or inspect.isclass(value)):
                bare += [] if inspect.getdoc(value) else [f"{info.name}.{name}"]
    assert bare == []
