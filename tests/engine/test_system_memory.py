"""What solving a matrix takes is no more than its plan says: measured, with matrices that outweigh all else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.support.families import make_family
from tests.support.moments import with_statistics

SHAPES = {"model.layers.0.mlp.weight": (512, 768)}
# The process's peak is reset before each merge; what it held before is no part of the merge.
SCRIPT = """
import json, sys
from pathlib import Path
import torch
from pipeline.engine.systems import Systems
from pipeline.merging import Resources, load_recipe, merge, plan_merge
from pipeline.storage import open_store

def status(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

found = {}
merge(sys.argv[2], sys.argv[2] + ".warm")
for recipe in sys.argv[1:]:
    out = recipe + ".out"
    planned = plan_merge(load_recipe(recipe)[0], open_store(out), Resources(), probe=False)
    terms = dict(planned.memory.terms)
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    merge(recipe, out)
    projected = planned.memory.total_bytes - terms["runtime"]
    found[Path(recipe).name] = [status("VmHWM") - before, projected, terms["matrix"]]
print(json.dumps(found))
"""


def test_peaks_stay_below_the_projection(tmp_path: Path) -> None:
    family = make_family(tmp_path, 2, shapes=SHAPES)
    of = with_statistics(family, ["input_gram", "output_gram"], SHAPES)
    recipes = [
        of.recipe("regmean", name="regmean.yaml"),
        of.recipe("mats", name="gram.yaml", parameters={"iterations": 2}),
        of.recipe("mats", name="kfac.yaml", parameters={"objective": "kfac", "iterations": 2}),
    ]
    # What one merge has freed is given back to the system, so that the next one's growth is its own.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", SCRIPT, *map(str, recipes)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    for name, (peak, projected, matrix) in json.loads(done.stdout).items():
        assert peak <= projected, name
        # The projection is none that anything would fit.
        assert peak > 0.3 * matrix, name
