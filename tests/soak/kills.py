"""Kill and resume: training is killed, several times maybe, and resumed until it ends as the run that was not killed.

``python kills.py SEED NUMBER FOLDER`` makes one trial in FOLDER.
"""

import hashlib
import json
import shutil
import sys
from pathlib import Path
from random import Random
from typing import Any

import corpus
from corpus import COMMON, EXPERTS, MIDDLE, TARGET
from forked import Commands, Death, Ran
from verdicts import Trial, failed

RUNS = tuple(
    f"--model {options}"
    for options in (
        f"dense {TARGET} {EXPERTS} {MIDDLE}",
        f"dense {TARGET} {EXPERTS} {MIDDLE} --save-total-limit 1",
        f"dense {TARGET} {EXPERTS} {MIDDLE} --save-total-limit 2 --gradient-accumulation-steps 2",
        f"dense {TARGET} {EXPERTS} {MIDDLE} --compensation-rank 4 --distillation-weight 0",
        f"dense {TARGET} {EXPERTS} {MIDDLE} --feature-distillation-weight 1 --distillation-weight 0",
        f"dense {TARGET} {EXPERTS} {MIDDLE} --compensation-rank 4 --feature-distillation-weight 0.5",
        f"dense {TARGET} {EXPERTS} --max-steps 11 --save-steps 1 --restart-hard True --hard-fraction 0.3",
        f"dense {TARGET} {EXPERTS} --max-steps 10 --save-steps 3 --dense-fraction 0 --router-start random",
        f"dense {TARGET} {EXPERTS} --max-steps 10 --save-steps 5 --dense-fraction 0.6 --optim adafactor",
        f"dense {TARGET} {EXPERTS} --num-train-epochs 1 --save-strategy epoch --gradient-accumulation-steps 2",
        f"dense {TARGET} {EXPERTS} --num-train-epochs 2 --save-steps 0.2 --lr-scheduler-type constant",
        f"dense {TARGET} --expert-size 8 --grouping coactivation {MIDDLE} --lr-scheduler-type cosine",
        f"dense {TARGET} --expert-size 16 --grouping coactivation {MIDDLE} --bf16 --gradient-checkpointing True",
        f"dense {TARGET} {EXPERTS} {MIDDLE} --eval-strategy steps --eval-steps 2 --weight-decay 0.1",
        f"dense {TARGET} {EXPERTS} {MIDDLE} --dataloader-num-workers 1 --max-grad-norm 0.1",
        f"dense --recipe paper --eta 0.5 {EXPERTS} {MIDDLE}",
        f"dense --recipe paper --eta 2 {EXPERTS} {MIDDLE} --dense-fraction 0 --hard-fraction 0.5",
        f"dense --recipe paper --eta 1 {EXPERTS} {MIDDLE} --distillation-weight 0.5 --save-total-limit 1",
        f"dense --recipe dense {EXPERTS} {MIDDLE}",
        f"dense --recipe dense {EXPERTS} {MIDDLE} --eval-strategy steps --eval-steps 2 --load-best-model-at-end"
        " --calibration-text rows.csv --save-total-limit 1",
        f"sparse {TARGET} {EXPERTS} --compensation-rank 2 {MIDDLE} --dense-fraction 0",
        *(
            f"dense --method {method} {TARGET} {options} {MIDDLE}"
            for method, options in {
                "topk-moe": EXPERTS,
                "noisy-topk": EXPERTS,
                "sigma-moe": EXPERTS,
                "moefication": "--expert-size 8",
                "deja-vu": "--expert-size 8",
                "cats": "",
                "static-pruning": "",
                "relufication": "",
            }.items()
        ),
        f"classifier --task classification --text rows.csv {TARGET} {EXPERTS} {MIDDLE}",
        f"dense --task generation --text pairs.jsonl {TARGET} {EXPERTS} {MIDDLE} --seed 7",
        f"dense {TARGET} {EXPERTS} {MIDDLE} --save-strategy steps --neftune-noise-alpha 5 --adam-beta2 0.95",
    )
)


