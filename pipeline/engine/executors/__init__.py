"""Where workers run: in threads of this process, or as Ray actors.

Owns the choice. Each executor is imported only when it is chosen.
"""

from __future__ import annotations

import os

from pipeline.engine.executors.base import Executor
from pipeline.events import Listener, ignore


def takes_ray(name: str, *, address: str | None) -> bool:
    """Return whether `create_executor` would give the Ray executor; imports nothing."""
    # Ray sets these for the entrypoint of a submitted job.
    inside_job = "RAY_ADDRESS" in os.environ or "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ
    return name == "ray" or (name == "auto" and (address is not None or inside_job))


def create_executor(name: str, *, address: str | None, listener: Listener = ignore) -> Executor:
    """Return an executor that has not started yet.

    Args:
        name: "auto", "local" or "ray". "auto" takes Ray inside a Ray job or when an address is given.
        address: A Ray cluster's address, or None.
        listener: Told of workers that were lost, replaced, moved or retired; only from the thread that runs a verb.
    """
    if takes_ray(name, address=address):
        from pipeline.engine.executors.ray import RayExecutor

        return RayExecutor(address=address, listener=listener)
    from pipeline.engine.executors.local import LocalExecutor

    return LocalExecutor()
