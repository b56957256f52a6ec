"""Functions written in LLVM's language: loops, loads and arithmetic on vectors.

Owns the text; knows nothing of what is computed, and nothing of the compiler. Python code that runs once leaves the
instructions behind: operators on `Value` write one each, and none may be reassociated or contracted, so that the text
alone fixes every bit of a result. LLVM does the rest: registers, schedules, and the splitting of vectors that are wider
than the processor's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

# Elements of every vector: a register of AVX-512, two of AVX. The same on all processors, because sums by lanes would
# otherwise depend on them.
LANES = 8
DOUBLES = f"<{LANES} x double>"
FLOATS = f"<{LANES} x float>"
INTS = f"<{LANES} x i32>"
LONGS = f"<{LANES} x i64>"


@dataclass(frozen=True, slots=True)
class Value:
    """What an instruction gives, or a constant."""

    function: Function
    type: str
    name: str

    def __add__(self, other: Value | int) -> Value:
        """Write an addition."""
        return self._with("add" if "i" in self.type else "fadd", other)

    def __sub__(self, other: Value) -> Value:
        """Write a subtraction."""
        return self._with("sub" if "i" in self.type else "fsub", other)

    def __mul__(self, other: Value) -> Value:
        """Write a multiplication of floats."""
        return self._with("fmul", other)

    def __and__(self, other: Value | int) -> Value:
        """Write a bitwise and."""
        return self._with("and", other)

    def __or__(self, other: Value | int) -> Value:
        """Write a bitwise or."""
        return self._with("or", other)

    def __lshift__(self, other: int) -> Value:
        """Write a shift to the left."""
        return self._with("shl", other)

    def __rshift__(self, other: int) -> Value:
        """Write a shift to the right that fills up with zeros."""
        return self._with("lshr", other)

    def times_plus(self, factor: Value, addend: Value) -> Value:
        """Write self · factor + addend, rounded once."""
        arguments = ", ".join(f"{self.type} {value.name}" for value in (self, factor, addend))
        lanes = self.type.split()[0].removeprefix("<")
        return self.function.write(f"call {self.type} @llvm.fma.v{lanes}f64({arguments})", self.type)

    def to(self, conversion: str, target: str) -> Value:
        """Write one of LLVM's conversions to another type."""
        return self.function.write(f"{conversion} {self.type} {self.name} to {target}", target)

    def compared(self, relation: str, other: Value) -> Value:
        """Write a comparison of vectors of floats by one of LLVM's relations, such as oeq: ordered and equal."""
        return self.function.write(f"fcmp {relation} {self.type} {self.name}, {other.name}", f"<{LANES} x i1>")

    def _with(self, operation: str, other: Value | int) -> Value:
        operand = self.function.constant(self.type, other) if isinstance(other, int) else other
        return self.function.write(f"{operation} {self.type} {self.name}, {operand.name}", self.type)


class Variable:
    """A value that a loop changes; LLVM keeps it in a register.

    Args:
        function: Where it lives.
        start: Its first value.
    """

    def __init__(self, function: Function, start: Value) -> None:
        self._type = start.type
        self._place = function.scratch(start.type)
        self.value = start

    @property
    def value(self) -> Value:
        """What it holds at this point."""
        return self._place.function.load(self._type, self._place)

    @value.setter
    def value(self, value: Value) -> None:
        self._place.function.store(value, self._place)


