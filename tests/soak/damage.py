"""Damaged inputs: a command, one of its files changed, and whether the command can be trusted with that.

A case is a seed and a number: ``python damage.py SEED NUMBER FOLDER`` makes its files in FOLDER and runs it.
"""

import hashlib
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import corpus
from corpus import INTERRUPTED
from forked import Commands, Ran
from meaning import unseen
from mutations import damaged
from verdicts import Trial, failed

VOLATILE = ("seconds", "tokens_per_second", "environment", "command", "commit", "date")
LINES = ("--text", "text.txt", "--sequence-length", "32", "--max-rows", "4")
LABELLED = ("--task", "classification")


@dataclass(frozen=True)
class Subject:
    """A command, the files that are damaged (a name or a pattern), and what it writes (a folder or file)."""

    kind: str
    argv: tuple[str, ...]
    files: tuple[str, ...]
    inputs: tuple[str, ...]
    output: str | None = None

    def __str__(self) -> str:
        return f"lte {' '.join(self.argv)}"


def _eval(kind: str, model: str, *files: str) -> Subject:
    return Subject(kind, ("eval", model, *LINES, "--json"), files, (model, "text.txt"))


def _reads(name: str, *options: str, model: str = "dense") -> Subject:
    argv = ("eval", model, "--text", name, "--sequence-length", "32", *options, "--json")
    return Subject("data", argv, (name,), (model, name))


def _subjects() -> Iterator[Subject]:
    config, weights = ("config.json",), ("*.safetensors", "*.index.json")
    tokens = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
    prompt = ("--prompt", "the cat", "--max-new-tokens", "3", "--json")
    for model in ("dense", "sparse", "teal"):
        yield Subject("config", ("inspect", model, "--json"), config, (model,))
        yield Subject("config", ("generate", model, *prompt), (*config, "generation_config.json"), (model,))
        yield _eval("config", model, *config)
        yield _eval("weights", model, *weights)
    convert = ("sparsify", "--model", "dense", "--expert-size", "8", "--grouping", "random", "-o", "new")
    yield Subject("config", convert, (*config, "generation_config.json"), ("dense",), "new")
    yield Subject("weights", convert, weights, ("dense",), "new")
    yield _eval("weights", "sharded", *weights)
    classes = ("eval", "classifier", "--text", "rows.csv", *LABELLED, "--json")
    yield Subject("config", classes, config, ("classifier", "rows.csv"))
    yield Subject("weights", classes, weights, ("classifier", "rows.csv"))
    yield _eval("tokenizer", "dense", *tokens)
    yield Subject("tokenizer", ("generate", "dense", *prompt, "--chat"), tokens, ("dense",))
    for _ in range(2):
        yield Subject("gguf", ("inspect", "dense.gguf", "--json"), ("dense.gguf",), ("dense.gguf",))
        yield _eval("gguf", "dense.gguf", "dense.gguf")
    for name in ("text.txt", "text.txt.gz", "rows.jsonl", "rows.jsonl.gz", "rows.json", "rows.csv", "rows.tsv"):
        yield _reads(name)
    for name in ("rows.parquet", "ids.npy"):
        yield _reads(name)
    for name in ("rows.csv", "rows.tsv", "rows.jsonl"):
        yield _reads(name, *LABELLED, model="classifier")
    yield _reads("pairs.jsonl", "--task", "generation")
    yield _reads("chats.jsonl", "--task", "generation", "--messages", "messages")
    train = ("train", "recipe.yaml", "--model", "dense", "--json")
    yield Subject("recipe", train, ("recipe.yaml",), ("recipe.yaml", "dense", "text.txt"))
    resume = (*INTERRUPTED.split(), "--resume", "--json")
    for names in (("checkpoint-8/*",), ("lte_teacher/*", "run/*")):
        yield Subject("checkpoint", resume, names, ("dense", "text.txt", "run"), "run/model.safetensors")
    pages = ("report", "sparse", "sparser", "-o", "page.md", "--format", "md")
    yield Subject("results", pages, ("lte_training.json",), ("sparse", "sparser"), "page.md")
    for _ in range(3):
        report = ("report", "results.jsonl", "-o", "page.md", "--format", "md")
        yield Subject("results", report, ("results.jsonl",), ("results.jsonl",), "page.md")


SUBJECTS = tuple(_subjects())


