"""A row of results: how a model was made, on what and how it was measured, and what that gave. One writer, one reader.

The command of a row is its caption. Nothing is read from it.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Any, Literal, TypeVar

SUMMARY = "lte_training.json"
"""What training leaves beside a model: how it was made, and what was measured then."""

_ELSEWHERE = ("model", "text", "output", "output_dir", "seed", "mode", "json", "predictions", "in_place", "resume")
_ELSEWHERE += ("device", "backend", "batch_size", "trust_remote_code")
"""Options that a record has as fields of its own, or with which the result is the same but for rounding."""


@dataclass(frozen=True)
class Made:
    """What one command did to make a model, or to change the model that the command before it had made.

    Attributes:
        command: a caption; empty for a call from Python.
        model: what it began with, as it was given; empty where that is the model of the command before.
        data: what it read, as it was given.
        options: all that change its result, where they are not at their default; the seed is the record's.
    """

    command: str = ""
    model: str = ""
    data: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)


MeasuredOn = Literal["data", "held out", "MMLU", "lm_eval"]


@dataclass(frozen=True)
class Measured:
    """What a model was measured on, and how.

    Attributes:
        kind: files or hub data sets; rows of them that were kept out of training; or questions that others have made.
        data: the files or data sets as they were given; the folder of MMLU; the names of lm_eval's tasks.
        options: all that change the result, where they are not at their default.
    """

    kind: MeasuredOn = "data"
    data: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Record:
    """One evaluation of one model.

    Attributes:
        command: a caption; empty for a call from Python.
        model: of training, the model that it began with; of ``lte eval``, the model that was evaluated; as given.
        method: its name, as ``method``, and its options.
        trained_by: a caption: the commands that made the model that ``lte eval`` was given.
        made: what made the model, in order; nothing where its folder does not say.
        seed, recipe, target_sparsity, eta: of training; the recipe is what is called a schedule elsewhere.
        steps: of training, by stage.
        environment: where it was measured.
        evaluation: what was measured, by name.
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
        """As a row of results, for :func:`records_in` to read."""
        return plain(asdict(self))

    def flat_row(self) -> dict[str, Any]:
        """The same as ``lte eval`` prints it: measured values beside the other fields, and no empty ones of these."""
        row = self.row()
        evaluation = row.pop("evaluation")
        return {name: value for name, value in row.items() if value not in (None, {})} | evaluation


_FIELDS = frozenset(one.name for one in fields(Record))
Read = TypeVar("Read", Made, Measured, Record)


def records_in(row: Mapping[str, Any]) -> list[Record]:
    """The records of a row: of its evaluation, and of those that came after it (``evals``)."""
    if not isinstance(row.get("evaluation"), Mapping):
        return [_record(row, row)]
    return [_record(row, one) for one in (row["evaluation"], *(row.get("evals") or ()))]


def _record(row: Mapping[str, Any], one: Mapping[str, Any]) -> Record:
    """Of an evaluation within a row; what it does not say of itself, the row says."""
    said = {**row, **{name: one[name] for name in ("command", "method", "made", "measured") if one.get(name)}}
    said["made"] = tuple(_of(Made, step) for step in said.get("made") or ())
    said["measured"] = _of(Measured, said.get("measured") or {})
    said["evaluation"] = {name: value for name, value in one.items() if name not in _FIELDS}
    return _of(Record, said)


def _of(cls: type[Read], values: Mapping[str, Any]) -> Read:
    """From a row. A field that is null is not there, and one that only a later version has is not read."""
    names = {one.name for one in fields(cls)}
    found: dict[str, Any] = {name: value for name, value in values.items() if name in names and value is not None}
    if "data" in found:
        found["data"] = tuple(found["data"])
    return cls(**found)


def given(options: Any) -> dict[str, Any]:
    """The options of a dataclass, and of those in it, that change a result and are not at their default, by name."""
    found: dict[str, Any] = {}
    for one in fields(options):
        value = getattr(options, one.name)
        if is_dataclass(value):
            found |= given(value)
        elif one.init and one.name not in _ELSEWHERE and value != one.default:
            found[one.name] = value
    return plain(found)


def plain(values: Any) -> Any:
    """The same as it comes back from a JSON file."""
    return json.loads(json.dumps(values, default=str))
