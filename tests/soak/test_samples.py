"""A few trials of each kind in ``make test``, so that what ``make soak`` proves stays true."""

import sys
from itertools import chain
from pathlib import Path

import pytest
from damage import SUBJECTS, Damage
from disks import Disks
from forked import Commands
from kills import Kills

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="processes are watched by pidfd")]


def test_samples(whole: Path, tmp_path: Path, commands: Commands, judge) -> None:
    """In one test, as the models are made once for all of them."""
    damage, kills, disks = (kind(whole, tmp_path, commands) for kind in (Damage, Kills, Disks))
    judge(
        chain(
            (damage.trial(number) for number in range(len(SUBJECTS))),
            (kills.trial(number) for number in (1, 17)),
            (disks.trial(number) for number in (0, 3)),
        )
    )
