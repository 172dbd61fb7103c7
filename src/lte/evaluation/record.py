"""`Record`, a row of results: how a model was made, how it was measured, and the result. One writer, one reader.

The command of a row is its caption. Nothing is read from it.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Any, Literal, TypeVar

SUMMARY = "lte_training.json"
"""The file that a command writes beside a model: how it was made. Training adds its evaluation."""

_ELSEWHERE = ("model", "text", "output", "output_dir", "seed", "mode", "json", "predictions", "in_place", "resume")
_ELSEWHERE += ("device", "backend", "batch_size", "trust_remote_code")
"""Options that are fields of a record, or that change the result only by rounding."""


@dataclass(frozen=True)
class Made:
    """The work of one command: it made a model or changed the model of the previous command.

    Attributes:
        command: a caption; empty for a call from Python.
        model: its first model, as it was given; empty if it is the model of the previous command.
        data: its data, as it was given.
        options: all options that change its result and are not at their default. The first seed is in the record. A
            later command's seed is an option.
    """

    command: str = ""
    model: str = ""
    data: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)


MeasuredOn = Literal["data", "held out", "MMLU", "lm_eval"]


@dataclass(frozen=True)
class Measured:
    """The data and options of a measurement.

    Attributes:
        kind: ``data`` is files or hub data sets, ``held out`` is rows that were kept out of training. ``lm_eval`` is
            tasks of lm_eval. ``MMLU`` is in older rows.
        data: the files or data sets as they were given, or the names of lm_eval's tasks.
        options: all options that change the result and are not at their default.
    """

    kind: MeasuredOn = "data"
    data: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Record:
    """One evaluation of one model.

    Attributes:
        command: a caption; empty for a call from Python.
        model: the first model of training, or the model of ``lte eval``, as it was given.
        method: its name, as ``method``, and its options.
        trained_by: a caption: the commands that made the model of ``lte eval``.
        made: the commands that made the model, in order; empty if its folder does not say it.
        seed: of the first command that has one.
        recipe, target_sparsity, eta: of training. ``recipe`` is the former name of the schedule.
        steps: of training, by stage.
        environment: the machine and the versions of the measurement.
        evaluation: the measured values, by name.
    """

    command: str = ""
    model: str = ""
    method: Mapping[str, Any] = field(default_factory=dict)
    trained_by: str | None = None
    made: tuple[Made, ...] = ()
    measured: Measured = field(default_factory=Measured)
    seed: int | None = None
    recipe: str | None = None
    target_sparsity: float | None = None
    eta: float | None = None
    steps: Mapping[str, int] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    evaluation: Mapping[str, Any] = field(default_factory=dict)

    def row(self) -> dict[str, Any]:
        """Return a row of results, which :func:`records_in` reads."""
        return plain(asdict(self))

    def flat_row(self) -> dict[str, Any]:
        """Return the row in the form of ``lte eval``: measured values beside the other fields, without empty fields."""
        row = self.row()
        evaluation = row.pop("evaluation")
        return {name: value for name, value in row.items() if value not in (None, {})} | evaluation


_FIELDS = frozenset(one.name for one in fields(Record))
Read = TypeVar("Read", Made, Measured, Record)


def records_in(row: Mapping[str, Any]) -> list[Record]:
    """Return the records of a row: of its evaluation, and of the later ones (``evals``)."""
    if not isinstance(row.get("evaluation"), Mapping):
        return [_record(row, row)]
    return [_record(row, one) for one in (row["evaluation"], *(row.get("evals") or ()))]


def _record(row: Mapping[str, Any], one: Mapping[str, Any]) -> Record:
    """Return the record of an evaluation in a row. Fields that it lacks are those of the row."""
    said = {**row, **{name: one[name] for name in ("command", "method", "made", "measured") if one.get(name)}}
    said["made"] = tuple(_of(Made, step) for step in said.get("made") or ())
    said["measured"] = _of(Measured, said.get("measured") or {})
    said["evaluation"] = {name: value for name, value in one.items() if name not in _FIELDS}
    return _of(Record, said)


def _of(cls: type[Read], values: Mapping[str, Any]) -> Read:
    """Return the object with the fields of a row. Null fields and fields of later versions are ignored."""
    names = {one.name for one in fields(cls)}
    found: dict[str, Any] = {name: value for name, value in values.items() if name in names and value is not None}
    if "data" in found:
        found["data"] = tuple(found["data"])
    return cls(**found)


def given(options: Any) -> dict[str, Any]:
    """Return the options of a dataclass and its inner ones that change a result and are not at their default."""
    found: dict[str, Any] = {}
    for one in fields(options):
        value = getattr(options, one.name)
        if is_dataclass(value):
            found |= given(value)
        elif one.init and one.name not in _ELSEWHERE and value != one.default:
            found[one.name] = value
    return plain(found)


def plain(values: Any) -> Any:
    """Return the values as a JSON file would give them back."""
    return json.loads(json.dumps(values, default=str))