class Function:
    """A function being written, instruction by instruction.

    Args:
        name: Of the function.
        arguments: LLVM's types of its arguments.
        local: Whether it is called by functions of the same text only.
    """

    def __init__(self, name: str, arguments: Sequence[str], *, local: bool = False) -> None:
        self._names = 0
        self._scratch: list[str] = []
        self._lines: list[str] = []
        self._block = "entry"
        self.arguments = [Value(self, type_, f"%a{number}") for number, type_ in enumerate(arguments)]
        listed = ", ".join(f"{value.type} {value.name}" for value in self.arguments)
        self._opening = f"define {'internal ' if local else ''}void @{name}({listed}) #0 {{"

    def text(self) -> str:
        """Return the finished function."""
        return "\n".join([self._opening, "entry:", *self._scratch, *self._lines, "ret void", "}"])

    def write(self, instruction: str, type_: str) -> Value:
        """Write an instruction that gives a value of a type."""
        self._names += 1
        self._lines.append(f"%v{self._names} = {instruction}")
        return Value(self, type_, f"%v{self._names}")

    def constant(self, type_: str, number: int) -> Value:
        """Return a constant: zero of any type, another number of integers."""
        if not type_.startswith("<"):
            return Value(self, type_, str(number))
        element = type_.split(" x ")[1].removesuffix(">")
        return Value(self, type_, f"splat ({element} {number})" if number else "zeroinitializer")

    def scratch(self, type_: str) -> Value:
        """Return the address of memory of the function's own."""
        self._names += 1
        self._scratch.append(f"%v{self._names} = alloca {type_}, align 64")
        return Value(self, "ptr", f"%v{self._names}")

    def at(self, address: Value, index: Value | int, type_: str) -> Value:
        """Return the address of an element of an array of a type."""
        offset = index if isinstance(index, int) else index.name
        return self.write(f"getelementptr {type_}, ptr {address.name}, i64 {offset}", "ptr")

    def load(self, type_: str, address: Value, *, align: int = 64) -> Value:
        """Write a load from an address that is a multiple of `align` bytes."""
        return self.write(f"load {type_}, ptr {address.name}, align {align}", type_)

    def store(self, value: Value, address: Value, *, align: int = 64) -> None:
        """Write a store to an address that is a multiple of `align` bytes."""
        self._lines.append(f"store {value.type} {value.name}, ptr {address.name}, align {align}")

    def add_to(self, address: Value, value: Value, *, align: int = 64) -> None:
        """Write an addition to what lies at an address."""
        self.store(self.load(value.type, address, align=align) + value, address, align=align)

    def prefetch(self, address: Value) -> None:
        """Have a cache line fetched; an address outside any memory does no harm."""
        self._lines.append(f"call void @llvm.prefetch.p0(ptr {address.name}, i32 0, i32 3, i32 1)")

    def splat(self, value: Value) -> Value:
        """Return a vector of one number."""
        type_ = f"<{LANES} x {value.type}>"
        one = self.write(f"insertelement {type_} poison, {value.type} {value.name}, i64 0", type_)
        zeros = f"<{LANES} x i32> zeroinitializer"
        return self.write(f"shufflevector {type_} {one.name}, {type_} poison, {zeros}", type_)

    def select(self, condition: Value, yes: Value, no: Value) -> Value:
        """Return a choice, lane by lane."""
        listed = ", ".join(f"{value.type} {value.name}" for value in (condition, yes, no))
        return self.write(f"select {listed}", yes.type)

    def call(self, name: str, *arguments: Value) -> None:
        """Write a call of another function of the same text."""
        listed = ", ".join(f"{argument.type} {argument.name}" for argument in arguments)
        self._lines.append(f"call void @{name}({listed})")

    @contextmanager
    def loop(self, stop: Value | int, step: int = 1) -> Iterator[Value]:
        """Write what the `with` block writes as a loop over 0, step, 2·step … below `stop`, which is at least 1."""
        self._names += 1
        number, end = self._names, stop if isinstance(stop, int) else stop.name
        index, following = f"%i{number}", f"%n{number}"
        self._lines += [
            f"br label %body{number}",
            f"body{number}:",
            f"{index} = phi i64 [ 0, %{self._block} ], [ {following}, %last{number} ]",
        ]
        self._block = f"body{number}"
        yield Value(self, "i64", index)
        self._lines += [
            f"br label %last{number}",
            f"last{number}:",
            f"{following} = add i64 {index}, {step}",
            f"%more{number} = icmp ult i64 {following}, {end}",
            f"br i1 %more{number}, label %body{number}, label %after{number}",
            f"after{number}:",
        ]
        self._block = f"after{number}"
