"""A rank of the group in which actors add up their sums: gloo, over a store that is the driver's.

Owns the collective. Importing this module imports torch, so it is imported by merges that have something to add up.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import numpy as np
import torch
from torch.distributed import AllreduceOptions, PrefixStore, ProcessGroupGloo, TCPStore  # type: ignore[attr-defined]


class Rank:
    """One of at least two ranks that have joined a group.

    Args:
        host: The store's.
        port: The store's.
        generation: The group's; groups of one store are told apart by it.
        ranks: This rank, and how many there are.
        address: Of this node, as the other ranks reach it.
        limits_s: Seconds for all to join, and for an exchange.

    Raises:
        RuntimeError: Not all ranks came in time.
    """

    def __init__(
        self,
        host: str,
        port: int,
        generation: int,
        ranks: tuple[int, int],
        *,
        address: str,
        limits_s: tuple[float, float],
    ) -> None:
        join_s, reduce_s = (timedelta(seconds=limit_s) for limit_s in limits_s)
        options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._timeout = join_s
        # Bound to Ray's own address of the node: gloo would take the host name's, which is often 127.0.1.1.
        # Lazily, a rank connects to its neighbours in the ring alone: 32 ms of the store's time for 64 ranks in
        # place of 260, and growing with their number instead of its square.
        options._devices = [ProcessGroupGloo.create_device(hostname=address, lazy_init=True)]
        store = TCPStore(host, port, None, False, join_s)
        self._group: Any = ProcessGroupGloo(PrefixStore(f"generation-{generation}", store), *ranks, options)
        self._exchange = AllreduceOptions()
        self._exchange.timeout = reduce_s

    def add_up(self, numbers: np.ndarray) -> None:
        """Replace integers by their sums over all ranks, which all call this with as many.

        Args:
            numbers: int64, of one dimension.

        Raises:
            RuntimeError: Another rank was lost, or came late.
        """
        # A ring over integers: their sum is exact in any order, so the algorithm leaves no trace, and each rank moves
        # twice its own sums however many ranks there are. Gathering everybody's at every rank moved world − 1 times as
        # much: with 9 MB a rank on one machine 43, 164 and 1152 ms for 2, 3 and 5 ranks, where this takes 21, 28 and
        # 62 ms.
        self._group.allreduce([torch.from_numpy(numbers)], self._exchange).wait()
