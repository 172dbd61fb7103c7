"""Damage to a file: bytes of any file, values of JSON and YAML, lines of text, fields of headers."""

import json
import re
from collections.abc import Callable
from random import Random
from typing import Any

from formats import layout

NUMBERS = (0, -1, 2**31, 2**63, -(2**63), 10**30, 1e308, -1e-3, 0.5, float("nan"), float("inf"))
VALUES = (None, True, False, "", "x", "../..", [], {}, [[]], [1, "x"], {"a": 1}, "{{ 1/0 }}", "\ud800", "0")
Change = Callable[[bytes, Random], tuple[bytes, str]]


def damaged(name: str, content: bytes, chance: Random) -> tuple[bytes, str]:
    """The content of a file with one thing wrong, and what that is."""
    kinds: list[Change] = [_bytes]
    if name.endswith((".json", ".jsonl")):
        kinds += [_json] * 3
    elif name.endswith((".safetensors", ".npy", ".gguf", ".parquet")):
        kinds += [lambda content, chance: _header(name, content, chance)] * 2
        kinds += [_safetensors_header] * 2 * name.endswith(".safetensors")
        kinds += [_gguf_field] * 2 * name.endswith(".gguf")
    elif name.endswith((".csv", ".tsv", ".txt", ".jinja")):
        kinds += [_lines]
    elif name.endswith(".yaml"):
        kinds += [_lines, *[_yaml] * 3]
    return chance.choice(kinds)(content, chance)


def _bytes(content: bytes, chance: Random, first: int = 0, last: int | None = None) -> tuple[bytes, str]:
    """Anything between two places."""
    last = len(content) if last is None else last
    at = chance.randrange(first, max(last, first + 1))
    length = min(chance.choice((1, 1, 2, 8, 100)), max(last - at, 0))
    end, other = at + length, chance.randrange(first, max(last - length, first) + 1)
    kind = chance.choice(("bit", "bit", "byte", "zeros", "ones", "cut", "insert", "remove", "repeat", "copy"))
    if kind in ("bit", "byte") and at < len(content):
        new = content[at] ^ (1 << chance.randrange(8) if kind == "bit" else chance.randrange(1, 256))
        return content[:at] + bytes([new]) + content[at + 1 :], f"{kind} at {at}: {content[at]:#x} -> {new:#x}"
    changed = {
        "zeros": content[:at] + bytes(length) + content[end:],
        "ones": content[:at] + b"\xff" * length + content[end:],
        "cut": content[:at],
        "insert": content[:at] + chance.randbytes(length) + content[at:],
        "remove": content[:at] + content[end:],
        "repeat": content[:end] + content[at:],
        "copy": content[:at] + content[other : other + length] + content[end:],
    }
    return changed.get(kind, b""), f"{kind} at {at}, {length} bytes" if kind in changed else "nothing left"


def _header(name: str, content: bytes, chance: Random) -> tuple[bytes, str]:
    found = layout(name, content)
    assert found is not None
    if name.endswith(".parquet"):
        return _bytes(content, chance, found.data)
    return _bytes(content, chance, 0, found.data)


def _gguf_field(content: bytes, chance: Random) -> tuple[bytes, str]:
    """One number of the header at its largest or another value: a length, a count, a type."""
    found = layout(".gguf", content)
    assert found is not None
    at = chance.choice([8, 16, *(one.start() - 8 for one in re.finditer(rb"[a-z_]+\.[a-z_.]+", content[: found.data]))])
    number = chance.choice((0, 1, 2, 12, 2**16, 2**31, 2**40, 2**63, 2**64 - 1))
    return content[:at] + number.to_bytes(8, "little") + content[at + 8 :], f"8 bytes at {at} -> {number}"


def _safetensors_header(content: bytes, chance: Random) -> tuple[bytes, str]:
    """The same in the header's JSON, its length kept true."""
    length = int.from_bytes(content[:8], "little")
    header, what = _json(content[8 : 8 + length], chance)
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + content[8 + length :], f"header: {what}"


