"""``lte train``: trains a sparse model from a checkpoint and data. Options override those of a YAML recipe."""

import contextlib
import json
import logging
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, make_dataclass
from itertools import pairwise
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Annotated, Any, get_args

import torch
import tyro
import yaml

from lte.cli.console import print_json
from lte.cli.eval_tables import show
from lte.cli.failures import UsageError
from lte.cli.main import parse
from lte.cli.method_options import chosen, method_in, with_method
from lte.cli.options import DeviceOptions, as_written, check_folder
from lte.cli.switches import hints_of, switches
from lte.evaluation.inputs import Inputs
from lte.surgery.method import Method
from lte.surgery.training_options import DENSE, check_target
from lte.training.arguments import LTETrainingArguments

if TYPE_CHECKING:
    from lte.training.run import Trained, Watcher

logger = logging.getLogger(__name__)

ELSEWHERE = ("target_sparsity", "seed")
"""Options that a method and the training have in common."""


if TYPE_CHECKING:
    TrainArguments = LTETrainingArguments
else:
    # tyro takes a dict (as JSON) but not the dict[str, Any] that TrainingArguments declares, nor its parallelism_config
    TrainArguments = make_dataclass(
        "TrainArguments",
        [
            (
                one.name,
                dict | str | None if "dict[" in str(one.type) else tyro.conf.Suppress[tyro.conf.Fixed[Any]],
                field(default=one.default, metadata=one.metadata),
            )
            for one in fields(LTETrainingArguments)
            if "dict[" in str(one.type) or one.name == "parallelism_config"
        ],
        bases=(LTETrainingArguments,),
        namespace={"__module__": __name__},  # it is pickled with the model
    )


@dataclass
class Train:
    """The options of every method. Those of the chosen method are added."""

    model: str
    """A local folder, a hub id, or a .gguf file; dense or already sparse."""
    training: TrainArguments
    data: Inputs = field(default_factory=Inputs)
    where: DeviceOptions = field(default_factory=DeviceOptions)
    eval_text: tuple[str, ...] = ()
    """Held-out data, evaluated after training. Without it, a part of --text is held out."""
    calibration_text: tuple[str, ...] = ()
    """Data for thresholds; it should be like the text that the model will see. Without it, rows of --text are taken. It
    needs no labels, unless there are evaluations during training (--eval-strategy). These use all of this data, or
    without it the data of the last evaluation."""
    held_out: float = 0.02
    """The part of --text that is held out: a fraction, or from 1 on a number of rows (blocks)."""
    method: Annotated[
        str,
        tyro.conf.arg(
            help="Trains routers: lte, topk-moe, noisy-topk, sigma-moe. Fine-tunes before and after a conversion: "
            "moefication, deja-vu, cats, static-pruning, relufication. --method NAME --help shows its options."
        ),
    ] = "lte"
    resume: bool = False
    """Continue from the newest complete checkpoint in the output folder, if there is one."""
    dry_run: bool = False
    """Load model and data, show stages, parameters and an estimate of memory, and train nothing."""
    time_it: bool = False
    """With --dry-run: run a few steps of each stage and show the time of the whole run."""
    json: bool = False
    """Print one JSON object on the last line."""
    typed: tyro.conf.Suppress[tyro.conf.Fixed[tuple[str, ...]]] = ()


def main(argv: Sequence[str]) -> None:
    options = parse_train(argv)
    if options.time_it and not options.dry_run:
        raise UsageError("--time-it needs --dry-run")
    if options.dry_run:
        _plan(options, argv)
        return
    made = train(options, argv)
    show(made.evaluation)
    if options.json:
        print_json(made.summary)


def parse_train(argv: Sequence[str]) -> Train:
    """Return the options of ``[RECIPE.yaml] [OPTIONS]``. A recipe's keys are names of options. Later options win.

    If another method than the recipe's is given, the recipe's options of its method are left out. A typed
    ``--learning-rate`` is the rate of a dense run, whatever the recipe says of the dense stage.
    """
    arguments = list(argv)
    if arguments and arguments[0].endswith((".yaml", ".yml")):
        arguments = [*recipe_arguments(Path(arguments[0]), arguments[1:]), *arguments[1:]]
    arguments = switches(arguments, Train)
    given = [value for flag, value in pairwise(arguments) if flag == "--device"]
    given += [one.removeprefix("--device=") for one in arguments if one.startswith("--device=")]
    if given == ["cpu"] or (given in ([], ["auto"]) and not torch.cuda.is_available()):
        arguments.append("--use-cpu")  # needed for parsing: otherwise bf16 without a GPU is refused
    with_methods = with_method(Train, method_in(arguments), ELSEWHERE)
    arguments = ["--output-dir" if one in ("-o", "--output") else one for one in arguments]
    options = parse(with_methods, "train", arguments)
    check_folder(options.training.output_dir, options.model, "give another one with -o")
    names = [one.name for one in fields(method_in(arguments))]
    options.typed = tuple(name for name in names if _typed(arguments, name.replace("_", "-")) is not None)
    return options


