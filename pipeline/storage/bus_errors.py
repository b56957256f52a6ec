"""What happens when a page of a mapped file cannot be had: zeros take its place, and whoever asks is told.

A program that touches such a page, of a file that was cut short or of a disk that failed, is ended by the signal
SIGBUS. Here the kernel's signal is answered, for registered addresses alone, by a page of zeros, and counted; every
other one goes to whom it went before. Owns the handler, which is machine code because Python's own run too late, and
the table it looks addresses up in. Linux on 64 bits; elsewhere there is none.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import signal
import sys
import threading
from collections.abc import Callable

# Files that can be registered at a time: 128 models of 30 shards are mapped at once, and few programs map so many.
_MOST_RANGES = 4096
_SA_SIGINFO, _SA_ONSTACK = 4, 0x08000000
# The address is at this place of what the kernel tells; 32-bit systems have it elsewhere.
_ADDRESS_OFFSET = 16
_FLAGS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x10  # MAP_FIXED
# The table: how many faults there were, how many ranges were ever registered, and each range's begin and end.
_HANDLER = """
define void @on_bus_error(i32 %signal, ptr %info, ptr %context) {
entry:
  %place = getelementptr i8, ptr %info, i64 {offset}
  %address = load i64, ptr %place
  %count_at = inttoptr i64 {count} to ptr
  %count = load atomic i64, ptr %count_at acquire, align 8
  br label %next
next:
  %index = phi i64 [ 0, %entry ], [ %following, %other ]
  %more = icmp ult i64 %index, %count
  br i1 %more, label %look, label %strange
look:
  %ranges = inttoptr i64 {ranges} to ptr
  %range = getelementptr [2 x i64], ptr %ranges, i64 %index
  %end_at = getelementptr i64, ptr %range, i64 1
  %begin = load i64, ptr %range
  %end = load i64, ptr %end_at
  %after = icmp uge i64 %address, %begin
  %before = icmp ult i64 %address, %end
  %inside = and i1 %after, %before
  br i1 %inside, label %ours, label %other
other:
  %following = add i64 %index, 1
  br label %next
ours:
  %page = and i64 %address, {mask}
  %map = inttoptr i64 {mmap} to ptr
  %mapped = call i64 %map(i64 %page, i64 {page}, i32 {protection}, i32 {flags}, i32 -1, i64 0)
  %done = icmp eq i64 %mapped, %page
  br i1 %done, label %tell, label %strange
tell:
  %faults_at = inttoptr i64 {faults} to ptr
  %old = atomicrmw add ptr %faults_at, i64 1 seq_cst
  ret void
strange:
  %sigaction = inttoptr i64 {sigaction} to ptr
  %before_us = inttoptr i64 {previous} to ptr
  %ignored = call i32 %sigaction(i32 %signal, ptr %before_us, ptr null)
  ret void
}
"""


class _Action(ctypes.Structure):
    """The C library's struct sigaction."""

    _fields_ = (
        ("handler", ctypes.c_void_p),
        ("mask", ctypes.c_ubyte * 128),
        ("flags", ctypes.c_int),
        ("restorer", ctypes.c_void_p),
    )


class BusErrors:
    """The handler of this process; made once, by `bus_errors`."""

    def __init__(self) -> None:
        import llvmlite.binding as llvm

        self._lock = threading.Lock()
        self._free: list[int] = []
        self._table = (ctypes.c_int64 * (2 + 2 * _MOST_RANGES))()
        self._previous = _Action()
        library = ctypes.CDLL(None, use_errno=True)
        table = ctypes.addressof(self._table)
        text = _HANDLER
        for name, number in {
            "offset": _ADDRESS_OFFSET,
            "faults": table,
            "count": table + 8,
            "ranges": table + 16,
            "mask": -mmap.PAGESIZE,
            "page": mmap.PAGESIZE,
            "protection": mmap.PROT_READ,
            "flags": _FLAGS,
            "mmap": ctypes.cast(library.mmap, ctypes.c_void_p).value,
            "sigaction": ctypes.cast(library.sigaction, ctypes.c_void_p).value,
            "previous": ctypes.addressof(self._previous),
        }.items():
            text = text.replace(f"{{{name}}}", str(number))
        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
        machine = llvm.Target.from_default_triple().create_target_machine(jit=True)
        # The machine code lives as long as its engine.
        self._engine = llvm.create_mcjit_compiler(llvm.parse_assembly(text), machine)
        self._engine.finalize_object()
        self._library = library
        self._action = _Action(
            handler=self._engine.get_function_address("on_bus_error"), flags=_SA_SIGINFO | _SA_ONSTACK
        )

    @property
    def faults(self) -> int:
        """How many pages were replaced by zeros so far."""
        return self._table[0]

    def register(self, address: int, size_bytes: int) -> Callable[[], None]:
        """Have faults in a range answered from now on; returns what ends that.

        Raises:
            OSError: There is no more room, or the handler cannot be set.
        """
        with self._lock:
            self._install()
            if not self._free and self._table[1] == _MOST_RANGES:
                raise OSError("too many files are mapped")
            number = self._free.pop() if self._free else self._table[1]
            place = 2 + 2 * number
            # A range begins to count when its end is above its begin.
            self._table[place], self._table[place + 1] = address, address + size_bytes
            self._table[1] = max(self._table[1], number + 1)
        return functools.partial(self._forget, number)

    def _install(self) -> None:
        """Become the handler, unless it is this one already: others, such as Ray's, may have come since."""
        found = _Action()
        self._library.sigaction(signal.SIGBUS, None, ctypes.byref(found))
        if found.handler == self._action.handler:
            return
        # Who was there must be known when the first signal comes.
        ctypes.memmove(ctypes.byref(self._previous), ctypes.byref(found), ctypes.sizeof(_Action))
        if self._library.sigaction(signal.SIGBUS, ctypes.byref(self._action), None):
            raise OSError(ctypes.get_errno(), "the handler of SIGBUS cannot be set")

    def _forget(self, number: int) -> None:
        with self._lock:
            self._table[3 + 2 * number] = 0
            self._table[2 + 2 * number] = 0
            self._free.append(number)


@functools.cache
def bus_errors() -> BusErrors | None:
    """Return the handler of this process; None where there is none, and files are not to be mapped."""
    if sys.platform != "linux" or sys.maxsize < 1 << 32:
        return None
    try:
        return BusErrors()
    except (OSError, ImportError, RuntimeError):
        return None
