"""``lte train``: a checkpoint and data in, a trained sparse model out. Options, or a YAML recipe that they override."""

import itertools
import json
import re
import shlex
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields, is_dataclass, make_dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Annotated, Any, cast, get_args, get_type_hints

import torch
import transformers
import tyro
import yaml
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import EvalPrediction, PreTrainedModel, set_seed

from lte import __version__
from lte.cli.console import err, print_json, track
from lte.cli.eval_tables import show
from lte.cli.main import parse
from lte.cli.method_options import chosen, method_in, with_method
from lte.cli.options import DataOptions, DeviceOptions, check_folder, pad_alike_
from lte.cli.progress import train_with_progress
from lte.data.batches import split_held_out
from lte.evaluation.evaluate import evaluate, label_metrics
from lte.files import write_whole
from lte.saving import saving
from lte.surgery.convert import densify, sparsify_
from lte.surgery.families import check_family
from lte.surgery.loading import class_names_of, load_config, load_model, load_tokenizer
from lte.surgery.method import Method
from lte.training.arguments import LTETrainingArguments
from lte.training.checks import check_dtype
from lte.training.lock import alone_in
from lte.training.trainer import LTETrainer

SUMMARY = "lte_training.json"
ELSEWHERE = ("target_sparsity", "seed")
"""Options of methods that are training's, too."""


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
    """The options that every method has. Those of one method are added."""

    model: str
    """A local folder, a hub id, or a .gguf file; dense, or already sparse."""
    training: TrainArguments
    data: DataOptions = field(default_factory=DataOptions)
    where: DeviceOptions = field(default_factory=DeviceOptions)
    eval_text: tuple[str, ...] = ()
    """Held-out data, evaluated once training is over; without it, part of --text is held out."""
    calibration_text: tuple[str, ...] = ()
    """Data to set thresholds on, best a sample of what the model will see; without it, rows of --text. Classes and
    numbers it need not have, unless there are evaluations during training (--eval-strategy): these are on all of it;
    without it, on what is evaluated after training."""
    held_out: float = 0.02
    """How much of --text is held out: a fraction, or from 1 a number of rows (blocks)."""
    method: Annotated[
        str,
        tyro.conf.arg(
            help="Trains routers: lte, topk-moe, noisy-topk, sigma-moe. Fine-tunes before and after making sparse: "
            "moefication, deja-vu, cats, static-pruning, relufication. --method NAME --help shows its options."
        ),
    ] = "lte"
    resume: bool = False
    """Go on from the last whole checkpoint in the output folder, if there is one."""
    json: bool = False
    """Print one JSON object on the last line."""


def main(argv: Sequence[str]) -> None:
    options = parse_train(argv)
    result = train(options, argv)
    show(result["evaluation"])
    if options.json:
        print_json({**result, "evaluation": asdict(result["evaluation"])})


def parse_train(argv: Sequence[str]) -> Train:
    """``[RECIPE.yaml] [OPTIONS]``: a recipe's keys are options by their names; options given later win.

    Where another method than the recipe's is given, the recipe's options of its method are left out.
    """
    arguments = list(argv)
    if arguments and arguments[0].endswith((".yaml", ".yml")):
        arguments = [*recipe_arguments(Path(arguments[0]), arguments[1:]), *arguments[1:]]
    arguments = _switches(arguments)
    given = [value for flag, value in pairwise(arguments) if flag == "--device"]
    given += [one.removeprefix("--device=") for one in arguments if one.startswith("--device=")]
    if given == ["cpu"] or (given in ([], ["auto"]) and not torch.cuda.is_available()):
        arguments.append("--use-cpu")  # must be known while parsing: bf16 without a GPU is refused otherwise
    with_methods = with_method(Train, method_in(arguments), ELSEWHERE)
    arguments = ["--output-dir" if one in ("-o", "--output") else one for one in arguments]
    options = parse(with_methods, "train", arguments)
    check_folder(options.training.output_dir, options.model, "give another one with -o")
    return options