def _json(content: bytes, chance: Random) -> tuple[bytes, str]:
    """One value of JSON, or of a line of JSON lines."""
    lines = content.decode().splitlines() if content.count(b"\n{") > 1 else [content.decode()]
    line = chance.randrange(len(lines))
    value = json.loads(lines[line])
    if chance.random() < 0.03:
        deep = chance.choice((200, 100_000))
        lines[line], what = '{"a":' * deep + "1" + "}" * deep, f"{deep} levels"
    else:
        value, what = _changed(value, chance)
        indent = 2 if len(lines) == 1 and lines[0].count("\n") > 1 else None
        lines[line] = json.dumps(value, indent=indent)
    end = "\n" if len(lines) > 1 else ""
    return ("\n".join(lines) + end).encode(), f"line {line + 1}: {what}" if len(lines) > 1 else what


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all values; of a long list or table, of its first and last ones only."""
    inside = list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    few = inside if len(inside) <= 40 else [*inside[:4], *inside[-4:]]
    return [path] * bool(path) + [place for one in few for place in _places(value[one], (*path, one))]


def _changed(value: Any, chance: Random) -> tuple[Any, str]:
    places = _places(value)
    if not places:
        return chance.choice(VALUES), "all of it replaced"
    path = chance.choice(places)
    holder = value
    for key in path[:-1]:
        holder = holder[key]
    key, where = path[-1], ".".join(map(str, path))
    old = holder[key]
    kind = chance.choice(("drop", "value", "number", "number", "nest", "copy", "rename"))
    if kind == "drop":
        del holder[key]
        return value, f"{where} dropped"
    if kind == "rename" and isinstance(holder, dict):
        holder[f"{key}{chance.choice(('_', 's', '2'))}"] = holder.pop(key)
        return value, f"{where} renamed"
    if kind == "copy":
        source = value
        for one in chance.choice(places):
            source = source[one]
        new = json.loads(json.dumps(source))
    elif kind == "nest":
        new = chance.choice(([old], {"value": old}, [old, old]))
    elif kind == "number" and isinstance(old, int | float) and not isinstance(old, bool):
        new = chance.choice((*NUMBERS, old + 1, old - 1, -old, old * 2, old * 1000, str(old)))
    else:
        new = chance.choice((*VALUES, *NUMBERS))
    holder[key] = new
    return value, f"{where}: {json.dumps(old)[:60]} -> {json.dumps(new)[:60]}"


def _yaml(content: bytes, chance: Random) -> tuple[bytes, str]:
    lines = content.decode().splitlines()
    at = chance.randrange(len(lines))
    key, _, old = lines[at].partition(":")
    words = (
        "no",
        "null",
        "~",
        "[]",
        "{}",
        "[1, 2]",
        "{a: 1}",
        "!!python/name:os.system",
        "*a",
        "&a [*a]",
        "0x10",
        "1e3",
    )
    new = chance.choice((*words, *map(str, NUMBERS), "''", "2026-01-01", "12:30:00", "|", "? a", "- a", "'", "\t"))
    lines[at] = chance.choice(
        (f"{key}: {new}", f"{key}x:{old}", f"{key}:{old} {new}", f"{key}: [{old}]", f"  {lines[at]}")
    )
    return ("\n".join(lines) + "\n").encode(), f"line {at + 1}: {lines[at]!r}"


def _lines(content: bytes, chance: Random) -> tuple[bytes, str]:
    lines = content.decode(errors="surrogateescape").splitlines(keepends=True) or [""]
    at, other = chance.randrange(len(lines)), chance.randrange(len(lines))
    kind = chance.choice(("drop", "repeat", "swap", "join", "insert", "insert"))
    if kind == "drop":
        del lines[at]
    elif kind == "repeat":
        lines.insert(other, lines[at])
    elif kind == "swap":
        lines[at], lines[other] = lines[other], lines[at]
    elif kind == "join":
        lines[at] = lines[at].rstrip("\n")
    else:
        sign = chance.choice(
            ('"', "'", ",", "\t", "\0", "\r", "\ufeff", "{", "}", "{% for x in y %}", "{{ x.y.z }}", "\x1b")
        )
        place = chance.randrange(len(lines[at]) + 1)
        lines[at] = lines[at][:place] + sign + lines[at][place:]
        kind = f"{sign!r} inserted"
    return "".join(lines).encode(errors="surrogateescape"), f"line {at + 1}: {kind}"