class Damage:
    """Trials on a corpus, in a folder for scratch."""

    def __init__(self, whole: Path, scratch: Path, commands: Commands, seed: int = 0) -> None:
        self.whole, self.scratch, self.commands, self.seed = whole, scratch, commands, seed
        self._expected: dict[Subject, Any] = {}

    def trial(self, number: int) -> Trial:
        """Damage one file of one subject, which the seed and the number choose, and run its command."""
        chance = Random(f"{self.seed}:{number}")
        subject = SUBJECTS[number % len(SUBJECTS)]
        folder = self._copied(subject)
        found = sorted({path for name in subject.files for path in self._matching(folder, subject, name)})
        path = chance.choice(found)
        before = path.read_bytes()
        after, what = _damaged(path, before, chance)
        ran = self.commands.run([*subject.argv], folder)
        done = f"{path.relative_to(folder)}: {what}; {subject}"
        if ran.code:
            verdict, why = failed(ran)
            names = {path.name, *path.relative_to(folder).parts, *subject.inputs}
            if verdict == "refused" and subject.kind != "recipe" and not any(name in why for name in names):
                verdict = "unnamed"
            return Trial(subject.kind, number, done, verdict, why)
        with suppress(ValueError, OSError, IndexError):
            if (seen := _observed(subject, ran, folder)) == self.expected(subject):
                return Trial(subject.kind, number, done, "same")
            checked = path.parent.name.startswith("checkpoint-")  # every file of one has a fingerprint
            verdict = "unseen" if unseen(path.name, before, after) and not checked else "silent"
            return Trial(subject.kind, number, done, verdict, _difference(self.expected(subject), seen))
        return Trial(subject.kind, number, done, "silent", "exit code 0 without a result")

    def expected(self, subject: Subject) -> Any:
        """What the command gives where nothing is damaged."""
        if subject not in self._expected:
            folder = Path(tempfile.mkdtemp(dir=self.scratch))
            self._copy(subject, folder)
            ran = self.commands.run([*subject.argv], folder)
            assert ran.code == 0, f"{subject}: {ran.err}"
            self._expected[subject] = _observed(subject, ran, folder)
            shutil.rmtree(folder)
        return self._expected[subject]

    def _copied(self, subject: Subject) -> Path:
        folder = self.scratch / "case"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        self._copy(subject, folder)
        return folder

    def _copy(self, subject: Subject, folder: Path) -> None:
        for name in subject.inputs:
            copy = shutil.copytree if (self.whole / name).is_dir() else shutil.copy
            copy(self.whole / name, folder / name)

    @staticmethod
    def _matching(folder: Path, subject: Subject, name: str) -> list[Path]:
        paths = [path for one in subject.inputs for path in [folder / one, *(folder / one).rglob("*")]]
        return [path for path in paths if path.is_file() and path.match(name)]


def _damaged(path: Path, before: bytes, chance: Random) -> tuple[bytes | None, str]:
    """Damage a file in place, mostly what is in it."""
    kind = chance.choices(("inside", "gone", "folder", "loop"), (96, 2, 1, 1))[0]
    if kind == "inside":
        after, what = damaged(path.name, before, chance)
        while chance.random() < 0.15:
            with suppress(Exception):  # what is broken already cannot be changed as its format any more
                after, more = damaged(path.name, after, chance)
                what = f"{what}, then {more}"
        path.write_bytes(after)
        return after, what
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "loop":
        path.symlink_to(path.name)
    return None, {"gone": "missing", "folder": "is a folder", "loop": "a link to itself"}[kind]


def _observed(subject: Subject, ran: Ran, folder: Path) -> Any:
    """What a command has made: the JSON it printed, without times, and its files."""
    seen: dict[str, Any] = {}
    if "--json" in subject.argv:
        printed = json.loads(ran.out.splitlines()[-1])
        seen |= {name: value for name, value in printed.items() if name not in VOLATILE}
    if subject.output:
        path = folder / subject.output
        made = sorted(path.iterdir()) if path.is_dir() else [path]
        for one in [file for file in made if file.name != "generation_config.json"]:  # handed on as it is
            seen[one.name] = hashlib.sha256(one.read_bytes()).hexdigest()
    return json.loads(json.dumps(seen).replace("NaN", '"NaN"'))  # NaN is not itself


def _difference(expected: Any, seen: Any) -> str:
    names = [name for name in {**expected, **seen} if expected.get(name) != seen.get(name)]
    return ", ".join(f"{name} {str(expected.get(name))[:40]} -> {str(seen.get(name))[:40]}" for name in names[:3])


def main(seed: str, number: str, folder: str) -> None:
    whole, scratch = Path(folder, "whole"), Path(folder)
    with Commands() as commands:
        if not whole.is_dir():
            whole.mkdir(parents=True)
            corpus.build(whole, commands)
        print(Damage(whole, scratch, commands, int(seed)).trial(int(number)))
    print(f"its files: {scratch / 'case'}")


if __name__ == "__main__":
    main(*sys.argv[1:])
