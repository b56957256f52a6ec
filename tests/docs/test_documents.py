"""The documentation is true: its recipes are read, its commands and its Python are run, its links lead somewhere."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pipeline.cli import OPTIONS
from pipeline.methods import registry
from pipeline.recipe import parse_recipe
from tests.support.adapters import Layout, linears, random_factors, save_adapter
from tests.support.families import fine_tune, random_weights, save_model

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
NAMED = re.compile(r"# ([\w/]+\.yaml)\n")
LINK = re.compile(r"\]\(([^)#]+)(?:#[^)]*)?\)")
METHODS = {name: method.schema for name, method in registry().items()}


def blocks(document: Path, language: str) -> list[str]:
    return [text for kind, text in BLOCK.findall(document.read_text()) if kind == language]


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the documents speak of: models/base and its fine-tunes, and as many adapters."""
    root = tmp_path_factory.mktemp("docs")
    base = random_weights(0)
    save_model(root / "models/base", base, dtype=torch.bfloat16)
    for number, name in enumerate(["chat", "code", "law", "poetry", "broken"]):
        values = fine_tune(base, number, size=0.3 if name == "broken" else 0.005)
        save_model(root / "models" / name, values, dtype=torch.bfloat16)
        layout = Layout(modules=linears(base, "q_proj", "v_proj"), size=0.3 if name == "broken" else 0.005)
        factors = random_factors(base, layout, number)
        save_adapter(root / "adapters" / name, base, layout, factors, base_path=Path("models/base"))
    return root


@pytest.mark.parametrize("document", DOCUMENTS, ids=relative)
def test_links_lead_somewhere(document: Path) -> None:
    targets = [link for link in LINK.findall(document.read_text()) if "://" not in link]
    missing = [link for link in targets if not (document.parent / link).exists()]
    assert not missing


@pytest.mark.parametrize("document", [d for d in DOCUMENTS if blocks(d, "yaml")], ids=relative)
def test_recipes_are_read(document: Path) -> None:
    for text in blocks(document, "yaml"):
        recipe = parse_recipe(text, source=relative(document), methods=METHODS)
        assert recipe.models


@pytest.mark.parametrize(
    "document", [d for d in DOCUMENTS if blocks(d, "console") or blocks(d, "python")], ids=relative
)
def test_commands_and_python_run(document: Path, models: Path, tmp_path: Path) -> None:
    for folder in ("models", "adapters"):
        (tmp_path / folder).symlink_to(models / folder)
    # A recipe's first line names its file; what a document does not have itself, it means as the README has it.
    for text in (*blocks(ROOT / "README.md", "yaml"), *blocks(document, "yaml")):
        if name := NAMED.match(text):
            (tmp_path / name[1]).parent.mkdir(exist_ok=True)
            (tmp_path / name[1]).write_text(text)
    for text in blocks(document, "console"):
        for line in text.splitlines():
            assert line.startswith("$ geomerge "), line
            command = [sys.executable, "-m", "pipeline", *shlex.split(line)[2:]]
            done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
            assert done.returncode == 0, f"{line}\n{done.stderr}"
            assert done.stdout
    for text in blocks(document, "python"):
        done = subprocess.run([sys.executable, "-c", text], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_every_option_is_documented() -> None:
    text = "".join((ROOT / "docs" / name).read_text() for name in ("output.md", "batch.md", "statistics.md"))
    assert [option for option in OPTIONS if f"`{option}" not in text] == []


def test_every_key_of_a_recipe_is_documented() -> None:
    from pipeline.recipe import recipe_schema

    text = (ROOT / "docs/recipe.md").read_text()
    schema = recipe_schema(METHODS)
    document = schema.get("properties", {})
    assert document
    # Words of older mergekit recipes that do nothing there are accepted and not taught.
    idle = {"input_model_parameters", "residual_weight", "embed_slerp"}
    assert [key for key in document if key not in text and key not in idle] == []


def test_every_key_of_the_report_is_documented(models: Path, tmp_path: Path) -> None:
    from pipeline.merging import merge

    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "merge_method: geometric_median\n"
        f"base_model: {models}/models/base\n"
        f"models: [{{model: {models}/models/chat}}, {{model: {models}/models/code}}, {{model: {models}/models/law}}]\n"
    )
    report = merge(str(recipe), str(tmp_path / "out"))
    adapters = tmp_path / "adapters.yaml"
    adapters.write_text(
        "merge_method: geometric_median\npipeline: {output: adapter}\n"
        f"base_model: {models}/models/base\n"
        f"models: [{{model: {models}/adapters/chat}}, {{model: {models}/adapters/code}}]\n"
    )
    modules = merge(str(adapters), str(tmp_path / "adapter"))["modules"]
    text = (ROOT / "docs/output.md").read_text()
    group = report["groups"][0]
    keys = [*report, *modules[0], *group, *report["models"][0], *report["files"][0], *group["written"]]
    missing = [key for key in keys if key != "model" and f"`{key}" not in text]
    assert missing == []
