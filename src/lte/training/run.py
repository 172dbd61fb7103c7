"""A whole run: load a model and data, make the model sparse, train, save, evaluate. ``lte train`` calls it."""

import json
from collections.abc import Collection, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import EvalPrediction, PreTrainedModel, set_seed

from lte.argument_error import Argument, ArgumentError
from lte.data.batches import split_held_out
from lte.data.config import DataConfig
from lte.data.sources import Source, as_list
from lte.data.tasks import Task
from lte.evaluation.evaluate import Evaluation, evaluate, label_metrics
from lte.evaluation.inputs import Inputs, pad_alike_
from lte.evaluation.record import SUMMARY, Made
from lte.files import write_whole
from lte.saving import saving
from lte.surgery.conversion import conversion_of
from lte.surgery.convert import densify, install_routers_
from lte.surgery.experts import regroup_
from lte.surgery.families import check_family
from lte.surgery.loading import class_names_of, load_config, load_model, load_tokenizer
from lte.surgery.method import Method
from lte.training.arguments import LTETrainingArguments
from lte.training.checks import check_dtype
from lte.training.lock import alone_in
from lte.training.record import made_by_training, measured_in_training, names_of, run_record
from lte.training.trainer import LTETrainer


class Watcher:
    """Shows the progress of a run. This one shows what ``transformers.Trainer`` shows. Override its methods."""

    def waiting(self, what: str) -> AbstractContextManager[Any]:
        """Return a context for something that takes a while."""
        return nullcontext()

    def track(self, items: Iterable[Any], what: str) -> Iterable[Any]:
        """Give the items, one after the other."""
        return items

    def train(self, trainer: LTETrainer, resume: bool | str | None) -> None:
        trainer.train(resume_from_checkpoint=resume)


@dataclass
class Trained:
    """The result of a run.

    Attributes:
        model: as it was saved; with ``schedule="dense"`` the converted model that the saved plain one was made of.
        tokenizer: of the model.
        trainer: the trainer of the run.
        evaluation: on held-out data.
        summary: what ``lte_training.json`` holds.
    """

    model: PreTrainedModel
    tokenizer: Any
    trainer: LTETrainer
    evaluation: Evaluation
    summary: dict[str, Any]


def train(
    model: str,
    method: Method | None = None,
    data: Source | tuple[Source, ...] = (),
    output_dir: str | None = None,
    *,
    given: Collection[str] | None = None,
    task: Task = "language_modelling",
    data_config: DataConfig | None = None,
    eval_data: Source | tuple[Source, ...] = (),
    calibration_data: Source | tuple[Source, ...] = (),
    held_out: float = 0.02,
    resume: bool | str | None = False,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str = "auto",
    trust_remote_code: bool = False,
    watcher: Watcher | None = None,
    command: str = "",
    args: LTETrainingArguments | None = None,
    **training: Any,
) -> Trained:
    """Train a model to use few of its neurons, and save it with its tokenizer.

    ``lte.train("HuggingFaceTB/SmolLM2-135M", lte.LTEConfig(target_sparsity=0.5), "train.txt", "out", max_steps=300)``

    Args:
        model: a local folder, a hub id, or a ``.gguf`` file; dense, or sparse by the same method.
        method: a config such as ``lte.LTEConfig(target_sparsity=0.5)``. Its type says which method. None is LTE with
            experts and compensation for the model's size (:meth:`~lte.surgery.method.Method.sized_for`).
        given: the options of ``method`` that are kept, if the others should fit the model's size. None keeps all.
        data: files or hub data sets to train on.
        output_dir: where the model, checkpoints and ``lte_training.json`` go.
        task: the kind of data, e.g. ``"language_modelling"`` or ``"generation"``.
        data_config: an ``lte.DataConfig``, which says how data is read.
        eval_data: held-out data, evaluated after training. Without it a part of ``data`` is held out.
        calibration_data: data for thresholds; it should be like the text that the model will see. None takes ``data``.
        held_out: the part of ``data`` that is held out: a fraction, or from 1 on a number of rows.
        resume: True continues from the newest complete checkpoint in ``output_dir``. A path names a checkpoint.
        device: None takes a GPU if there is one.
        dtype: of the weights; ``"auto"`` is float32.
        trust_remote_code: whether code that comes with the model may run.
        watcher: shows progress.
        command: the command line for the summary.
        args: the training arguments, in place of ``output_dir`` and ``training``.
        training: options of ``lte.LTETrainingArguments``, e.g. ``max_steps`` and ``learning_rate``.

    Raises:
        ValueError: an argument is wrong or arguments do not fit together (before any training), another run uses the
            folder, or training diverged.
    """
    if args is None:
        args = LTETrainingArguments(output_dir, **training)
    elif twice := [*(["output_dir"] if output_dir is not None else []), *training]:
        raise ValueError(f"args are given, so give {', '.join(twice)} inside args")
    inputs = Inputs(_several(data), task, data_config or DataConfig())
    run = _Run(
        model,
        method or Method.named("lte")(),
        given if method else (),
        inputs,
        args,
        _several(eval_data),
        _several(calibration_data),
        held_out,
        torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")),
        dtype,
        trust_remote_code,
        watcher or Watcher(),
        command,
    )
    with alone_in(cast(str, args.output_dir)) if args.process_index == 0 else nullcontext():
        return run(resume)


