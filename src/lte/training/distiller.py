"""Learning from the dense model that the dense stage left: it is kept beside the model, and on disk for resuming."""

import copy
from dataclasses import dataclass
from pathlib import Path
from types import MethodType
from typing import Any, cast

import torch
from accelerate.utils import compile_regions
from accelerate.utils.operations import ConvertOutputsToFp32
from torch import Tensor, nn

from lte.modules.step_log import StepLog
from lte.modules.token_masks import TokenMasks
from lte.surgery.convert import set_mode_
from lte.surgery.reading import reading
from lte.surgery.training_options import TrainingOptions
from lte.training.compiling import Compilation
from lte.training.distillation import DistilledLoss, block_error, mix_rows, predicts, show_hidden_states_

KEPT_IN = "lte_teacher"


@dataclass
class Lesson:
    """What the teacher says of a batch; nothing, where there is no teacher.

    Attributes:
        outputs: of the teacher.
        loss: what the student's model is to call in place of its own loss; None leaves that.
        feature_weight: of the error of hidden states; 0 for none.
    """

    outputs: Any = None
    loss: DistilledLoss | None = None
    feature_weight: float = 0.0

    def mix(
        self, loss: Tensor, logits: Any, labels: Tensor | None, causal: bool, problem: str | None, **counted: Any
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The loss to train on, the task loss in it, and the divergence in it; without a teacher that is None.

        Args:
            loss: what ``Trainer`` made of the student's pass.
            logits: of that pass.
            labels: of the batch.
            causal: whether a logit is of the next token.
            problem: ``problem_type`` of a head with one answer a row.
            counted: ``num_items`` and ``scale``, as :meth:`DistilledLoss.mix` has them.
        """
        if self.loss is None:
            return loss, loss, None
        return self.loss.mix(loss, logits, predicts(labels, logits, causal), problem=problem, **counted)

    def feature_loss(self, outputs: Any, masks: TokenMasks, log: StepLog) -> Tensor | float:
        """The weighted error of the student's hidden states; the log has it without its weight."""
        if self.outputs is None or not self.feature_weight:
            return 0.0
        error = block_error(outputs, self.outputs, masks)
        log.note("feature_distillation_loss", error)
        return self.feature_weight * error


class Distiller:
    """The teacher of a run.

    Attributes:
        teacher: None before the dense stage is over, and where nothing is distilled.
        wanted: what student and teacher are asked for beyond logits.
    """

    def __init__(self, model: nn.Module, options: TrainingOptions, compilation: Compilation, dtype: torch.dtype | None):
        """
        Args:
            model: the student.
            dtype: of the teacher's parameters; None: the student's.
        """
        self._options, self._compilation, self._dtype = options, compilation, dtype
        self._mix_rows = compilation.only(mix_rows)
        self.teacher: nn.Module | None = None
        self.wanted: dict[str, bool] = {}
        if options.feature_distillation_weight:
            show_hidden_states_(model)
            self.wanted = {"output_hidden_states": True}

    def make(self, model: Any, folder: Path | None) -> None:
        """Take a frozen copy of the model, which is put in mode dense.

        Args:
            model: as its dense stage left it, not compiled.
            folder: of the run, where the copy is kept too; None keeps none. A run cut short meanwhile leaves what was
                there, or nothing.
        """
        set_mode_(model, "dense")
        if folder is not None:
            model.save_pretrained(folder / KEPT_IN)
        self.teacher = self._frozen(copy.deepcopy(model))

    def load(self, folder: Path, like: Any) -> None:
        """Take the teacher that a run left in its folder, of the class and device of ``like``.

        Raises:
            ValueError: it left none.
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
        """Run the teacher."""
        if self.teacher is None:
            return Lesson()
        outputs, share = self.teacher(**inputs, **self.wanted), self._options.distillation_weight
        loss = DistilledLoss(outputs["logits"], share, self._mix_rows) if share else None
        return Lesson(outputs, loss, cast(float, self._options.feature_distillation_weight))

    def _frozen(self, teacher: nn.Module) -> nn.Module:
        teacher = teacher.eval().requires_grad_(False)
        if self._dtype is not None:
            # not the buffers: frequencies of rotary embeddings are fp32 in any model
            for parameter in teacher.parameters():
                parameter.data = parameter.data.to(self._dtype)
        keep_dtypes(teacher)
        options = self._compilation.options
        return teacher if options is None else compile_regions(teacher, **options)


def keep_dtypes(model: nn.Module) -> None:
    """Undo what accelerate adds to mixed precision, a copy in fp32 of all outputs: logits are large."""
    for module in model.modules():
        convert = getattr(vars(module).get("forward"), "__wrapped__", None)
        if isinstance(convert, ConvertOutputsToFp32):
            module.forward = MethodType(convert.model_forward, module)
