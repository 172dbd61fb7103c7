from collections.abc import Iterator
from pathlib import Path

import corpus
import pytest
from forked import Commands
from verdicts import Trial, table

_KEY = "trial"


@pytest.fixture(scope="session")
def commands() -> Iterator[Commands]:
    with Commands() as opened:
        yield opened


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory, commands: Commands) -> Path:
    """The files of :mod:`corpus`."""
    folder = tmp_path_factory.mktemp("whole")
    corpus.build(folder, commands)
    return folder


@pytest.fixture
def judge(request: pytest.FixtureRequest):
    """Notes trials for the table at the end; a test with one that is not good fails and shows these."""

    def noted(trials: Iterator[Trial]) -> None:
        bad = []
        for one in trials:
            request.node.user_properties.append((_KEY, (one.kind, one.verdict)))
            if not one.good:
                bad.append(str(one))
                print(one, flush=True)
        assert not bad, f"{len(bad)} trials:\n" + "\n".join(bad[:50])

    return noted


def pytest_terminal_summary(terminalreporter) -> None:
    found = [
        Trial(kind, 0, "", verdict)
        for reports in terminalreporter.stats.values()
        for report in reports
        if getattr(report, "when", "") == "call"
        for key, (kind, verdict) in [one for one in report.user_properties if one[0] == _KEY]
    ]
    if found and terminalreporter.config.option.markexpr == "soak":
        terminalreporter.section("soak")
        terminalreporter.write_line(table(found))