class Kills:
    def __init__(self, whole: Path, scratch: Path, commands: Commands, seed: int = 0) -> None:
        self.whole, self.scratch, self.commands, self.seed = whole, scratch, commands, seed
        self._undisturbed: dict[str, tuple[Any, Ran]] = {}

    def trial(self, number: int) -> Trial:
        """One run, which the number chooses, killed up to three times; then it is resumed, and resumed once more."""
        chance = Random(f"{self.seed}:{number}")
        options = RUNS[number % len(RUNS)]
        expected, run = self._whole_run(options)
        folder = self._folder("killed")
        killed, argv = [], _argv(options)
        for _ in range(chance.choice((1, 1, 1, 2, 3))):
            death = _death(chance, run)
            ran = self.commands.run(argv, folder, death=death)
            if ran.code == 0:
                break
            killed.append(_in_words(death))
            if ran.code > 0 or ran.hung:
                return Trial("kill", number, f"{options}; {', '.join(killed)}", *failed(ran))
            argv = [*_argv(options), "--resume"]
        done = f"{options}; killed {', '.join(killed) or 'too late'}"
        for what in ("resumed", "resumed once more"):
            ran = self.commands.run([*_argv(options), "--resume"], folder)
            if ran.code:
                return Trial("kill", number, done, *failed(ran))
            if wrong := differences(expected, made(folder / "out")):
                return Trial("kill", number, done, "silent", f"{what}: {wrong}")
        return Trial("kill", number, done, "same")

    def _whole_run(self, options: str) -> tuple[Any, Ran]:
        if options not in self._undisturbed:
            folder = self._folder("undisturbed")
            ran = self.commands.run(_argv(options), folder)
            assert ran.code == 0, f"lte {' '.join(_argv(options))}: {ran.err}"
            self._undisturbed[options] = made(folder / "out"), ran
        return self._undisturbed[options]

    def _folder(self, name: str) -> Path:
        """An empty folder that sees the models and data by links."""
        folder = self.scratch / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for path in self.whole.iterdir():
            (folder / path.name).symlink_to(path)
        return folder


def _argv(options: str) -> list[str]:
    return [*COMMON.split(), *options.split()]


def _death(chance: Random, run: Ran) -> Death:
    """At a random time, at a random operation on files, or in the middle of a write after one."""
    kind = chance.choice(("time", "operation", "write"))
    if kind == "time":
        return Death(seconds=chance.uniform(0, 1.05 * run.seconds))
    size = chance.choice((0, 1, 100, 4096, 50_000, 150_000)) if kind == "write" else None
    return Death(operation=chance.randint(1, run.operations), size=size)


def _in_words(death: Death) -> str:
    if death.seconds is not None:
        return f"after {death.seconds:.2f} s"
    at = f"at operation {death.operation}"
    return at if death.size is None else f"by a write beyond {death.size} bytes after operation {death.operation}"


def made(folder: Path) -> dict[str, Any]:
    """The files of a finished run, checkpoints by name only; of its summary, what it measured."""
    made: dict[str, Any] = {}
    for path in sorted(folder.iterdir()):
        made[path.name] = path.is_dir() or hashlib.sha256(path.read_bytes()).hexdigest()
    summary = json.loads((folder / "lte_training.json").read_text())
    made["lte_training.json"] = [summary[name] for name in ("evaluation", "steps", "method", "eta", "seed")]
    return made


def differences(expected: dict[str, Any], made: dict[str, Any]) -> str:
    return ", ".join(sorted(name for name in {**expected, **made} if expected.get(name) != made.get(name)))


def main(seed: str, number: str, folder: str) -> None:
    whole, scratch = Path(folder, "whole").resolve(), Path(folder)
    with Commands() as commands:
        if not whole.is_dir():
            whole.mkdir(parents=True)
            corpus.build(whole, commands)
        print(Kills(whole, scratch, commands, int(seed)).trial(int(number)))
    print(f"its files: {scratch / 'killed'}")


if __name__ == "__main__":
    main(*sys.argv[1:])
