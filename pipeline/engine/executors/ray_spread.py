"""On which nodes a job's first workers start: as even as the cluster has room, found by a placement group.

Owns the group, which is gone when the nodes are known. Kept, it would hold a place for every worker that moved away,
and ask an autoscaler for a node to put the empty place on.
"""

from __future__ import annotations

from collections.abc import Sequence

import ray
from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group

from pipeline.engine.executors.ray_nodes import Ask, draining_nodes

# A group for which there is room was placed within 0.1 s; without room the workers come up one by one, as room does.
_WAIT_S = 5.0


def places(ask: Ask, workers: int, *, wait_s: float = _WAIT_S) -> Sequence[str]:
    """Return the ids of the nodes on which to start workers, one each; none where nothing is to choose, or no room.

    Args:
        ask: What each of them asks of a node.
        workers: How many.
        wait_s: For a cluster that takes places back just now.
    """
    nodes = [node for node in ray.nodes() if node["Alive"]]
    has = ray.cluster_resources()
    short = has.get("CPU", 0) < workers or has.get("memory", 0) < workers * ask.memory_bytes
    # Ray gives bundles to nodes that are about to go, as actors it does not.
    if workers < 2 or len(nodes) < 2 or short or draining_nodes():
        return []
    group = placement_group([ask.bundle] * workers, strategy="SPREAD")
    try:
        if not group.wait(wait_s):
            return []
        found = placement_group_table(group)["bundles_to_node_id"]
    finally:
        remove_placement_group(group)
    return [found[number] for number in sorted(found, key=int)]
