"""Options that are true or false, in any form that users write."""

import re
from collections.abc import Sequence
from dataclasses import is_dataclass
from itertools import chain
from types import NoneType
from typing import Any, get_args, get_type_hints


def switches(arguments: Sequence[str], options: type) -> list[str]:
    """Return arguments in the form that tyro takes, which differs between options with and without a default.

    ``--bf16``, ``--bf16 True`` and ``--bf16=True`` are the same, and so are ``--no-bf16`` and ``--bf16 False``.

    Args:
        arguments: of a command.
        options: the dataclass of the command.
    """
    hints, found = hints_of(options), list[str]()
    split = list(chain.from_iterable(re.split(r"=(?=(?:True|False)$)", one) for one in arguments))
    for one, after in zip(split, [*split[1:], ""], strict=True):
        before = found[-1] if found else ""
        if one in ("True", "False") and _hint(hints, before) is bool:
            found[-1] = before if one == "True" else f"--no-{before[2:]}"
        elif one.startswith("--no-") and _hint(hints, f"--{one[5:]}") not in (None, bool):
            found += [f"--{one[5:]}", "False"]
        elif {*get_args(_hint(hints, one))} == {bool, NoneType} and after not in ("True", "False", "None"):
            found += [one, "True"]
        else:
            found.append(one)
    return found


def hints_of(cls: type) -> dict[str, Any]:
    """Return the types of a dataclass's fields, and of the fields of dataclasses in it, by name."""
    hints = get_type_hints(cls)
    inner = [hints_of(hint) for hint in hints.values() if is_dataclass(hint) and isinstance(hint, type)]
    return {name: hint for one in [hints, *inner] for name, hint in one.items()}


def _hint(hints: dict[str, Any], flag: str) -> Any:
    return hints.get(flag[2:].replace("-", "_")) if flag.startswith("--") else None
