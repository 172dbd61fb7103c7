"""Two processes in one folder: one of them is refused, and what the other makes is whole."""

import json
import shutil
import threading
import time
from pathlib import Path
from random import Random

from corpus import COMMON, EXPERTS, MIDDLE, TARGET
from forked import Commands, Ran
from kills import differences, made
from verdicts import Trial, failed

TRAINED = f"{COMMON} --model dense {TARGET} {EXPERTS} {MIDDLE}"
RIVALS = (f"{TRAINED} --seed 2", f"{TRAINED} --resume", f"{TRAINED} --seed 2 --resume", TRAINED)
SWEPT = f"sweep {TRAINED} --vary seed=1,2 -o out"


class Pairs:
    def __init__(self, whole: Path, scratch: Path, commands: tuple[Commands, Commands], seed: int = 0) -> None:
        self.whole, self.scratch, self.commands, self.seed = whole, scratch, commands, seed

    def trial(self, number: int) -> Trial:
        """Two trainings, the second one begun while the first runs: with other options, the same, or to resume it."""
        chance = Random(f"{self.seed}:{number}")
        rival = RIVALS[number % len(RIVALS)].split()
        alone = [self._alone(argv) for argv in (TRAINED.split(), rival)]
        wait = chance.uniform(0.2, 0.9) * alone[0][1].seconds
        folder = self._folder("pair")
        ran = self._both(TRAINED.split(), rival, folder, wait)
        done = f"{TRAINED} and after {wait:.1f} s {' '.join(rival[-3:])}"
        verdicts = [failed(one) if one.code else ("same", "") for one in ran]
        for verdict, why in verdicts:
            if verdict not in ("same", "refused"):
                return Trial("two trainings", number, done, verdict, why)
        ended = [expected for (verdict, _), (expected, _) in zip(verdicts, alone, strict=True) if verdict == "same"]
        if len(ended) != 1:
            why = f"{len(ended)} of the two ended well: {[why for _, why in verdicts]}"
            return Trial("two trainings", number, done, "silent", why)
        if wrong := differences(ended[0], made(folder / "out")):
            return Trial("two trainings", number, done, "silent", wrong)
        return Trial("two trainings", number, done, "refused", next(why for _, why in verdicts if why))

    def sweeps(self, number: int) -> Trial:
        """Two equal sweeps: each row is written once."""
        folder = self._folder("sweeps")
        ran = self._both(SWEPT.split(), SWEPT.split(), folder, 0.5)
        verdicts = [failed(one) if one.code else ("same", "") for one in ran]
        for verdict, why in verdicts:
            if verdict not in ("same", "refused"):
                return Trial("two sweeps", number, SWEPT, verdict, why)
        lines = (folder / "out" / "rows.jsonl").read_text().splitlines()
        rows = [json.loads(line)["run"]["seed"] for line in lines if "error" not in json.loads(line)]
        if sorted(rows) != ["1", "2"] or len(lines) != 2 or [one for one, _ in verdicts].count("refused") != 1:
            return Trial("two sweeps", number, SWEPT, "silent", f"rows of the seeds {rows}; {verdicts}")
        return Trial("two sweeps", number, SWEPT, "refused", next(why for _, why in verdicts if why))

    def _both(self, first: list[str], second: list[str], folder: Path, wait: float) -> list[Ran]:
        found: dict[int, Ran] = {}

        def run(index: int, argv: list[str]) -> None:
            found[index] = self.commands[index].run(argv, folder)

        threads = [threading.Thread(target=run, args=one) for one in enumerate((first, second))]
        threads[0].start()
        time.sleep(wait)
        threads[1].start()
        for one in threads:
            one.join()
        return [found[0], found[1]]

    def _alone(self, argv: list[str]) -> tuple[dict[str, object], Ran]:
        folder = self._folder("alone")
        ran = self.commands[0].run(argv, folder)
        assert ran.code == 0, ran.err
        return made(folder / "out"), ran

    def _folder(self, name: str) -> Path:
        folder = self.scratch / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for path in self.whole.iterdir():
            (folder / path.name).symlink_to(path)
        return folder
