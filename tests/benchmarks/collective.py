"""The reduction among workers alone: joining a group and summing int64 by gloo, for ranks that are local processes.

    python -m tests.benchmarks.collective RESULT WORLDS BYTES

Owns the measurement behind `tests.benchmarks.simulate`, as the Ray executor does it: a store in the driver's process,
one group of all ranks, one sum of integers, which is exact in any order.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import time
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.distributed import PrefixStore, ProcessGroupGloo, TCPStore

_TIMEOUT_S = 60
_FORK = multiprocessing.get_context("fork")
# Sums before the clock runs: the first ones set up buffers.
_WARM = 3
# Seconds of sums for one size at most, whatever the number of ranks.
_SECONDS = 2.0
_REPEATS = 200


def measure(world: int, sizes_bytes: list[int], told: Connection) -> None:
    """Tell seconds to join and, by size, the median seconds of a sum as rank 0 sees it; runs in a fresh process."""
    # Ranks are forked while there is one thread: the store starts others.
    ours, theirs = _FORK.Pipe(duplex=False)
    ports = [_FORK.Pipe(duplex=False) for _ in range(world)]
    ranks = [
        _FORK.Process(target=_rank, args=(port, rank, world, sizes_bytes, theirs))
        for rank, (port, _) in enumerate(ports)
    ]
    for process in ranks:
        process.start()
    store = TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    # What the store's thread does while the ranks join is the driver's cost.
    cpu = time.process_time()
    for _, port in ports:
        port.send(store.port)
    found: dict[str, Any] = ours.recv() if ours.poll(_TIMEOUT_S) else {"failed": "no answer in time"}
    told.send({"world": world, "store_cpu_s": time.process_time() - cpu, **found})
    for process in ranks:
        process.join(_TIMEOUT_S)
        if process.is_alive():
            process.kill()


def _rank(ports: Connection, rank: int, world: int, sizes_bytes: list[int], told: Connection) -> None:
    """Be one rank: join, sum, check; rank 0 tells."""
    port = ports.recv()
    started = time.perf_counter()
    options = ProcessGroupGloo._Options()
    options._timeout = timedelta(seconds=_TIMEOUT_S)
    options._devices = [ProcessGroupGloo.create_device(hostname="127.0.0.1", lazy_init=True)]
    store = PrefixStore("generation-1", TCPStore("127.0.0.1", port, None, False))
    group = ProcessGroupGloo(store, rank, world, options)
    values = torch.zeros(1, dtype=torch.int64)
    group.allreduce([values]).wait()
    found: dict[str, Any] = {"join_s": time.perf_counter() - started, "seconds": {}, "cpu_s": {}, "exact": True}
    for size_bytes in sizes_bytes:
        elements = size_bytes // 8
        mine = torch.arange(elements, dtype=torch.int64) + rank
        expected = torch.arange(elements, dtype=torch.int64) * world + world * (world - 1) // 2
        times = []
        begun = 0.0
        for number in range(_WARM + _REPEATS):
            values = mine.clone()
            before = time.perf_counter()
            if number == _WARM:
                begun, cpu = before, time.process_time()
            group.allreduce([values]).wait()
            if number >= _WARM:
                times.append(time.perf_counter() - before)
            found["exact"] = found["exact"] and bool(torch.equal(values, expected))
            # Rank 0 decides for all how often: its word goes through the group itself.
            go = torch.tensor([int(not begun or time.perf_counter() - begun < _SECONDS)], dtype=torch.int64)
            if rank:
                go.zero_()
            group.allreduce([go]).wait()
            if not int(go):
                break
        found["seconds"][str(size_bytes)] = median(times)
        found["cpu_s"][str(size_bytes)] = (time.process_time() - cpu) / len(times)
    if rank == 0:
        told.send(found)
    # Gloo's threads may wait for neighbours that have gone; nothing is left to clean up.
    os._exit(0)


if __name__ == "__main__":
    worlds, sizes = ([int(item) for item in text.split(",")] for text in sys.argv[2:4])
    results = []
    for world in worlds:
        ours, theirs = _FORK.Pipe(duplex=False)
        process = _FORK.Process(target=measure, args=(world, sizes, theirs))
        process.start()
        results.append(ours.recv())
        process.join()
    Path(sys.argv[1]).write_text(json.dumps(results))
