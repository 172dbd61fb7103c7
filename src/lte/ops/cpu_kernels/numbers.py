"""Numbers as they are stored, and how Numba compiles: addresses, dtypes, conversions to fp32 and back.

Only functions that OpenMP or Python calls are kept on disk, by :func:`entry`. Numba looks at the date of their own file
alone, so their key also holds :data:`STAMP`, a digest of all files here.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic
from numba.np.numpy_support import carray

CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3, torch.uint8: 4}
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# Numba knows neither bf16 nor (on CPU) fp16: they are passed as integers of their width, and the sign tells which
TAGS = {torch.float32: np.float32(0), torch.bfloat16: np.uint16(0), torch.float16: np.int16(0)}
TAGS |= {torch.int8: np.int8(0), torch.uint8: np.uint8(0)}  # uint8 holds two numbers of 4 bits

STAMP = hashlib.sha256(b"".join(file.read_bytes() for file in sorted(Path(__file__).parent.glob("*.py")))).hexdigest()

thread_num = types.ExternalFunction("omp_get_thread_num", types.int32())
num_threads = types.ExternalFunction("omp_get_num_threads", types.int32())
barrier = types.ExternalFunction("GOMP_barrier", types.void())

_intrinsic = cast(Callable[[Callable], Callable], intrinsic)  # Numba's own type has the context as an argument

# not all of fastmath: infinities and NaN must stay
FAST: Any = {"fastmath": {"reassoc", "contract", "nsz", "arcp"}, "error_model": "numpy"}
_BARE: Any = {**FAST, "no_cpython_wrapper": True, "no_cfunc_wrapper": True}
compiled: Any = njit(**_BARE)


def entry(compiler: Callable[..., Any], *signature: Any, **options: Any) -> Callable[[Callable], Any]:
    """Return the compiler with its cache on disk, if it can be written there: then the next process starts fast."""

    def compile_(function: Callable) -> Any:
        try:
            return compiler(*signature, error_model="numpy", cache=True, **options)(function)
        except RuntimeError:
            return compiler(*signature, error_model="numpy", **options)(function)

    return compile_


@_intrinsic
def pointer(_context, address, tag):
    """An address as a pointer to numbers like ``tag``."""

    def codegen(context, builder, signature, args):
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    return types.CPointer(tag)(address, tag), codegen


def records(record: types.Type) -> Callable:
    """Return the function that makes an address a pointer to records of this type."""

    @_intrinsic
    def cast_(_context, address):
        def codegen(context, builder, signature, args):
            return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

        return types.CPointer(record)(address), codegen

    return cast_


@_intrinsic
def call(_context, address, arguments):
    """Call the function at an address with a tuple of int64."""

    def codegen(context, builder, signature, args):
        values = cgutils.unpack_tuple(builder, args[1])
        kind = ir.FunctionType(ir.VoidType(), [value.type for value in values])
        builder.call(builder.inttoptr(args[0], kind.as_pointer()), values)
        return context.get_dummy_value()

    return types.none(address, arguments), codegen


@_intrinsic
def widen(_context, value):
    """A stored number as fp32."""

    def codegen(context, builder, signature, args):
        single, word = context.get_value_type(types.float32), context.get_value_type(types.uint32)
        if value == types.uint16:
            return builder.bitcast(builder.shl(builder.zext(args[0], word), word(16)), single)
        if value == types.int16:
            return builder.fpext(builder.bitcast(args[0], ir.HalfType()), single)
        return builder.sitofp(args[0], single) if value == types.int8 else args[0]

    return types.float32(value), codegen


def _nibble(shift: int) -> Callable:
    @_intrinsic
    def take(_context, byte):
        def codegen(context, builder, signature, args):
            single, word = context.get_value_type(types.float32), context.get_value_type(types.uint32)
            bits = builder.and_(builder.lshr(builder.zext(args[0], word), word(shift)), word(15))
            return builder.sitofp(bits, single)

        return types.float32(byte), codegen

    return take


low, high = _nibble(0), _nibble(4)
"""The two numbers of a byte, 0 to 15, as fp32."""


@_intrinsic
def narrow(_context, value, tag):
    """fp32 to what is stored, to nearest even."""

    def codegen(context, builder, signature, args):
        if tag == types.uint16:
            word = context.get_value_type(types.uint32)
            bits = builder.bitcast(args[0], word)
            odd = builder.and_(builder.lshr(bits, word(16)), word(1))
            rounded = builder.lshr(builder.add(bits, builder.add(odd, word(0x7FFF))), word(16))
            rounded = builder.select(builder.fcmp_unordered("uno", args[0], args[0]), word(0x7FC0), rounded)
            return builder.trunc(rounded, ir.IntType(16))
        if tag == types.int16:
            return builder.bitcast(builder.fptrunc(args[0], ir.HalfType()), ir.IntType(16))
        return args[0]

    return tag(value, tag), codegen


@_intrinsic
def fetch(_context, address):
    """Prefetch a cache line."""

    def codegen(context, builder, signature, args):
        pointer, number = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [pointer, number, number, number])
        prefetch = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        builder.call(prefetch, [builder.inttoptr(args[0], pointer), number(0), number(3), number(1)])
        return context.get_dummy_value()

    return types.none(types.uintp), codegen


@compiled
def read(address, code, start, out):
    """Fill ``out`` with the floats at ``address``, from index ``start`` on."""
    if code == 0:
        singles = carray(pointer(address + 4 * start, np.float32(0)), out.shape)
        for i in range(out.shape[0]):
            out[i] = singles[i]
    elif code == 1:
        brains = carray(pointer(address + 2 * start, np.uint16(0)), out.shape)
        for i in range(out.shape[0]):
            out[i] = widen(brains[i])
    else:
        halves = carray(pointer(address + 2 * start, np.int16(0)), out.shape)
        for i in range(out.shape[0]):
            out[i] = widen(halves[i])


@compiled
def write(address, code, start, values):
    """Store fp32 values at ``address``, from index ``start`` on, as floats of this code."""
    if code == 0:
        singles = carray(pointer(address + 4 * start, np.float32(0)), values.shape)
        for i in range(values.shape[0]):
            singles[i] = values[i]
    elif code == 1:
        brains = carray(pointer(address + 2 * start, np.uint16(0)), values.shape)
        for i in range(values.shape[0]):
            brains[i] = narrow(values[i], np.uint16(0))
    else:
        halves = carray(pointer(address + 2 * start, np.int16(0)), values.shape)
        for i in range(values.shape[0]):
            halves[i] = narrow(values[i], np.int16(0))
