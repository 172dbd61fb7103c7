"""A record is written as a row and read back as the same record, whatever else the row holds."""

import json
from dataclasses import dataclass, field, replace

import pytest

from lte.data.config import DataConfig
from lte.evaluation.origin import training_of
from lte.evaluation.record import SUMMARY, Made, Measured, Record, given, records_in

TRAINED = Made("lte train", "m", ("a.txt", "b.txt"), {"max_steps": 3, "lr_scheduler_kwargs.a": None, "bf16": True})
RECORD = Record(
    command="lte train",
    model="m",
    method={"method": "lte", "expert_size": 8},
    made=(TRAINED,),
    measured=Measured("held out", ("a.txt",), {"sequence_length": 32}),
    seed=1,
    recipe="default",
    target_sparsity=0.5,
    eta=0.0,
    steps={"dense": 1, "soft": 2},
    environment={"device": "cpu"},
    evaluation={"sparsity": 0.5, "perplexity": 2.0, "accuracy": None},
)


def as_json(row):
    return json.loads(json.dumps(row))


def test_a_row_is_read_back():
    assert records_in(as_json(RECORD.row())) == [RECORD]
    assert records_in(as_json(RECORD.flat_row())) == [RECORD]
    bare = Record(evaluation={"sparsity": 0.0})
    assert records_in(as_json(bare.row())) == records_in(as_json(bare.flat_row())) == [bare]


def test_further_evaluations_share_how_the_model_was_made():
    more = {"command": "lte eval", "made": [], "measured": {"data": ["c.txt"]}, "sparsity": 0.4}
    found = records_in(as_json({**RECORD.row(), "evals": [more]}))
    assert found[0] == RECORD
    measured = Measured("data", ("c.txt",))
    assert found[1] == replace(RECORD, command="lte eval", measured=measured, evaluation={"sparsity": 0.4})


def test_what_only_a_later_version_has_is_not_read():
    row = as_json(RECORD.row())
    row["made"][0]["later"] = row["measured"]["later"] = row["later"] = 1
    assert records_in(row) == [RECORD]


def test_options_at_their_default_say_nothing():
    @dataclass
    class Options:
        model: str
        target_sparsity: float
        data: DataConfig = field(default_factory=DataConfig)
        rows: int = 64
        json: bool = False

    assert given(Options("m", 0.5, rows=64, json=True)) == {"target_sparsity": 0.5}
    options = Options("m", 0.5, DataConfig(class_names=("a", "b")), 3)
    assert given(options) == {"target_sparsity": 0.5, "class_names": ["a", "b"], "rows": 3}


@pytest.mark.parametrize("change", [{"made": ["m"]}, {"made": [TRAINED.command]}, {"method": "lte"}, {"made": 3}])
def test_a_damaged_summary_is_named(tmp_path, change):
    (tmp_path / SUMMARY).write_text(json.dumps({**RECORD.row(), **change}))
    with pytest.raises(ValueError, match=f"{SUMMARY} is damaged"):
        training_of(str(tmp_path), "lte")
