"""Older rows have no fields for how a model was made and measured: both are read from their commands, here alone."""

import re
import shlex
from collections.abc import Mapping
from typing import Any

from lte.evaluation.result_row import ResultRow

Options = Mapping[str, str]

_ELSEWHERE = ("--seed", "-o", "--output", "--output-dir", "--resume", "--json", "--predictions", "")
"""What a command says and is no option of :class:`~lte.evaluation.record.Made`."""


def upgraded(row: ResultRow) -> ResultRow:
    """The row with ``made`` and ``measured`` in it and in its evaluations, or with ``bench``; itself if it has them."""
    row, command = _with_options(row), _text(row, "command")
    if isinstance(row.get("rows"), list) and "bench" not in row and command.startswith("lte bench "):
        return {**row, "bench": "".join(command.split()[2:3])}
    if isinstance(row.get("evaluation"), dict):
        evals = row.get("evals")
        further = {"evals": [_evaluated(row, one) for one in evals]} if isinstance(evals, list) else {}
        return {**row, "evaluation": _evaluated(row, row["evaluation"]), **further}
    return {**row, **_evaluated(row, row)} if "sparsity" in row else row


def _with_options(one: ResultRow) -> ResultRow:
    """With a method that has room for its options, where it was but a name."""
    return {**one, "method": {"method": one["method"]}} if isinstance(one.get("method"), str) else one


def _evaluated(row: ResultRow, one: Any) -> Any:
    """An evaluation in a row, with ``made`` and ``measured`` of its own."""
    if not isinstance(one, dict):
        return one
    one = _with_options(one)
    if _has(row, one, "made") and _has(row, one, "measured"):
        return one
    commands = _commands(row, one)
    parsed = [parse_command(command, _text(row, "model")) for command in commands]
    alone = len(commands) > 1 or commands[0].startswith("lte eval ")
    made = list(zip(commands, parsed, strict=True))[: -1 if alone else None]
    steps = [_made(command, options) for command, options in made if command]
    if not any(step["model"] for step in steps) and "trained_by" not in row and steps:
        steps[0]["model"] = _text(row, "model")  # nothing but its name tells it from other models
    found = {"made": steps, "measured": _measured(parsed[-1], alone)}
    return {**one, **{name: value for name, value in found.items() if not _has(row, one, name)}}


def _has(row: ResultRow, one: ResultRow, name: str) -> bool:
    """Whether it is said of an evaluation. Of a model that was trained by an older version, ``made`` is empty."""
    said = one.get(name, row.get(name))
    return said is not None and not (name == "made" and said == [] and row.get("trained_by"))


def _text(row: ResultRow, name: str) -> str:
    value = row.get(name)
    return value if isinstance(value, str) else ""


def _commands(row: ResultRow, one: ResultRow) -> list[str]:
    """What was run for an evaluation, in order: what trained the model, the row's command, the evaluation's own."""
    command, own = _text(row, "command"), _text(one, "command")
    made = command if own in ("", command) else split_commands(command)[0]  # the others are evaluations
    trained = split_commands(_text(row, "trained_by"))  # lte calibrate --in-place may follow lte train
    return list(dict.fromkeys(filter(None, (*trained, made, own)))) or [""]


def _made(command: str, options: Options) -> ResultRow:
    """As :class:`~lte.evaluation.record.Made` in a row, with all that was written, model and data too, as options."""
    recipes = [word for word in options.get("", "").split() if word.endswith((".yaml", ".yml"))]
    found = {"": " ".join(recipes)} if recipes else {}
    data = options.get("--text", "").split()
    return {"command": command, "model": options.get("--model", ""), "data": data, "options": found | _given(options)}


def _measured(options: Options, alone: bool) -> ResultRow:
    """As :class:`~lte.evaluation.record.Measured` in a row, of the command that measured."""
    trained = options.get("", "").startswith("lte train")
    if "--mmlu" in options:
        kind, data = "MMLU", options["--mmlu"]
    else:
        data = options.get("--eval-text") or options.get("--text", "")
        kind = "held out" if trained and not options.get("--eval-text") else "data"
    return {"kind": kind, "data": data.split(), "options": _given(options) if alone else {}}


def _given(options: Options) -> dict[str, str | bool]:
    return {_name(name): value or True for name, value in options.items() if name not in _ELSEWHERE}


def _name(option: str) -> str:
    return option.removeprefix("--").replace("-", "_")


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
