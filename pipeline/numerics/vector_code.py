"""Machine code for this processor, made in this process from functions of `vector_text`.

Owns the compiler and what the processor offers; knows nothing of what is computed. LLVM comes as `llvmlite`: its import
and a loop's compilation take 40 ms each, whereas loading such loops from numba's cache took 0.9 s.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

import llvmlite.binding as llvm

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")

_C_TYPES = {"ptr": ctypes.c_void_p, "i64": ctypes.c_int64, "double": ctypes.c_double}
# Registers of 64 bytes are used where there are any; LLVM avoids them by default on some processors.
_ATTRIBUTES = 'attributes #0 = { nounwind noinline "prefer-vector-width"="512" "min-legal-vector-width"="512" }'
_DECLARATIONS = """
declare void @llvm.prefetch.p0(ptr, i32, i32, i32)
declare <2 x double> @llvm.fma.v2f64(<2 x double>, <2 x double>, <2 x double>)
declare <4 x double> @llvm.fma.v4f64(<4 x double>, <4 x double>, <4 x double>)
declare <8 x double> @llvm.fma.v8f64(<8 x double>, <8 x double>, <8 x double>)
"""
# One compilation at a time: a thread that needs the same function waits for it.
_LOCK = threading.Lock()


@dataclass(frozen=True, slots=True, kw_only=True)
class Processor:
    """What decides how loops are blocked; it never decides a bit of a result.

    Attributes:
        doubles: Elements of a vector register.
        registers: How many there are.
    """

    doubles: int
    registers: int


def compiled_function(texts: Sequence[str], name: str, arguments: Sequence[str]) -> Callable[..., None]:
    """Return a function of this process; it runs without the interpreter's lock.

    Args:
        texts: Finished functions.
        name: Of the one that is returned.
        arguments: The types of its arguments: ptr (an address), i64 or double.
    """
    generator = _code_generator()
    module = llvm.parse_assembly("\n".join([*texts, _DECLARATIONS, _ATTRIBUTES]))
    # What the standard pipelines do beyond this gains nothing here and takes four times as long.
    builder = llvm.create_pass_builder(generator, llvm.create_pipeline_tuning_options(1))
    passes = llvm.create_new_function_pass_manager()
    passes.add_sroa_pass()
    passes.add_instruction_combine_pass()
    passes.add_new_gvn_pass()
    for function in module.functions:
        if not function.is_declaration:
            passes.run(function, builder)
    engine = llvm.create_mcjit_compiler(module, generator)
    engine.finalize_object()
    prototype = ctypes.CFUNCTYPE(None, *(_C_TYPES[type_] for type_ in arguments))
    entry: Any = prototype(engine.get_function_address(name))
    # The machine code lives as long as its engine.
    entry.engine = engine
    return entry  # type: ignore[no-any-return]


def compiled_once(compile_for: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """Return a function that remembers all its results, and computes each once whatever the threads do."""
    remembered: Any = functools.cache(compile_for)

    @functools.wraps(compile_for)
    def once(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> Any:
        with _LOCK:
            return remembered(*args, **kwargs)

    return once


@functools.cache
def processor() -> Processor:
    """Return what this machine's processor offers."""
    features = _features()
    if features.get("avx512f"):
        return Processor(doubles=8, registers=32)
    if features.get("avx"):
        return Processor(doubles=4, registers=16)
    return Processor(doubles=2, registers=16)


def _features() -> Any:
    """Return LLVM's names of what the processor can do; of some processors it knows none beyond their names."""
    with suppress(RuntimeError):
        return llvm.get_host_cpu_features()
    return llvm.FeatureMap()


def _code_generator() -> Any:
    """Return LLVM's for this processor."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    target = llvm.Target.from_default_triple()
    return target.create_target_machine(cpu=llvm.get_host_cpu_name(), features=_features().flatten(), opt=3, jit=True)
