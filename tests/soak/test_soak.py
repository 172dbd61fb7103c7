"""The whole of it, for ``make soak``: hours of it find what the samples of ``make test`` do not."""

import os
from pathlib import Path

import pytest
from damage import Damage
from disks import Disks, can_mount
from forked import Commands
from kills import Kills
from pairs import Pairs

SEED = int(os.environ.get("SOAK_SEED", "1"))
DAMAGED, KILLED, FULL, PAIRS = (
    int(os.environ.get(f"SOAK_{name}", usual))
    for name, usual in {"DAMAGED": 10_000, "KILLED": 240, "FULL": 160, "PAIRS": 12}.items()
)
PARTS = 10
pytestmark = [pytest.mark.soak, pytest.mark.slow, pytest.mark.timeout(0)]


@pytest.mark.parametrize("part", range(PARTS))
def test_damaged_inputs(part: int, whole: Path, tmp_path: Path, commands: Commands, judge) -> None:
    damage = Damage(whole, tmp_path, commands, SEED)
    judge(damage.trial(number) for number in range(DAMAGED * part // PARTS, DAMAGED * (part + 1) // PARTS))


@pytest.mark.parametrize("part", range(PARTS))
def test_killed_and_resumed(part: int, whole: Path, tmp_path: Path, commands: Commands, judge) -> None:
    kills = Kills(whole, tmp_path, commands, SEED)
    judge(kills.trial(number) for number in range(KILLED) if number * PARTS // KILLED == part)


def test_full_disks(whole: Path, tmp_path: Path, commands: Commands, judge) -> None:
    disks = Disks(whole, tmp_path, commands, SEED)
    judge(disks.trial(number) for number in range(FULL))


def test_small_file_systems(whole: Path, tmp_path: Path, commands: Commands, judge) -> None:
    if not can_mount(tmp_path):
        pytest.skip("mounting a small file system needs root")
    disks = Disks(whole, tmp_path, commands, SEED)
    judge(disks.small(number) for number in range(FULL // 2))


def test_two_in_one_folder(whole: Path, tmp_path: Path, commands: Commands, judge) -> None:
    with Commands() as others:
        pairs = Pairs(whole, tmp_path, (commands, others), SEED)
        judge(pairs.trial(number) for number in range(PAIRS))
        judge([pairs.sweeps(0)])