def _several(sources: Source | tuple[Source, ...]) -> tuple[Any, ...]:
    return tuple(as_list(sources)) if sources else ()


@dataclass
class _Run:
    """The arguments of :func:`train`."""

    model: str
    method: Method
    given: Collection[str] | None
    inputs: Inputs
    args: LTETrainingArguments
    eval_data: tuple[Any, ...]
    calibration_data: tuple[Any, ...]
    held_out: float
    device: torch.device
    dtype: torch.dtype | str
    trust: bool
    watcher: Watcher
    command: str

    def __call__(self, resume: bool | str | None) -> Trained:
        args, watcher = self.args, self.watcher
        set_seed(args.seed)
        self.method.training(args)  # raises now if the two do not fit
        check_dtype(self.dtype)
        config, tokenizer = load_config(self.model, self.trust), load_tokenizer(self.model, self.trust)
        if self.given is not None and conversion_of(config) is None:
            kept = {name: getattr(self.method, name) for name in self.given if name in self.method.options()}
            self.method = type(self.method).sized_for(config, **kept)
        made = self._made()  # of the options as they were given: the trainer sets some
        if args.load_best_model_at_end and not self.calibration_data:
            raise ArgumentError(
                "load_best_model_at_end would choose the model by the data of the final evaluation: give ",
                Argument("calibration_data", "FILE"),
            )
        train_set, held_out, calibration = self._load_data(config, tokenizer)
        model = self._load_sparse(config, train_set)
        trainer = LTETrainer(
            model=model,
            args=args,
            train_dataset=train_set,
            calibration_dataset=None if calibration is None else calibration.head(args.calibration_rows),
            eval_dataset=held_out if calibration is None else calibration,
            data_collator=train_set.collator,
            processing_class=tokenizer,
            **_metrics(self.inputs.task),
        )
        watcher.train(trainer, resume or args.resume_from_checkpoint)
        self._save(trainer, model, tokenizer)
        batch_size = args.per_device_eval_batch_size
        found = evaluate(model, held_out, batch_size, progress=lambda batches: watcher.track(batches, "evaluating"))
        measured = measured_in_training(self.inputs, self.eval_data)
        record = run_record(made, measured, trainer, self.device, found)
        summary = {name: value for name, value in record.row().items() if name != "trained_by"}
        if args.should_save:
            write_whole(trainer.folder / SUMMARY, json.dumps(summary, indent=2) + "\n")
        return Trained(model, tokenizer, trainer, found, summary)

    def _made(self) -> Made:
        return made_by_training(
            self.command,
            self.model,
            self.method,
            self.inputs,
            self.args,
            calibration_text=names_of(self.calibration_data),
            held_out=0.0 if self.eval_data else self.held_out,
            dtype=self.dtype,
        )

    def _load_data(self, config: Any, tokenizer: Any) -> tuple[Any, Any, Any]:
        """Return training, held-out and calibration data. If the last is None, the trainer keeps rows out."""
        inputs, args = self.inputs, self.args
        load = partial(inputs.load, tokenizer=tokenizer, model_config=config, new_head=True)
        data = load(inputs.text)
        trained_on = class_names_of(config)
        fits = inputs.task == "classification" and trained_on and set(data.class_names) <= set(trained_on)
        if fits and inputs.data.class_names is None:
            data = load(inputs.text, data=replace(inputs.data, class_names=trained_on))
        like_data = replace(inputs.data, class_names=data.class_names)
        calibration = None
        if self.calibration_data:
            evaluated = args.eval_strategy != "no"  # otherwise only thresholds need it
            calibration = load(self.calibration_data, data=like_data, labelled=evaluated)
        if self.eval_data:
            return data, load(self.eval_data, data=like_data), calibration
        return *split_held_out(data, self.held_out, args.seed), calibration

    def _load_sparse(self, config: Any, train_set: Any) -> PreTrainedModel:
        check_family(config)
        class_names, labels = train_set.class_names, {}
        if class_names is not None:
            labels = {"num_labels": len(class_names), "id2label": dict(enumerate(class_names))}
            labels["label2id"] = {name: index for index, name in enumerate(class_names)}
            one = self.inputs.task == "regression"  # a checkpoint may have the problem type of an earlier training
            labels["problem_type"] = "regression" if one else "single_label_classification"
        with self.watcher.waiting("loading the model"):
            head = self.inputs.head(config, new=True)
            dtype = torch.float32 if self.dtype == "auto" else self.dtype
            model = load_model(self.model, head, dtype, trust_remote_code=self.trust, **labels)
            model.to(self.device)  # pyright: ignore[reportArgumentType]
        pad_alike_(model, train_set)
        made = conversion_of(model.config)
        if not isinstance(made, Method):
            install_routers_(model, self.method)
            # the trainer groups neurons after the dense stage, and it must know their order for an adapter
            if self.args.dense_fraction == 0 and not self.args.lora_rank:
                batches = DataLoader(train_set, batch_size=1, shuffle=True, collate_fn=train_set.collator)
                progress = partial(self.watcher.track, what="grouping neurons")
                regroup_(model, self.method, batches if self.method.needs_activations else (), progress)
        elif made.name != self.method.name:
            how = (Argument("method"), f" {made.name}, or the dense model")
            raise ArgumentError(f"{self.model} was made sparse by {made.name}: give ", *how)
        return model

    def _save(self, trainer: LTETrainer, model: PreTrainedModel, tokenizer: Any) -> None:
        folder = trainer.folder
        if self.args.should_save:
            (folder / SUMMARY).unlink(missing_ok=True)  # it describes another model until this one is evaluated
        if not self.args.is_dense:
            trainer.save_model(str(folder))
        elif self.args.should_save:  # a plain checkpoint, which any method can convert
            with saving(folder) as fresh:
                densify(model).save_pretrained(fresh)
                tokenizer.save_pretrained(fresh)


def _metrics(task: str) -> dict[str, Any]:
    """Return the metrics of ``Trainer`` for labelled rows. ``metric_for_best_model`` can name one of them."""
    if task not in ("classification", "regression"):
        return {}

    def measured(predictions: EvalPrediction) -> dict[str, float]:
        found = label_metrics(torch.as_tensor(predictions.predictions).float(), torch.as_tensor(predictions.label_ids))
        return {name: value for name, value in found.items() if name not in ("loss", "perplexity")}

    def logits_of(outputs: Any, _labels: Tensor) -> Tensor:
        return outputs[0] if isinstance(outputs, tuple) else outputs

    return {"compute_metrics": measured, "preprocess_logits_for_metrics": logits_of}
