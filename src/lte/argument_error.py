"""`ArgumentError`: its message names arguments as they were given, as parameters or as options of a command."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Argument:
    """An argument that a message tells to give. ``value`` is as in Python, without quotes, or empty."""

    name: str
    value: str = ""

    def __str__(self) -> str:
        return f"{self.name}={self.value}" if self.value else self.name

    def as_option(self, names: Mapping[str, str]) -> str:
        """Return it as an option of a command. ``names`` has options whose names differ from the parameters'."""
        flag = f"--{names.get(self.name, self.name).replace('_', '-')}"
        return flag if self.value in ("", "True") else f"{flag} {self.value}"


class ArgumentError(ValueError):
    """An error whose message consists of parts. Arguments in it are written as in Python."""

    def __init__(self, *parts: str | Argument) -> None:
        super().__init__("".join(map(str, parts)))
        self.parts = parts

    def as_options(self, names: Mapping[str, str]) -> str:
        """Return the message with arguments as options, see :meth:`Argument.as_option`."""
        return "".join(part.as_option(names) if isinstance(part, Argument) else part for part in self.parts)
