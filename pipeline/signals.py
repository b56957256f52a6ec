"""How the process ends when it is told to, from its first moment on: by ctrl-C, SIGTERM, or SIGHUP.

Owns the handlers and the exit codes. Knows nothing of what runs, and imports next to nothing: until `install` a signal
ends the process as Python or the system would.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from contextlib import suppress
from itertools import pairwise
from types import FrameType, TracebackType
from typing import Any

# The text of every command that was stopped before it had anything to put in order.
STOPPED = "stopped; the same command resumes"
_NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
INTERRUPTED = 128 + signal.SIGINT
# What a shell reports of a process that one of them ended; Ray's own handler leaves with the bare number.
_CODES = {128 + number: 128 + number for number in _NUMBERS} | {int(signal.SIGTERM): 128 + signal.SIGTERM}
# Seconds until a signal that came at a delicate moment is looked at again: shorter than anybody would notice.
_PAUSE_S = 0.05


class _State:
    """What the handlers go by; there is one set of them in a process.

    Attributes:
        unwinds: Whether something runs that puts things in order when it is left by an exception.
        came: The first signal that something of that kind was left by.
        postponed: Whether one waits for the end of an import or a finalizer.
    """

    unwinds = False
    came: int | None = None
    postponed = False


def install() -> None:
    """Put the handlers in place; again, after others have put theirs there.

    A hang-up or ctrl-C that the process was told to ignore, as by nohup, stays ignored.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    for number in _NUMBERS:
        if number == signal.SIGTERM or signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _handle)


def exit_code(code: object) -> int | None:
    """Return the exit code of a process that leaves with `code` because of a signal; None when it is another reason."""
    return _CODES.get(code) if isinstance(code, int) else None


def wants_lines(arguments: list[str]) -> bool:
    """Return whether a command line, parsed or not, asks for lines of JSON on standard error."""
    return "--progress=json" in arguments or ("--progress", "json") in pairwise(arguments)


class Unwinding:
    """While it is entered, a signal unwinds the body once, so that it leaves nothing half done.

    Whatever comes out of the body after a signal is a `SystemExit` with the signal's code: what clearing up meets, or
    what a library makes of the exception, hides nothing.
    """

    def __enter__(self) -> None:
        self._before: dict[int, Any] = {number: signal.getsignal(number) for number in _NUMBERS}
        self._hook = sys.unraisablehook
        sys.unraisablehook = self._unraisable
        _State.unwinds, _State.came, _State.postponed = True, None, False
        install()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        _State.unwinds = False
        sys.unraisablehook = self._hook
        if threading.current_thread() is threading.main_thread():
            for number, handler in self._before.items():
                signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        if error is not None and _State.came is not None:
            raise SystemExit(128 + _State.came) from error

    def _unraisable(self, what: Any) -> None:
        """Try again when the exception of a signal was raised where nobody could take it, as in a callback."""
        number = _State.came
        if number is None or not isinstance(what.exc_value, KeyboardInterrupt | SystemExit):
            self._hook(what)
            return
        _State.came, _State.postponed = None, True
        _postpone(number)


def _handle(number: int, frame: FrameType | None) -> None:
    if number == signal.SIGHUP:
        _let_go_of_terminal()
    if not _State.unwinds:
        _leave(number)
    if _State.came is not None:
        # The next one must not cut the unwinding short, unless somebody sits there and wants it so; SIGKILL is what
        # follows if it takes too long.
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        return
    if _is_delicate(frame):
        if not _State.postponed:
            _State.postponed = True
            _postpone(number)
        return
    _State.came = number
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    sys.exit(128 + number)


def _is_delicate(frame: FrameType | None) -> bool:
    """Return whether an exception would be lost here: in the midst of an import of C code, or of a finalizer."""
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>" or frame.f_code.co_name == "__del__":
            return True
        frame = frame.f_back
    return False


def _postpone(number: int) -> None:
    """Send the signal again a little later."""

    def again(thread: int) -> None:
        time.sleep(_PAUSE_S)
        _State.postponed = False
        signal.pthread_kill(thread, number)

    main = threading.main_thread().ident
    threading.Thread(target=again, args=(main,), name="postponed signal", daemon=True).start()


def _leave(number: int) -> None:
    """End the process where it stands: nothing has begun, or all has ended."""
    if _State.came is not None:
        os._exit(128 + _State.came)
    text = STOPPED
    if wants_lines(sys.argv):
        now, code = time.time(), 128 + number
        stamp = f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(now))}.{int(now % 1 * 1000):03d}Z"
        # By hand: the module for it may be the very one whose import is cut short here.
        problem = f'{{"what": "{STOPPED}", "where": "", "remedy": ""}}'
        text = f'{{"time": "{stamp}", "event": "Error", "exit_code": {code}, "problems": [{problem}]}}'
    # Nobody may read it any more; the code is what counts.
    with suppress(OSError):
        os.write(2, f"{text}\n".encode())
    os._exit(128 + number)


def _let_go_of_terminal() -> None:
    """Let what is written to a terminal that is gone be lost, instead of an error in the midst of clearing up."""
    for descriptor in (1, 2):
        try:
            os.write(descriptor, b"")
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, descriptor)
            os.close(nowhere)