def recipe_arguments(path: Path, given: Sequence[str] = ()) -> list[str]:
    """The options a YAML recipe stands for, when these are given beside it.

    Raises:
        ValueError: not a YAML mapping from option names to values.
    """
    try:
        text = path.read_text(encoding="utf-8")
        recipe, written = yaml.safe_load(text), yaml.load(text, yaml.BaseLoader)  # as YAML takes it, and as it is there
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    if not isinstance(recipe, dict):
        raise ValueError(f"{path} must map option names to values, e.g. max_steps: 600")
    its_method = Method.named(written.get("method", Train.method))
    replaced = method_in(given, its_method.name) is not its_method
    left_out = {"method", *its_method.options()} - {*ELSEWHERE} if replaced else set()
    arguments, hints = [], _hints(Train)
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


def _as_argument(value: Any, text: Any, hint: Any) -> str:
    """A value of a recipe for an option of this type: a name that YAML takes for something else, as it is written."""
    types = set(get_args(hint)) or {hint}
    numbers = types <= {bool, int, float, NoneType}
    return str(value) if numbers or not isinstance(text, str) or (isinstance(value, bool) and bool in types) else text


def _switches(arguments: list[str]) -> list[str]:
    """``--bf16 False`` and ``--no-bf16`` are the same, whichever an option has: that is another one from one version of
    transformers to the next."""
    hints, found = _hints(Train), list[str]()
    for one in itertools.chain.from_iterable(re.split(r"=(?=(?:True|False)$)", one) for one in arguments):
        before = found[-1] if found else ""
        if one in ("True", "False") and hints.get(before[2:].replace("-", "_")) is bool and before.startswith("--"):
            found[-1] = before if one == "True" else f"--no-{before[2:]}"
        elif one.startswith("--no-") and hints.get(one[5:].replace("-", "_")) not in (None, bool):
            found += [f"--{one[5:]}", "False"]
        else:
            found.append(one)
    return found


def _hints(cls: type) -> dict[str, Any]:
    """The types of a dataclass's fields and of those of the dataclasses in it, by name."""
    hints = get_type_hints(cls)
    inner = [_hints(hint) for hint in hints.values() if is_dataclass(hint) and isinstance(hint, type)]
    return {name: hint for one in [hints, *inner] for name, hint in one.items()}


def train(options: Train, argv: Sequence[str]) -> dict[str, Any]:
    """Convert, train, save and evaluate; give what the summary file holds.

    Raises:
        ValueError: another run uses the output folder, and all that ``LTETrainer`` refuses.
    """
    args = options.training
    with alone_in(cast(str, args.output_dir)) if args.process_index == 0 else nullcontext():
        return _train(options, argv)


def _train(options: Train, argv: Sequence[str]) -> dict[str, Any]:
    args = options.training
    set_seed(args.seed)
    target = {} if args.target_sparsity is None else {"target_sparsity": args.target_sparsity}
    method = chosen(options, seed=args.seed, **target)
    device, dtype = options.where.resolve()
    check_dtype(dtype)
    config = load_config(options.model, options.where.trust_remote_code)
    tokenizer = load_tokenizer(options.model, options.where.trust_remote_code)
    if args.load_best_model_at_end and not options.calibration_text:
        raise ValueError(
            "load_best_model_at_end would choose by the data of the final evaluation: give --calibration-text FILE"
        )
    train_set, held_out, calibration = _load_data(options, config, tokenizer)
    model = _load_sparse(options, method, config, device, dtype, train_set)
    trainer = LTETrainer(
        model=model,
        args=args,
        train_dataset=train_set,
        calibration_dataset=None if calibration is None else calibration.head(args.calibration_rows),
        eval_dataset=held_out if calibration is None else calibration,
        data_collator=train_set.collator,
        processing_class=tokenizer,
        **_metrics(options.data.task),
    )
    train_with_progress(trainer, options.resume or args.resume_from_checkpoint)
    folder = Path(cast(str, args.output_dir))
    if args.should_save:
        (folder / SUMMARY).unlink(missing_ok=True)  # of another model, until this one is evaluated
    if not args.is_dense:
        trainer.save_model(str(folder))
    elif args.should_save:  # a plain checkpoint, that any method can convert
        with saving(folder) as fresh:
            densify(model).save_pretrained(fresh)
            tokenizer.save_pretrained(fresh)
    batch_size = args.per_device_eval_batch_size
    result = evaluate(model, held_out, batch_size, progress=lambda batches: track(batches, "evaluating"))
    summary = {
        "command": shlex.join(["lte", "train", *argv]),
        "environment": environment(device),
        "seed": args.seed,
        "recipe": args.recipe,
        "method": trainer.method.to_dict(),
        "target_sparsity": args.target_sparsity,
        "eta": trainer.training.state().get("eta", 0.0),
        "steps": asdict(trainer.stages.plan),
        "evaluation": result,
    }
    if args.should_save:
        write_whole(folder / SUMMARY, json.dumps({**summary, "evaluation": asdict(result)}, indent=2) + "\n")
    return summary


