"""Methods are found by lying in their folder, and say who they are."""

from pathlib import Path

import pipeline.methods
from pipeline.methods import registry
from pipeline.recipe import recipe_schema


def test_every_file_of_the_folder_is_a_method_in_alphabetical_order() -> None:
    files = {path.stem for path in Path(pipeline.methods.__file__).parent.glob("*.py")} - {"__init__", "base"}
    assert list(registry()) == sorted(files)
    assert list(registry()) == ["geometric_median", "linear"]
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
        else:
            assert callable(method.coefficients)  # type: ignore[attr-defined]


def test_parameters_are_frozen() -> None:
    found = {
        name: {(p.name, p.kind, p.default, p.per_model, p.positive, p.constant) for p in method.schema.parameters}
        for name, method in registry().items()
    }
    assert found == {
        "geometric_median": {("weight", "number", 1.0, True, True, True)},
        "linear": {("weight", "number", 1.0, True, False, False), ("normalize", "boolean", True, False, False, False)},
    }


def test_the_schema_of_recipes_knows_them() -> None:
    schema = recipe_schema({name: method.schema for name, method in registry().items()})
    assert set(schema["properties"]["merge_method"]["enum"]) == set(registry())  # type: ignore[index]
