"""Telling that a store is waited for: once when it has lasted, and once when it is over.

Owns the words and who has been told, for all requests of the process together. Must not know retries or backends.
"""

from __future__ import annotations

import logging
import threading
import time

_log = logging.getLogger(__name__)

# Shorter ones are everyday life; whoever watches begins to wonder then.
_LONG_S = 10.0
# By place, since when it is waited for; only what was told.
_told: dict[str, float] = {}
_lock = threading.Lock()


class Waiting:
    """One request that may have to be repeated.

    Args:
        place: What is waited for, for the text: requests to equal places share an outage.
    """

    def __init__(self, place: str) -> None:
        self._place = place
        self._began_s = time.monotonic()
        self._repeated = self._spoke = False

    def failed(self, cause: str) -> None:
        """Say that the request will be repeated, if that goes on for long and nobody has said so of this place.

        Args:
            cause: The error in words, without credentials.
        """
        self._repeated = True
        lasted_s = time.monotonic() - self._began_s
        # A request that fails while others succeed must not tell the same again and again.
        if self._spoke or lasted_s < _LONG_S:
            return
        self._spoke = True
        with _lock:
            if self._place in _told:
                return
            _told[self._place] = self._began_s
        _log.warning("waiting for %s since %.0f s: %s", self._place, lasted_s, cause)

    def succeeded(self) -> None:
        """Say that the outage is over, if it was told."""
        if not self._repeated:
            return
        with _lock:
            began_s = _told.pop(self._place, None)
        if began_s is not None:
            _log.warning("%s answers again after %.0f s", self._place, time.monotonic() - began_s)

    def gave_up(self) -> None:
        """Forget the outage: the error that is raised says the rest."""
        if self._spoke:
            with _lock:
                _told.pop(self._place, None)
