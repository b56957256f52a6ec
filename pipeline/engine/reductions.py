"""What iterations over the parameters have measured, kept so that a driver that dies loses the one in progress only.

Owns ``_geomerge/reductions/0001.json``, …: each question and its answer, every number by its bits. The solvers are
deterministic: started again they ask the same questions in the same order, and get the saved answers until these run
out. Legend: Q combinations, N models.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from pipeline.engine.run_folder import REDUCTIONS, write_json
from pipeline.storage import MissingObject, Store

# By group: coefficients (Q × N) of combinations; and the Q·N squared distances and Q·Q products measured for them.
Requests = Mapping[int, np.ndarray]
Totals = dict[int, np.ndarray]


class Reductions:
    """One answer a question: a saved one as long as there are any, then what is measured, which is saved.

    Args:
        output: The output folder.
        fingerprint: The plan's.
        measure: Gives the answer to a question of that number, from 1.
    """

    def __init__(self, output: Store, fingerprint: str, measure: Callable[[int, Requests], Totals]) -> None:
        self._output, self._fingerprint, self._measure = output, fingerprint, measure
        self._asked = 0
        self.replayed = 0

    def __call__(self, requests: Requests) -> Totals:
        """Return the answer to the next question."""
        self._asked += 1
        # Once one was measured in this run, those that follow are not there, or answer other questions.
        if self.replayed == self._asked - 1:
            saved = self._saved(requests)
            if saved is not None:
                self.replayed += 1
                return saved
            forget_reductions(self._output, above=self.replayed)
        totals = self._measure(self._asked, requests)
        body = {"fingerprint": self._fingerprint, "questions": _packed(requests), "answers": _packed(totals)}
        write_json(self._output, _path(self._asked), {**body, "sha256": _digest(body)})
        return totals

    def _saved(self, requests: Requests) -> Totals | None:
        """Return the saved answer; None when there is none, it is damaged, or it answers another question."""
        try:
            found = _parse(self._output.read(_path(self._asked)))
        except MissingObject:
            return None
        if found is None or found["fingerprint"] != self._fingerprint or found["questions"] != _packed(requests):
            return None
        return {int(group): _unpacked(value) for group, value in found["answers"].items()}


def forget_reductions(output: Store, above: int = 0) -> None:
    """Remove the saved answers to the questions after number `above`."""
    for path in output.list(REDUCTIONS):
        if path > _path(above):
            output.delete(path)


def _path(number: int) -> str:
    return f"{REDUCTIONS}/{number:06d}.json"


def _packed(arrays: Mapping[int, np.ndarray]) -> dict[str, Any]:
    """Return arrays of float64 as JSON-ready data, by their bits."""
    return {
        str(group): {
            "shape": list(array.shape),
            "float64_little_endian_base64": base64.b64encode(np.ascontiguousarray(array, "<f8").tobytes()).decode(),
        }
        for group, array in arrays.items()
    }


def _unpacked(value: Mapping[str, Any]) -> np.ndarray:
    data = base64.b64decode(value["float64_little_endian_base64"])
    return np.frombuffer(data, dtype="<f8").astype(np.float64).reshape(value["shape"])


def _parse(data: bytes) -> dict[str, Any] | None:
    """Return a saved document, or None when any bit of it is not as it was written."""
    try:
        document = json.loads(data)
    except ValueError:
        return None
    if not isinstance(document, dict):
        return None
    digest = document.pop("sha256", None)
    return document if digest == _digest(document) else None


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
