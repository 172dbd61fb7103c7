"""Checks a GGUF file's header before transformers reads it, and afterwards that all tensors were read.

transformers takes defaults for metadata that it does not find, and leaves out tensors that it does not know. So a name
with one wrong byte would change the model without a message.
"""

import math
import mmap
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from lte.surgery.folder import MOST
from lte.surgery.reading import check_file

_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _ARRAY = 8, 9


@dataclass
class Header:
    """The header of a file.

    Attributes:
        values: metadata; for an array, its length.
        tensors: name -> shape, type and place of each tensor.
        start: the offset of the first tensor.
    """

    values: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, tuple[tuple[int, ...], int, int]] = field(default_factory=dict)
    start: int = 0


def check_gguf(path: Path) -> int:
    """Return the number of weights in a GGUF file's tensors.

    Raises:
        ValueError: the header cannot be parsed, has an unknown key, or does not fit the file, or the file is one of
            several parts.
    """
    check_file(path)
    try:
        header = _read(path)
        _check_keys(header.values)
        if header.values.get("split.count", 0) > 1:
            raise ValueError("it is one of several parts: make one file of them, with llama-gguf-split --merge")
        _check_places(header, path.stat().st_size)
        layers = header.values[f"{header.values['general.architecture']}.block_count"]
        if not isinstance(layers, int) or not 0 < layers <= min(MOST, len(header.tensors)):
            raise ValueError(f"it has {len(header.tensors)} tensors, but says that it has {layers} layers")
    except (ValueError, LookupError, TypeError, ArithmeticError, struct.error) as error:
        reason = error if type(error) is ValueError else f"{type(error).__name__}: {error}"
        raise ValueError(f"{path} is damaged, or no GGUF file that can be read here: {reason}") from error
    return sum(math.prod(shape) for shape, _, _ in header.tensors.values())


def check_all_read(path: Path, model: PreTrainedModel) -> None:
    """Raise ValueError unless the model has all tensors of the GGUF file."""
    if getattr(getattr(model, "hf_quantizer", None), "supported", False):  # then the loading report names them
        return
    from transformers.modeling_gguf_pytorch_utils import TensorProcessor, get_gguf_hf_weights_map

    read: Any = get_gguf_hf_weights_map(model, TensorProcessor(config={}))
    if left := sorted(_read(path).tensors.keys() - read.keys()):
        raise ValueError(
            f"{path}: {len(left)} tensors have no place in the model, first {left[0]}: the file is damaged, or "
            "transformers does not read all that its model needs"
        )


def _read(path: Path) -> Header:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as blob:
        return _parse(blob)


def _parse(blob: mmap.mmap) -> Header:
    header = Header()
    magic, version, num_tensors, num_values = struct.unpack_from("<4sIQQ", blob)
    if magic != b"GGUF" or version not in (2, 3):
        raise ValueError("it does not begin as GGUF of version 2 or 3 does")
    at = 24
    for _ in range(num_values):
        key, at = _text(blob, at)
        (kind,) = struct.unpack_from("<I", blob, at)
        if key in header.values:
            raise ValueError(f"its metadata has {key} twice")
        header.values[key], at = _value(blob, at + 4, kind)
    for _ in range(num_tensors):
        name, at = _text(blob, at)
        (dims,) = struct.unpack_from("<I", blob, at)
        if dims > 4 or name in header.tensors:
            raise ValueError(f"its tensor {name} has {dims} dimensions, or is there twice")
        *shape, kind, place = struct.unpack_from(f"<{dims}QIQ", blob, at + 4)
        at += 16 + 8 * dims
        header.tensors[name] = (tuple(shape), kind, place)
    align = header.values.get("general.alignment", 32)
    header.start = -(-at // align) * align
    return header


def _value(blob: mmap.mmap, at: int, kind: int) -> tuple[Any, int]:
    """Return a value of the metadata (for an array, its length) and its end."""
    if kind == _TEXT:
        return _text(blob, at)
    if kind != _ARRAY:
        (value,) = struct.unpack_from(f"<{_NUMBERS[kind]}", blob, at)
        return value, at + struct.calcsize(_NUMBERS[kind])
    kind, count = struct.unpack_from("<IQ", blob, at)
    at += 12
    if kind == _TEXT:
        for _ in range(count):
            _, at = _text(blob, at)
    else:
        at += count * struct.calcsize(_NUMBERS[kind])
    if at > len(blob):
        raise ValueError("it is cut short")
    return count, at


def _text(blob: mmap.mmap, at: int) -> tuple[str, int]:
    (length,) = struct.unpack_from("<Q", blob, at)
    end = at + 8 + length
    if end > len(blob):
        raise ValueError("it is cut short")
    return blob[at + 8 : end].decode("utf-8"), end


def _check_keys(values: dict[str, Any]) -> None:
    """Raise ValueError if a key of the metadata differs from a known key by one character."""
    from gguf.constants import Keys

    groups = [group for group in vars(Keys).values() if isinstance(group, type)]
    names = [name for group in groups for name in vars(group).values() if isinstance(name, str)]
    known = {name.replace("{arch}", str(values["general.architecture"])) for name in names}
    for key in values.keys() - known:
        for name in known:
            if len(name) == len(key) and sum(a != b for a, b in zip(name, key, strict=True)) == 1:
                raise ValueError(f"its metadata has {key!r} for {name!r}")


def _check_places(header: Header, size: int) -> None:
    """Raise ValueError unless tensors are contiguous up to the end of the file."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    align = header.values.get("general.alignment", 32)
    at = 0
    for name, (shape, kind, place) in header.tensors.items():
        numbers, size_of = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        if place != at or not shape or shape[0] % numbers:
            raise ValueError(f"its tensor {name} is not where its shape and type would put it")
        at += -(-(math.prod(shape) // numbers * size_of) // align) * align
    if not header.start + at - align < size <= header.start + at:
        raise ValueError(f"it has {size} bytes where its tensors end at {header.start + at}")
