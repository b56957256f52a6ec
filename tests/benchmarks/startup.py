"""How long a command takes until it reads the first byte of a tensor, and what it imports until then.

The inputs are dropped from the page cache, and a process beside the command looks every millisecond which of their
pages have come back: that takes no privilege, no tracing and no word of the program's. The headers lie at the
beginning of a file, and what the kernel reads ahead of them is left out.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from tests.benchmarks import caches

# Seconds between two looks: a look takes a third of it.
_LOOK_S = 0.001
# Of a file, what reading its header may bring into the cache, the kernel reading four times as far ahead; chunks that
# are read at the same time soon lie beyond it.
_HEADER_BYTES = 4 << 20
_IMPORT = re.compile(r"import time:\s+(\d+) \|\s+\d+ \|\s+(\S+)")
# Packages that are told apart, at most.
_PACKAGES = 12


def first_byte_s(command: Sequence[str], inputs: Sequence[Path], output: Path) -> float | None:
    """Return the seconds from the start of a merge's process to the first bytes of tensors in the page cache.

    Args:
        command: The merge; the output folder is appended.
        inputs: Its files, each several times as long as its header.
        output: Is removed afterwards.

    Returns:
        None where the page cache cannot be dropped, as on a tmpfs.
    """
    caches.drop(inputs)
    with ExitStack() as opened:
        watched = [opened.enter_context(caches.Residency(path)) for path in inputs]
        if any(file.beyond(0) for file in watched):
            return None
        os.sync()
        started, found = time.perf_counter(), None
        process = subprocess.Popen((*command, str(output)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while found is None and process.poll() is None:
            if any(file.beyond(_HEADER_BYTES) for file in watched):
                found = time.perf_counter() - started
            else:
                time.sleep(_LOOK_S)
        if process.wait():
            raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}")
    shutil.rmtree(output)
    return found


def imports_s(arguments: Sequence[str], output: Path) -> dict[str, float]:
    """Return the seconds that a merge spends on importing, by package, the slowest ones; taken with -X importtime."""
    command = (sys.executable, "-X", "importtime", *arguments[1:], str(output))
    done = subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    shutil.rmtree(output)
    packages: Counter[str] = Counter()
    for microseconds, module in _IMPORT.findall(done.stderr):
        packages[module.partition(".")[0]] += int(microseconds)
    slowest = dict(packages.most_common(_PACKAGES))
    return {package: micro / 1e6 for package, micro in {**slowest, "all": packages.total()}.items()}
