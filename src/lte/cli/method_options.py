"""``--method NAME``: the method of a command, and its options besides those of the command."""

from collections.abc import Collection, Sequence
from dataclasses import field, fields, make_dataclass
from typing import Any

import tyro

from lte.surgery.conversion import Conversion
from lte.surgery.method import Method


def method_name(argv: Sequence[str], default: str = "lte") -> str:
    """Return the last name that arguments give with ``--method``."""
    name = default
    for flag, value in zip(argv, [*argv[1:], ""], strict=False):
        flag, equals, joined = flag.partition("=")
        if flag == "--method":
            name = joined if equals else value
    return name


def method_in(argv: Sequence[str], default: str = "lte") -> type[Method]:
    """Return the method with routers that arguments name.

    Raises:
        ValueError: there is no such method, or it has no routers.
    """
    found = Conversion.named(method_name(argv, default))
    if not issubclass(found, Method):
        raise ValueError(f"{found.name} has no routers and is not trained: give lte sparsify --method {found.name}")
    return found


def with_method(command: type, method: type[Conversion], elsewhere: Collection[str] = ()) -> type:
    """Return a dataclass with a command's options and, as its field ``chosen_method``, those of the method.

    Args:
        command: a dataclass.
        method: the method whose options are added.
        elsewhere: options that the command has already, by the same name. :func:`chosen` fills them in.
    """
    hidden: list[Any] = [
        (one.name, tyro.conf.Suppress[tyro.conf.Fixed[Any]], field(default=one.default))
        for one in fields(method)
        if one.name in elsewhere and one.init
    ]
    shown: Any = method
    if hidden:
        namespace = {"__doc__": method.__doc__}
        shown = make_dataclass(method.__name__, hidden, bases=(method,), frozen=True, namespace=namespace)
    return make_dataclass(command.__name__, [("chosen_method", shown, field(default_factory=shown))], bases=(command,))


def chosen(options: Any, **elsewhere: Any) -> Method:
    """Return the method of parsed options, with those of its options that the command has itself."""
    found: Method = options.chosen_method
    given = {name: value for name, value in elsewhere.items() if name in found.options()}
    return Method.from_dict({**found.to_dict(), **given})
