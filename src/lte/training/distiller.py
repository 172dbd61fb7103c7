"""Distillation from the model of the dense stage. It is kept in memory, and on disk for a resumed run."""

import copy
from dataclasses import dataclass
from pathlib import Path
from types import MethodType
from typing import Any, cast

import torch
from accelerate.utils import compile_regions
from accelerate.utils.operations import ConvertOutputsToFp32
from torch import Tensor, nn

from lte.modules.evaluating import evaluating
from lte.modules.sharding import is_sharded, whole_state
from lte.modules.step_log import StepLog
from lte.modules.token_masks import TokenMasks
from lte.surgery.adapters import Adapters
from lte.surgery.convert import set_mode_
from lte.surgery.method import mode_of
from lte.surgery.reading import reading
from lte.surgery.training_options import TrainingOptions
from lte.training.compiling import Compilation
from lte.training.distillation import DistilledLoss, block_error, mix_rows, predicts, show_hidden_states_
from lte.training.pieces import PiecewiseLoss, headless
from lte.training.sharded import copy_parts

KEPT_IN = "lte_teacher"


@dataclass
class Lesson:
    """The teacher's outputs for a batch. Without a teacher it is empty.

    Attributes:
        outputs: of the teacher.
        loss: the loss that the student's model calls in place of its own; None keeps its own.
        feature_weight: of the error of hidden states; 0 for none.
    """

    outputs: Any = None
    loss: DistilledLoss | None = None
    feature_weight: float = 0.0

    def mix(
        self, loss: Tensor, logits: Any, labels: Tensor | None, causal: bool, problem: str | None, **counted: Any
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the training loss, its task loss, and its divergence from the teacher (None without a teacher).

        Args:
            loss: ``Trainer``'s loss of the student's pass.
            logits: of that pass.
            labels: of the batch.
            causal: whether a logit is of the next token.
            problem: ``problem_type`` of a head with one answer for each row.
            counted: ``num_items`` and ``scale``, as in :meth:`DistilledLoss.mix`.
        """
        if self.loss is None:
            return loss, loss, None
        return self.loss.mix(loss, logits, predicts(labels, logits, causal), problem=problem, **counted)

    def feature_loss(self, outputs: Any, masks: TokenMasks, log: StepLog) -> Tensor | float:
        """Return the weighted error of the student's hidden states. The log gets the error without the weight."""
        if self.outputs is None or not self.feature_weight:
            return 0.0
        error = block_error(outputs, self.outputs, masks)
        log.note("feature_distillation_loss", error)
        return self.feature_weight * error


class FrozenTeacher:
    """The teacher of a student with adapters: the student's own frozen weights, in mode dense."""

    def __init__(self, whole: nn.Module, plain: Any, adapters: Adapters):
        """
        Args:
            whole: the student as it is called in training, compiled or not.
            plain: the student without wrappers.
            adapters: of the student.
        """
        self._whole, self._plain, self._adapters = whole, plain, adapters

    def get_output_embeddings(self) -> Any:
        return self._plain.get_output_embeddings()

    def __call__(self, **inputs: Any) -> Any:
        mode = mode_of(self._plain.config)
        set_mode_(self._plain, "dense")
        try:
            with self._adapters.off(), evaluating(self._whole):
                return self._whole(**inputs)
        finally:
            set_mode_(self._plain, mode)


class Distiller:
    """The teacher of a run.

    Attributes:
        teacher: None until the dense stage is over, and in a run without distillation.
        wanted: arguments of student and teacher for outputs besides logits.
        head: of the student if its loss is computed in pieces, else None.
    """

    def __init__(self, model: nn.Module, options: TrainingOptions, compilation: Compilation, dtype: torch.dtype | None):
        """
        Args:
            model: the student.
            dtype: of the teacher's parameters; None takes the student's.
        """
        self._options, self._compilation, self._dtype = options, compilation, dtype
        self._mix_rows = compilation.only(mix_rows)
        self.teacher: nn.Module | FrozenTeacher | None = None
        self.wanted: dict[str, bool] = {}
        self.head: nn.Linear | None = None
        if options.feature_distillation_weight:
            show_hidden_states_(model)
            self.wanted = {"output_hidden_states": True}

    def make(self, model: Any, folder: Path | None) -> None:
        """Make a frozen copy of the model the teacher. The model is put in mode dense.

        Args:
            model: the model after its dense stage, not compiled.
            folder: of the run, which gets the copy too; None saves no copy. If the run is killed meanwhile, the folder
                has the old copy or none.
        """
        set_mode_(model, "dense")
        accelerator = self._compilation.accelerator
        if is_sharded(model):
            weights = whole_state(model, keep=folder is not None)
            if folder is not None:
                model.save_pretrained(folder / KEPT_IN, state_dict=weights)
            self.teacher = self._frozen(copy_parts(model, accelerator, self._dtype))
            return
        if folder is not None:
            model.save_pretrained(folder / KEPT_IN)
        self.teacher = self._frozen(copy.deepcopy(model))

    def load(self, folder: Path, like: Any) -> None:
        """Load the teacher from a run's folder, with the class and device of ``like``.

        Raises:
            ValueError: the folder has no teacher.
        """
        folder = folder / KEPT_IN
        if not folder.is_dir():
            raise ValueError(f"{folder} is missing: resuming needs the dense model that this run distils from")
        with reading(str(folder)):
            teacher = type(like).from_pretrained(folder, dtype=like.dtype)
        set_mode_(teacher, "dense")
        self.teacher = self._frozen(teacher.to(like.device))

    @torch.no_grad()
    def lesson(self, inputs: dict[str, Any]) -> Lesson:
        """Run the teacher on a batch and return its lesson."""
        if self.teacher is None:
            return Lesson()
        head = None if self.head is None else cast(Any, self.teacher).get_output_embeddings()
        with headless(head):
            outputs = self.teacher(**inputs, **self.wanted)
        share, loss = self._options.distillation_weight, None
        if share and self.head is not None:
            loss = PiecewiseLoss(self.head, outputs["logits"], head, share)
        elif share:
            loss = DistilledLoss(outputs["logits"], share, self._mix_rows)
        return Lesson(outputs, loss, cast(float, self._options.feature_distillation_weight))

    def _frozen(self, teacher: nn.Module) -> nn.Module:
        teacher = teacher.eval().requires_grad_(False)
        if self._dtype is not None:
            # not the buffers: frequencies of rotary embeddings are fp32 in every model
            for parameter in teacher.parameters():
                parameter.data = parameter.data.to(self._dtype)
        keep_dtypes(teacher)
        options = self._compilation.options
        return teacher if options is None else compile_regions(teacher, **options)


def keep_dtypes(model: nn.Module) -> None:
    """Remove accelerate's copy of all outputs in fp32 under mixed precision, because logits are large."""
    for module in model.modules():
        convert = getattr(vars(module).get("forward"), "__wrapped__", None)
        if isinstance(convert, ConvertOutputsToFp32):
            module.forward = MethodType(convert.model_forward, module)
