"""Full disks: a command that cannot write all of its output says so in a line, and what was there before is whole.

The disk is full where a file reaches a size (a limit of the process), or, for root, where a small file system ends.
"""

import hashlib
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random

from corpus import COMMON, EXPERTS, MIDDLE, TARGET
from forked import Commands, Ran
from verdicts import Trial, failed

TEXT = "--text text.txt --sequence-length 32"
OTHER = f"--model dense {EXPERTS} --tau 0.4 -o disk/new"


@dataclass(frozen=True)
class Writer:
    """A command that writes into ``disk``, and commands that left something there before."""

    command: str
    before: tuple[str, ...] = ()
    resumes: bool = False


_SPARSE = f"calibrate sparse --target-sparsity 0.6 {TEXT} -o disk/new"
WRITERS = (
    Writer(f"sparsify --model dense {EXPERTS} -o disk/new", (f"sparsify {OTHER}",)),
    Writer("prune --model dense --method magnitude -o disk/new", (f"sparsify {OTHER}",)),
    Writer(f"calibrate sparse --target-sparsity 0.4 {TEXT} -o disk/new", (_SPARSE,)),
    Writer(f"calibrate disk/new --target-sparsity 0.4 {TEXT} --in-place", (_SPARSE,)),
    Writer("report results.jsonl -o disk/page.html --format html,md", ("report old.jsonl -o disk/page.html",)),
    Writer(
        "eval dense --task generation --text pairs.jsonl --generate --max-new-tokens 2 --max-rows 4"
        " --predictions disk/said.jsonl",
        (
            "eval dense --task generation --text pairs.jsonl --generate --max-new-tokens 3 --max-rows 5"
            " --predictions disk/said.jsonl",
        ),
    ),
    Writer(f"{COMMON} --model dense {TARGET} {EXPERTS} {MIDDLE} -o disk/new", resumes=True),
    Writer(f"{COMMON} --model dense --recipe dense {EXPERTS} {MIDDLE} -o disk/new", resumes=True),
)


class Disks:
    def __init__(self, whole: Path, scratch: Path, commands: Commands, seed: int = 0) -> None:
        self.whole, self.scratch, self.commands, self.seed = whole, scratch, commands, seed
        self._done: dict[Writer, dict[str, str]] = {}

    def trial(self, number: int) -> Trial:
        """One command on a disk that is full at a place which the seed and the number choose."""
        chance = Random(f"{self.seed}:{number}")
        writer = WRITERS[number % len(WRITERS)]
        expected, sizes = self._whole_run(writer)
        size = chance.choice(sizes)
        limit = chance.choice((0, 1, size - 1, size // 2, chance.randrange(max(sizes))))
        with self._disk(writer) as folder:
            before = _files(folder / "disk")
            ran = self.commands.run(writer.command.split(), folder, largest=limit)
            return self._judge(
                writer, number, f"{writer.command}; files of {limit} bytes", ran, folder, before, expected
            )

    def small(self, number: int) -> Trial:
        """The same on a file system that has room for a part of the new files only."""
        chance = Random(f"{self.seed}:{number}")
        writer = WRITERS[number % len(WRITERS)]
        expected, sizes = self._whole_run(writer)
        share = chance.random()
        with self._disk(writer, share * sum(sizes)) as folder:
            before = _files(folder / "disk")
            ran = self.commands.run(writer.command.split(), folder)
            done = f"{writer.command}; room for {share:.0%}"
            return self._judge(writer, number, done, ran, folder, before, expected)

    def _judge(
        self,
        writer: Writer,
        number: int,
        done: str,
        ran: Ran,
        folder: Path,
        before: dict[str, str],
        expected: dict[str, str],
    ) -> Trial:
        verdict, why = failed(ran) if ran.code else ("same", "")
        if verdict == "refused" and writer.resumes:
            if (folder / "disk").is_mount():
                subprocess.run(["mount", "-o", "remount,size=1g", folder / "disk"], check=True)
            ran = self.commands.run([*writer.command.split(), "--resume"], folder)
            if ran.code:
                verdict, why = failed(ran)
            elif wrong := _differences(expected, _files(folder / "disk")):
                verdict, why = "silent", f"resumed: {wrong}"
        elif verdict == "refused":
            if wrong := _differences(before, _files(folder / "disk")):
                verdict, why = "silent", f"refused, but the old output is not as it was: {wrong}"
        elif verdict == "same" and (wrong := _differences(expected, _files(folder / "disk"))):
            verdict, why = "silent", wrong
        return Trial("full disk", number, done, verdict, why)

    def _whole_run(self, writer: Writer) -> tuple[dict[str, str], list[int]]:
        """What the command makes where there is room, and the sizes of its files."""
        with self._disk(writer) as folder:
            ran = self.commands.run(writer.command.split(), folder)
            assert ran.code == 0, f"{writer.command}: {ran.err}"
            sizes = sorted({path.stat().st_size for path in (folder / "disk").rglob("*") if path.is_file()})
            return _files(folder / "disk"), sizes

    @contextmanager
    def _disk(self, writer: Writer, room: float | None = None) -> Iterator[Path]:
        """A folder with the models and data, and ``disk`` with what was there before.

        Args:
            room: bytes left on ``disk``, which is a file system of its own.
        """
        folder = self.scratch / "disks"
        shutil.rmtree(folder, ignore_errors=True)
        disk = folder / "disk"
        disk.mkdir(parents=True)
        for path in self.whole.iterdir():
            (folder / path.name).symlink_to(path)
        rows = (self.whole / "results.jsonl").read_text().splitlines(keepends=True)
        (folder / "old.jsonl").write_text("".join(rows[:2]))
        for command in writer.before:
            ran = self.commands.run(command.split(), folder)
            assert ran.code == 0, f"{command}: {ran.err}"
        if room is None:
            yield folder
            return
        held = folder / "held"
        disk.rename(held)
        disk.mkdir()
        pages = sum(-(-path.stat().st_size // 4096) + 1 for path in held.rglob("*"))
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={pages * 4096 + int(room)}", "full", disk], check=True)
        try:
            shutil.copytree(held, disk, dirs_exist_ok=True)
            shutil.rmtree(held)
            yield folder
        finally:
            subprocess.run(["umount", "-l", disk], check=False, capture_output=True)


def can_mount(folder: Path) -> bool:
    """Whether this process may mount a file system: it is root, and not in a container that forbids it."""
    try:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4096", "full", folder], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        return False
    subprocess.run(["umount", folder], check=True)
    return True


def _files(folder: Path) -> dict[str, str]:
    """Names and digests; a finished run's checkpoints and summary, which names its command, by name only."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        by_name = path.is_dir() or "checkpoint-" in name or path.name == "lte_training.json"
        found[name] = "" if by_name else hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def _differences(expected: dict[str, str], found: dict[str, str]) -> str:
    changed = [name for name in sorted({**expected, **found}) if expected.get(name) != found.get(name)]
    how = {name: "gone" if name not in found else "changed" if name in expected else "new" for name in changed}
    return ", ".join(f"{name} {what}" for name, what in how.items())
