"""A run of a sweep has its row already where options and files are the same, however its command was written."""

from pathlib import Path

import pytest

from lte.training.row_identity import OPTIONS
from lte.training.sweep_rows import diverged, row_of

IDENTITY = {OPTIONS: "1", "a.txt": "2"}
FOLDER = Path("out")


def test_a_row_is_known_by_what_it_was_made_from():
    row = {"run": {"seed": "1"}, "command": "lte train --seed 1", "identity": IDENTITY}
    assert row_of({"seed": "1"}, IDENTITY, "lte train --seed=1", [row], FOLDER) is row
    assert row_of({"seed": "2"}, IDENTITY, "lte train --seed 2", [row], FOLDER) is None
    assert row_of({"seed": "1"}, IDENTITY, "lte train --seed 1", [{**row, "error": "none"}], FOLDER) is None
    with pytest.raises(ValueError, match=r"out holds seed 1, but then a.txt had another content"):
        row_of({"seed": "1"}, {**IDENTITY, "a.txt": "3"}, row["command"], [row], FOLDER)
    with pytest.raises(ValueError, match=r"but then the command, its recipe, .* had other options"):
        row_of({"seed": "1"}, {**IDENTITY, OPTIONS: "3"}, row["command"], [row], FOLDER)


def test_a_row_of_before_rows_said_so_is_known_by_its_command():
    row = {"run": {"seed": "1"}, "command": "lte train --seed 1"}
    assert row_of({"seed": "1"}, IDENTITY, row["command"], [row], FOLDER) is row
    with pytest.raises(ValueError, match="made with other options"):
        row_of({"seed": "1"}, IDENTITY, "lte train --seed=1", [row], FOLDER)


@pytest.mark.parametrize(("loss", "failed"), [(float("nan"), True), (float("inf"), True), (1.0, False), (None, False)])
def test_a_run_whose_loss_is_no_number_has_failed(loss, failed):
    assert (diverged({"evaluation": {"loss": loss}}) is not None) == failed
