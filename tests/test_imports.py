"""What a command loads: a merge of whole models on the CPU is half done by the time that torch would be imported.

What is slow to import is needed by some merges only: torch by adapters and devices, Ray by clusters, fsspec by remote
folders, rich by terminals. Each module here takes a tenth of a second or more, and hundreds of megabytes in the worst
case; a single import at the top of a file would bring it back unseen.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.planning.plans import small_family
from tests.support.families import Family

SLOW = ("torch", "ray", "numba", "scipy", "fsspec", "s3fs", "rich", "pandas", "pyarrow", "pyarrow.dataset")
# Runs the command line as its entry point does, and tells on the last line what was loaded by then.
PROGRAM = """
import json, sys
from pipeline.cli import main
main(sys.argv[1:], standalone_mode=False)
print(json.dumps(sorted(sys.modules)))
"""


def loaded_by(*arguments: object) -> list[str]:
    """The slow modules of a fresh process at the end of a command."""
    command = [sys.executable, "-c", PROGRAM, *map(str, arguments)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert ran.returncode == 0, ran.stderr
    modules = json.loads(ran.stdout.splitlines()[-1])
    assert "pipeline.cli" in modules
    return [name for name in SLOW if name in modules]


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return small_family(tmp_path_factory.mktemp("family"))


@pytest.mark.parametrize(
    "settings",
    [
        {"merge_method": "linear", "parameters": {"weight": 1.0}},
        {"merge_method": "geometric_median"},
        {"merge_method": "geometric_median", "pipeline": {"scope": "tensor"}},
        {"merge_method": "geometric_median", "pipeline": {"distances": "stream"}},
        {"merge_method": "geometric_median", "pipeline": {"non_finite": "base"}, "out_dtype": "float16"},
    ],
    ids=["average", "median", "per tensor", "streamed", "repaired"],
)
def test_a_merge_of_whole_models_on_the_cpu_loads_nothing_slow(
    family: Family, tmp_path: Path, settings: dict[str, object]
) -> None:
    recipe = family.recipe(name=f"{tmp_path.name}.yaml", **settings)
    out = tmp_path / "out"
    loaded = loaded_by("merge", recipe, out, "--executor", "local", "--device", "cpu", "--json")
    assert (out / "geomerge_report.json").is_file()
    # Tables of what was measured are Parquet; an average measures nothing.
    assert loaded == (["pyarrow"] if settings["merge_method"] != "linear" else [])
    assert loaded_by("verify", out, "--json") == []


def test_a_plan_loads_nothing_slow(family: Family, tmp_path: Path) -> None:
    assert loaded_by("plan", family.recipe(name="plan.yaml"), tmp_path / "out", "--json") == []


def test_devices_and_factors_are_where_torch_is_needed() -> None:
    """The names above are those that the package would load: a rename in it must not empty the test."""
    program = "import sys, pipeline.engine.factor_math, pipeline.engine.executors.ray; print('torch' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=200, check=True)
    assert ran.stdout.split() == ["True"]