def recipe_arguments(path: Path, given: Sequence[str] = ()) -> list[str]:
    """Return the options of a YAML recipe, for the options that are given besides it.

    Raises:
        ValueError: the file is no YAML mapping from option names to values.
    """
    try:
        text = path.read_text(encoding="utf-8")
        recipe, written = (
            yaml.safe_load(text),
            yaml.load(text, yaml.BaseLoader),
        )  # the values of YAML, and the text of the file
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    if not isinstance(recipe, dict):
        raise ValueError(f"{path} must map option names to values, e.g. max_steps: 600")
    its_method = Method.named(written.get("method", Train.method))
    replaced = method_in(given, its_method.name) is not its_method
    left_out = {"method", *its_method.options()} - {*ELSEWHERE} if replaced else set()
    arguments, hints = [], hints_of(Train)
    if _typed(given, "learning-rate") and not _typed(given, "dense-learning-rate"):
        rate = recipe.get("dense_learning_rate", recipe.get("dense-learning-rate"))
        if (_typed(given, "schedule") or _typed(given, "recipe") or recipe.get("schedule")) == DENSE:
            left_out |= {"dense_learning_rate"}  # a dense run has one rate, and it was typed
        elif rate is not None:
            logger.warning(
                "the dense stage keeps the learning rate %g of %s: --dense-learning-rate sets another", rate, path
            )
    for name, value in recipe.items():
        if str(name).replace("-", "_") in left_out:
            continue
        flag = f"--{str(name).replace('_', '-')}"
        if value is None:
            continue
        if isinstance(value, dict):
            arguments += [flag, json.dumps(value)]
        else:
            hint, plain = hints.get(str(name).replace("-", "_")), written.get(str(name), value)
            pairs = zip(value, plain, strict=True) if isinstance(value, list) else [(value, plain)]
            arguments += [flag, *(_as_argument(one, text, hint) for one, text in pairs)]
    return arguments


def _typed(arguments: Sequence[str], name: str) -> str | None:
    """Return the value that arguments give an option; the last one counts."""
    found = [value for flag, value in pairwise(arguments) if flag == f"--{name}"]
    found += [one.partition("=")[2] for one in arguments if one.startswith(f"--{name}=")]
    return found[-1] if found else None


def _as_argument(value: Any, text: Any, hint: Any) -> str:
    """Return a value of a recipe as an argument. A name that YAML reads as another type stays as it is written."""
    types = set(get_args(hint)) or {hint}
    numbers = types <= {bool, int, float, NoneType}
    return str(value) if numbers or not isinstance(text, str) or (isinstance(value, bool) and bool in types) else text


def _plan(options: Train, argv: Sequence[str]) -> None:
    from lte.cli.dry_run import DryRun, DryRunEnds

    shown = DryRun(options.time_it)
    with contextlib.suppress(DryRunEnds):
        train(options, argv, shown)
    if options.json:
        print_json(shown.found)


def train(options: Train, argv: Sequence[str], watcher: "Watcher | None" = None) -> "Trained":
    """Call :func:`lte.training.run.train` with these options, with bars and lines on the terminal."""
    from lte.cli.progress import OnTerminal  # imported after parsing: --help needs no trainer
    from lte.training.run import train as run

    args, inputs = options.training, as_written(options.data)
    if args.schedule == "default":
        check_target(args.target_sparsity)
    target = {} if args.target_sparsity is None else {"target_sparsity": args.target_sparsity}
    device, dtype = options.where.resolve()
    return run(
        options.model,
        chosen(options, seed=args.seed, **target),
        inputs.text,
        given=(*options.typed, *ELSEWHERE),
        task=inputs.task,
        data_config=inputs.data,
        eval_data=options.eval_text,
        calibration_data=options.calibration_text,
        held_out=options.held_out,
        resume=options.resume,
        device=device,
        dtype=dtype,
        trust_remote_code=options.where.trust_remote_code,
        watcher=watcher or OnTerminal(),
        command=shlex.join(["lte", "train", *argv]),
        args=args,
    )
