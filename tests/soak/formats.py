"""The formats that are damaged, as far as it must be known where their parts are and what these say."""

import ast
import json
import struct
from dataclasses import dataclass, field
from typing import Any

import numpy as np

GGUF_NUMBERS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}
SAFETENSORS_NUMBERS = {"F32": np.float32, "F64": np.float64, "F16": np.float16}


@dataclass
class Layout:
    """A binary file: what its header says, where its data begins, and what in it are floats."""

    says: Any
    data: int
    floats: list[np.ndarray] = field(default_factory=list)

    @property
    def finite(self) -> bool:
        return all(np.isfinite(one).all() for one in self.floats)


def layout(name: str, content: bytes) -> Layout | None:
    """Raise whatever a broken header leads to; None for a format without a header."""
    for ending, read in {".safetensors": _safetensors, ".npy": _npy, ".gguf": _gguf}.items():
        if name.endswith(ending):
            return read(content)
    if name.endswith(".parquet"):
        return _parquet(content)
    return None


def _safetensors(content: bytes) -> Layout:
    start = 8 + struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8:start])
    header.pop("__metadata__", None)
    floats = []
    for one in header.values():
        begin, end = (start + offset for offset in one["data_offsets"])
        if one["dtype"] in SAFETENSORS_NUMBERS:
            floats.append(np.frombuffer(content[begin:end], SAFETENSORS_NUMBERS[one["dtype"]]))
    ends = max(one["data_offsets"][1] for one in header.values())
    return Layout((header, len(content) == start + ends), start, floats)


def _npy(content: bytes) -> Layout:
    start = 10 + struct.unpack("<H", content[8:10])[0]
    return Layout((content[:6], ast.literal_eval(content[10:start].decode()), len(content)), start)


def _parquet(content: bytes) -> Layout:
    """The footer is the header here: what lies before it are pages."""
    footer = len(content) - 8 - struct.unpack("<I", content[-8:-4])[0]
    return Layout((footer, content[footer:], content[:4]), footer)


def _gguf(content: bytes) -> Layout:
    at = 0

    def take(code: str) -> Any:
        nonlocal at
        (value,) = struct.unpack_from("<" + code, content, at)
        at += struct.calcsize("<" + code)
        return value

    def text() -> str:
        nonlocal at
        length = take("Q")
        at += length
        return content[at - length : at].decode()

    def value(kind: int) -> Any:
        if kind == 8:
            return text()
        if kind == 9:
            inner, count = take("I"), take("Q")
            return [value(inner) for _ in range(min(count, len(content)))]
        return take(GGUF_NUMBERS[kind])

    start = take("4s"), take("I")
    tensors, keys = take("Q"), take("Q")
    says = {text(): value(take("I")) for _ in range(keys)}
    infos = [(text(), [take("Q") for _ in range(take("I"))], take("I"), take("Q")) for _ in range(tensors)]
    data = at + -at % 32
    floats = []
    for _, shape, kind, offset in infos:
        if kind == 0:
            floats.append(np.frombuffer(content, np.float32, int(np.prod(shape)), data + offset))
    return Layout((start, says, (infos, len(content))), data, floats)
