"""Methods are found by lying in their folder, and say who they are."""

from pathlib import Path

import pipeline.methods
from pipeline.methods import registry
from pipeline.recipe import recipe_schema


def test_every_file_of_the_folder_is_a_method_in_alphabetical_order() -> None:
    files = {path.stem for path in Path(pipeline.methods.__file__).parent.glob("*.py")} - {"__init__", "base"}
    assert list(registry()) == sorted(files)
    assert list(registry()) == [
        "fisher",
        "geometric_median",
        "linear",
        "mats",
        "regmean",
        "uncertainty_gradient_matching",
        "wudi",
    ]
    assert registry() is registry()


def test_a_method_says_what_it_is_and_has_its_shape() -> None:
    for name, method in registry().items():
        assert method.schema.name == name
        assert len(method.summary) > 20
        assert any(character.isdigit() for character in method.reference)  # a year
        assert all(parameter.description.endswith(".") for parameter in method.schema.parameters)
        if method.schema.uses_statistics:
            assert callable(method.solve)  # type: ignore[attr-defined]
            assert callable(method.stream)  # type: ignore[attr-defined]
            assert callable(method.weights)  # type: ignore[attr-defined]
        elif method.schema.solves:
            assert callable(method.weights)  # type: ignore[attr-defined]
            assert callable(method.rule)  # type: ignore[attr-defined]
        else:
            assert callable(method.coefficients)  # type: ignore[attr-defined]


def test_parameters_are_frozen() -> None:
    found = {
        name: {(p.name, p.kind, p.default, p.per_model, p.positive, p.constant) for p in method.schema.parameters}
        for name, method in registry().items()
    }
    weight = ("weight", "number", 1.0, True, True, True)
    off_diagonal = ("off_diagonal", "number", 1.0, False, False, True)
    assert found == {
        "fisher": {weight, ("normalize", "boolean", False, False, False, True)},
        "geometric_median": {weight},
        "linear": {("weight", "number", 1.0, True, False, False), ("normalize", "boolean", True, False, False, False)},
        "mats": {
            weight,
            ("objective", "word", "gram", False, False, True),
            ("iterations", "count", 100, False, False, True),
            ("tolerance", "number", 1e-5, False, True, True),
            off_diagonal,
        },
        "regmean": {weight, off_diagonal},
        "uncertainty_gradient_matching": {
            weight,
            ("data_size", "number", None, True, True, True),
            ("prior", "number", 1e-12, False, False, True),
        },
        "wudi": {weight},
    }


def test_words_about_moments_are_frozen() -> None:
    found = {
        name: (m.schema.moment_keys, m.schema.needs_moments, m.schema.needs_base) for name, m in registry().items()
    }
    start = ("start", "start_scale", "average")
    assert found == {
        "fisher": (("average",), True, False),
        "geometric_median": (("average", "metric"), False, False),
        "linear": ((), False, False),
        "mats": (start, True, False),
        "regmean": (start, True, False),
        "uncertainty_gradient_matching": (("base_statistics", "average"), True, True),
        "wudi": (start, False, True),
    }


def test_the_schema_of_recipes_knows_them() -> None:
    schema = recipe_schema({name: method.schema for name, method in registry().items()})
    assert set(schema["properties"]["merge_method"]["enum"]) == set(registry())  # type: ignore[index]
