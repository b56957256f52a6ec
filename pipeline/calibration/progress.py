"""How far a calibration is, as events.

Owns when something is told. Must not know what is computed.
"""

from __future__ import annotations

import time

from pipeline.events import ExamplesSeen, Listener, StageEnded


class StageProgress:
    """Tells of one stage: a layer, or a pass of the whole model over the examples.

    Args:
        listener: Told.
        stage: Its name.
        number: Which one of `stages` it is, from 1.
        stages: How many there are.
        examples: How many examples it sees.
    """

    def __init__(self, listener: Listener, stage: str, *, number: int, stages: int, examples: int) -> None:
        self._listener, self._stage, self._number, self._stages = listener, stage, number, stages
        self._examples = examples
        self._started_s = time.perf_counter()

    def seen(self, done: int) -> None:
        """Say how many examples were seen so far."""
        self._listener(ExamplesSeen(stage=self._stage, done=done, total=self._examples))

    def ended(self) -> None:
        """Say that the stage is complete, its statistics saved."""
        seconds = time.perf_counter() - self._started_s
        self._listener(StageEnded(stage=self._stage, number=self._number, stages=self._stages, seconds=seconds))
