"""Programs of a model: what passes, what is stopped, and what they cannot reach."""

import os
import subprocess
import time

import pytest

from lte.evaluation.programs import CodeEval, _apart, runs

APART = pytest.mark.skipif(not _apart(), reason="namespaces are not allowed here")


@pytest.mark.parametrize(
    ("program", "passes"),
    [
        ("assert sum([1, 2]) == 3", True),
        ("print('much ' * 1000)\nimport math, typing, collections", True),
        ("assert sum([1, 2]) == 4", False),
        ("def f(:", False),
        ("import sys\nsys.exit(0)", False),
        ("import os\nos._exit(0)", False),
        ("input()", False),
        ("if __name__ == '__main__':\n    assert False", True),
        ("x = bytearray(2**32)", False),
        ("open('large', 'wb').write(bytes(2**22))", False),
        ("import os\nassert os.listdir() == []\nopen('small', 'w').write('x')", True),
        ("import os\nassert 'LTE_SECRET' not in os.environ", True),
        ("'\ud800'", True),
    ],
)
def test_what_passes(program, passes, monkeypatch):
    monkeypatch.setenv("LTE_SECRET", "x")
    assert runs(program) == passes


def test_an_endless_program_is_stopped():
    began = time.monotonic()
    assert not runs("while True:\n    try:\n        while True: pass\n    except BaseException: pass")
    assert time.monotonic() - began < 8


@APART
def test_no_network():
    assert runs(
        "import socket\ntry:\n    socket.create_connection(('127.0.0.1', 9), 1)\n"
        "except OSError as error:\n    assert error.errno == 101, error  # no route\nelse:\n    assert False"
    )


@APART
def test_no_process_outlives_its_program():
    mark = f"LTE_MARK_{os.getpid()}"
    program = f"import os, sys\nif os.fork() == 0:\n    os.setsid()\n    os.execvp('sleep', ['{mark}', '60'])"
    runs(program)
    seen = subprocess.run(["ps", "axo", "args"], capture_output=True, text=True, check=True).stdout
    assert mark not in seen


def test_pass_at_k():
    """With n programs and c right ones, one of k passes by 1 - C(n - c, k) / C(n, k)."""
    tests = ["assert x == 1", "assert x == 2"]
    rates, passed = CodeEval().compute(tests, [["x = 1", "x = 2", "x = 3"], ["x = 2", "x = 2", "x = 1"]], k=[1, 2, 10])
    assert passed == {0: [True, False, False], 1: [True, True, False]}
    assert rates == {"pass@1": pytest.approx((1 / 3 + 2 / 3) / 2), "pass@2": pytest.approx((2 / 3 + 1) / 2)}
