"""What became of a trial, in one word, and the table of all of them."""

import collections
import re
import signal
from collections.abc import Iterable
from dataclasses import dataclass

from forked import Ran

VERDICTS = ("refused", "same", "unseen", "unnamed", "silent", "traceback", "hang", "crash")
GOOD = ("refused", "same", "unseen")


@dataclass(frozen=True)
class Trial:
    """One trial of a kind: its number, what was done, the verdict and what it rests on."""

    kind: str
    number: int
    done: str
    verdict: str
    why: str = ""

    @property
    def good(self) -> bool:
        return self.verdict in GOOD

    def __str__(self) -> str:
        return f"{self.kind} {self.number}: {self.verdict}: {self.done}: {self.why}"


def failed(ran: Ran) -> tuple[str, str]:
    """The verdict on a command that did not end well: refused, traceback, hang or crash, and its line."""
    last = next((line for line in reversed(ran.err.splitlines()) if line.strip()), "no line")
    if ran.hung or ran.code in (-signal.SIGXCPU, -signal.SIGKILL):
        return "hang", last
    if ran.code < 0:
        return "crash", signal.Signals(-ran.code).name
    errors = [line for line in ran.err.splitlines() if line.startswith("lte: error:")]
    if "Traceback (most recent call last)" in ran.err:
        places = re.findall(r'File "(\S+)", line (\d+)', ran.err)
        ours = [f"{path.split('/src/')[-1]}:{line}" for path, line in places if "/lte/" in path]
        return (
            "traceback",
            f"{last[:200]} [{ours[-1] if ours else '?'}; {places[-1][0].split('/')[-1]}:{places[-1][1]}]",
        )
    if ran.code == 2 and len(errors) == 1:
        return "refused", errors[0]
    return "traceback", f"exit code {ran.code} with {len(errors)} lines of error: {last}"


def table(trials: Iterable[Trial]) -> str:
    """Markdown: a line a kind, and one of all."""
    counted: dict[str, collections.Counter[str]] = {}
    for one in trials:
        counted.setdefault(one.kind, collections.Counter())[one.verdict] += 1
    if len(counted) > 1:
        counted["all"] = sum(counted.values(), collections.Counter())
    lines = [f"| kind | trials | {' | '.join(VERDICTS)} |", f"|---|{'---:|' * (len(VERDICTS) + 1)}"]
    for kind, found in counted.items():
        cells = [str(found.total()), *(str(found[one]) for one in VERDICTS)]
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    return "\n".join(lines)
