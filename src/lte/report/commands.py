"""What a row's command says of it: its options, what it was measured on, and all that tells it from other runs."""

import re
import shlex
from collections.abc import Mapping
from pathlib import Path

Options = Mapping[str, str]

_NOT_A_SETTING = ("--seed", "-o", "--output", "--output-dir", "--resume", "--json", "--predictions", "")


def parse_command(command: str, folder: str = "") -> dict[str, str]:
    """The options by their names, values of one joined by a space; what has no name, under ``""``.

    So is ``folder``, the model's, which may stand behind a flag or another option's value: ``lte eval --json DIR``.

    Of several commands joined by ``&&`` the later ones count, but for ``lte train``: what follows it are further
    evaluations, which have rows of their own.
    """
    first, *others = split_commands(command)
    options = _options(first, folder)
    for other in others if not options.get("", "").startswith("lte train") else ():
        options |= _options(other, folder)
    return options


_QUOTED = re.compile(r"""'[^']*'|"(?:\\.|[^"\\])*"|\\.""")


def split_commands(command: str) -> list[str]:
    """Those joined by ``&&``, which may stand in a quoted text as well."""
    hidden = _QUOTED.sub(lambda found: found[0].replace("&&", "\0"), command)
    return [one.replace("\0", "&&") for one in hidden.split(" && ")]


def _options(command: str, folder: str) -> dict[str, str]:
    try:
        words = shlex.split(command)
    except ValueError:
        return {}
    options: dict[str, str] = {}
    name = ""
    for word in words:
        if word.startswith("-") and not word.lstrip("-")[:1].isdigit():
            name, equals, value = word.partition("=")
            options[name] = value if equals else ""
        else:
            of = "" if word == folder and name != "--model" else name
            options[of] = f"{options.get(of, '')} {word}".strip()
    return options


def setting_of(options: Options) -> str:
    """All but the seed, folders and files it wrote: runs that share it differ in nothing else."""
    recipes = [word for word in options.get("", "").split() if word.endswith((".yaml", ".yml"))]
    given = [f"{name} {value}".strip() for name, value in options.items() if name not in _NOT_A_SETTING]
    return " ".join(recipes + given)


def split_setting(setting: str) -> list[str]:
    """What :func:`setting_of` joined: options with their values, recipes before them."""
    return re.split(r" (?=--)", setting)


def task_of(options: Options) -> str:
    """The data it was measured on, as short as its path allows; empty where the command does not say."""
    if "--mmlu" in options:
        return "MMLU"
    if options.get("--eval-text"):
        return _short(options["--eval-text"])
    if not options.get("--text"):
        return ""
    held_out = ", held out" if options.get("", "").startswith("lte train") else ""
    return _short(options["--text"]) + held_out


_STORED = re.compile(r"(\.(txt|jsonl|json|csv|tsv|parquet|arrow|npy|gz))+$")


def _short(sources: str) -> str:
    """The last two parts of each path, without what says how it is stored."""
    parts = [Path(source).parts[-2:] for source in sources.split()]
    return " ".join("/".join([*folder, _STORED.sub("", name)]).lstrip("/") for *folder, name in parts)
