"""A mistake in an argument: its message names arguments as they were given, as parameters or as a command's options."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Argument:
    """What a message tells to give. ``value``: as in Python, without quotes; empty where the message has none."""

    name: str
    value: str = ""

    def __str__(self) -> str:
        return f"{self.name}={self.value}" if self.value else self.name

    def as_option(self, names: Mapping[str, str]) -> str:
        """As a command has it, whose options have these names where they are not those of the parameters."""
        flag = f"--{names.get(self.name, self.name).replace('_', '-')}"
        return flag if self.value in ("", "True") else f"{flag} {self.value}"


class ArgumentError(ValueError):
    """Its message is the parts of it, arguments as Python has them."""

    def __init__(self, *parts: str | Argument) -> None:
        super().__init__("".join(map(str, parts)))
        self.parts = parts

    def as_options(self, names: Mapping[str, str]) -> str:
        """The message with arguments as options, see :meth:`Argument.as_option`."""
        return "".join(part.as_option(names) if isinstance(part, Argument) else part for part in self.parts)