def environment(device: torch.device) -> dict[str, str]:
    """Where a number was measured."""
    return {
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"cpu, {torch.get_num_threads()} threads",
        "lte": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _load_data(options: Train, config: Any, tokenizer: Any) -> tuple[Any, Any, Any]:
    """Training, held-out and calibration data (None: the trainer keeps rows out)."""
    load = partial(options.data.load, tokenizer=tokenizer, model_config=config, new_head=True)
    data = load(options.data.text)
    trained_on = class_names_of(config)
    fits = options.data.task == "classification" and trained_on and set(data.class_names) <= set(trained_on)
    if fits and options.data.data.class_names is None:
        data = load(options.data.text, data=replace(options.data.data, class_names=trained_on))
    like_data = replace(options.data.data, class_names=data.class_names)
    calibration = None
    if options.calibration_text:
        evaluated = options.training.eval_strategy != "no"  # otherwise thresholds are all that is set on it
        calibration = load(options.calibration_text, data=like_data, labelled=evaluated)
    if options.eval_text:
        train_set, held_out = data, load(options.eval_text, data=like_data)
    else:
        train_set, held_out = split_held_out(data, options.held_out, options.training.seed)
    return train_set, held_out, calibration


def _metrics(task: str) -> dict[str, Any]:
    """What ``Trainer`` measures beside the loss where rows have labels; ``--metric-for-best-model`` can name it."""
    if task not in ("classification", "regression"):
        return {}

    def measured(predictions: EvalPrediction) -> dict[str, float]:
        found = label_metrics(torch.as_tensor(predictions.predictions).float(), torch.as_tensor(predictions.label_ids))
        return {name: value for name, value in found.items() if name not in ("loss", "perplexity")}

    def logits_of(outputs: Any, _labels: Tensor) -> Tensor:
        return outputs[0] if isinstance(outputs, tuple) else outputs

    return {"compute_metrics": measured, "preprocess_logits_for_metrics": logits_of}


def _load_sparse(
    options: Train, method: Method, config: Any, device: torch.device, dtype: Any, train_set: Any
) -> PreTrainedModel:
    check_family(config)
    class_names, labels = train_set.class_names, {}
    if class_names is not None:
        labels = {"num_labels": len(class_names), "id2label": dict(enumerate(class_names))}
        labels["label2id"] = {name: index for index, name in enumerate(class_names)}
        one = options.data.task == "regression"  # a checkpoint may remember what it was trained for before
        labels["problem_type"] = "regression" if one else "single_label_classification"
    with err.status("loading the model"):
        head = options.data.head(config, new=True)
        trusted = {"trust_remote_code": options.where.trust_remote_code}
        model = load_model(options.model, head, torch.float32 if dtype == "auto" else dtype, **trusted, **labels)
        model.to(device)  # pyright: ignore[reportArgumentType]
    pad_alike_(model, train_set)
    if not hasattr(model.config, "lte"):
        batches, grouped = None, options.training.dense_fraction == 0  # else the trainer does, after the dense stage
        if method.needs_activations and grouped:
            batches = DataLoader(train_set, batch_size=1, shuffle=True, collate_fn=train_set.collator)
        progress = partial(track, description="grouping neurons")
        sparsify_(model, method, batches, progress, fit=False, grouped=grouped)
    elif (made_by := model.config.lte["method"]) != method.name:
        raise ValueError(f"{options.model} was made sparse by {made_by}: give --method {made_by}, or the dense model")
    return model
