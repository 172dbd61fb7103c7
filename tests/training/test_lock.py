"""One run at a time in a folder."""

import fcntl
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from tiny_training import trainer_for

from lte.training import lock
from lte.training.lock import LOCK, alone_in

# by its path: without torch's seconds
WITH = f"import os, runpy, sys, time\nalone_in = runpy.run_path({lock.__file__!r})['alone_in']\n"
HOLD = WITH + "with alone_in(sys.argv[1]): print('held', flush=True); "
COUNT = """
won, until = 0, time.time() + 1
while time.time() < until:
    try:
        with alone_in(sys.argv[1]):
            os.close(os.open(sys.argv[1] + '/one', os.O_CREAT | os.O_EXCL))
            os.unlink(sys.argv[1] + '/one')
            won += 1
    except ValueError:
        pass
print(won)
"""


@contextmanager
def holder(folder, then="time.sleep(60)") -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-c", HOLD + then, str(folder)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.kill()


def test_a_second_run_in_a_folder_is_refused_until_the_first_is_killed(tmp_path):
    with holder(tmp_path) as process:
        refusal = rf"{tmp_path} is in use by process {process.pid} on .+ since \d{{4}}-.+: wait until it ends"
        with pytest.raises(ValueError, match=refusal):
            trainer_for(tmp_path).train()
        with pytest.raises(ValueError, match=refusal), alone_in(tmp_path):
            pass
    assert (tmp_path / LOCK).exists()  # a killed process leaves it, and it bars nobody
    with alone_in(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()


def test_children_by_fork_do_not_hold_it(tmp_path):
    """As a loader's workers, which outlive a killed run by seconds."""
    with holder(tmp_path, "os.fork() or (os.close(1), time.sleep(20)); os.kill(os.getpid(), 9)") as process:
        assert process.wait() == -signal.SIGKILL
        with alone_in(tmp_path):
            pass


def test_it_is_held_until_its_last_holder_of_a_process_ends(tmp_path):
    def refused():
        command = [sys.executable, "-c", HOLD, str(tmp_path)]
        return subprocess.run(command, capture_output=True, text=True, check=False).returncode != 0

    with alone_in(tmp_path):
        with alone_in(tmp_path / "."):
            pass
        assert refused()
    assert not (tmp_path / LOCK).exists()
    assert not refused()


def test_one_of_many_gets_it(tmp_path):
    """Nobody holds a file that the holder before has deleted."""
    given = [sys.executable, "-c", WITH + COUNT, str(tmp_path)]
    processes = [subprocess.Popen(given, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    for process in processes:
        told, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        assert int(told) > 0


def test_a_file_that_its_holder_deleted_meanwhile_is_no_lock(tmp_path, monkeypatch):
    taken = []

    def after_the_holder_has_ended(file, how, real=fcntl.lockf):
        if not taken:
            (tmp_path / LOCK).unlink()
        taken.append(file)
        real(file, how)

    monkeypatch.setattr("lte.training.lock.fcntl.lockf", after_the_holder_has_ended)
    with alone_in(tmp_path):
        assert len(taken) == 2
        assert (tmp_path / LOCK).exists()


def test_where_there_are_no_locks_a_warning_says_so(tmp_path, monkeypatch, caplog):
    def refuse(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr("lte.training.lock.fcntl.lockf", refuse)
    with alone_in(tmp_path):
        pass
    assert "cannot be locked (No locks available)" in caplog.text


def test_a_system_without_locks_says_so(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("lte.training.lock.fcntl", None)
    with alone_in(tmp_path):
        assert not (tmp_path / LOCK).exists()
    assert "cannot be locked on this system" in caplog.text


def test_it_ends_with_an_error(tmp_path):
    with pytest.raises(RuntimeError), alone_in(tmp_path):
        raise RuntimeError
    assert not (tmp_path / LOCK).exists()


def test_a_folder_that_it_made_is_not_left_empty(tmp_path):
    with alone_in(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b").is_dir()
    assert not (tmp_path / "a").exists()
    with alone_in(tmp_path / "a" / "b"):
        (tmp_path / "a" / "mine.txt").touch()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["mine.txt"]
