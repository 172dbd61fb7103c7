"""Arguments of ``LTETrainer``: Hugging Face's, and :class:`~lte.surgery.training_options.TrainingOptions`."""

import json
import os
from dataclasses import dataclass, field
from typing import Any, cast

from transformers import TrainingArguments

from lte.surgery.training_options import TrainingOptions
from lte.training.loggers import check_loggers


@dataclass
class LTETrainingArguments(TrainingOptions, TrainingArguments):
    """Everything of ``transformers.TrainingArguments``, and how to make the model sparse.

    Steps (``max_steps`` or epochs) count all stages together. The learning rate warms up and decays once a stage, and
    each stage starts with a fresh optimizer; without ``restart_hard`` the hard stage goes on where the soft one ended.

    Raises:
        ValueError: an unknown schedule, an option outside its range, or options that contradict each other.
    """

    warmup_steps: float = field(
        default=0.06, metadata={"help": "Warm-up of each stage: steps, or below 1 a share of the stage (paper: 0.06)."}
    )
    logging_nan_inf_filter: bool = field(
        default=False,
        metadata={"help": "Leave a loss of NaN or inf out of the log, which makes each step wait for it."},
    )
    overwrite: bool = field(
        default=False, metadata={"help": "Delete the checkpoints that a run before left in the output folder."}
    )

    def __post_init__(self) -> None:
        self.fill_in()
        if not self.is_dense and (self.load_best_model_at_end or self.save_strategy == "best"):
            name = "load_best_model_at_end" if self.load_best_model_at_end else "save_strategy='best'"
            raise ValueError(
                f"{name} could choose a model of the dense or soft stage, when more experts were active: only "
                "schedule='dense' takes it"
            )
        if self.ddp_find_unused_parameters is None:
            self.ddp_find_unused_parameters = True  # frozen routers, and a dense stage that has none in its graph
        self._checkpoint_without_reentry()
        # block by block: a whole model takes minutes to compile; Trainer, too, tells accelerate by its environment
        os.environ.setdefault("ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION", "true")
        unset = self.accelerator_config is None
        super().__post_init__()
        check_loggers(self.report_to or ())
        if self.device.type == "cpu":
            self.dataloader_pin_memory = False
        elif self.device.type == "cuda" and unset and self.dataloader_pin_memory:
            cast(Any, self.accelerator_config).non_blocking = True  # a batch is copied while the step before it runs

    @property
    def dense_learning_rate_factor(self) -> float:
        """The dense stage's peak over that of the others."""
        return (self.dense_learning_rate or self.learning_rate) / self.learning_rate if self.learning_rate else 1.0

    def _checkpoint_without_reentry(self) -> None:
        """Scores are recorded in the forward pass, which reentrant checkpointing runs without gradient."""
        names = [n for n in ("activation_checkpointing", "gradient_checkpointing") if hasattr(self, n)]
        if not any(getattr(self, name) for name in names):
            return
        given: Any = next(filter(None, (getattr(self, f"{name}_kwargs") for name in names)), {})
        kwargs = json.loads(given) if isinstance(given, str) else dict(given)
        if kwargs.setdefault("use_reentrant", False):
            raise ValueError("gradient checkpointing must be non-reentrant here: set use_reentrant to false")
        for name in names:  # the second is an alias of the first where both exist, and warns when it is set
            setattr(self, name, True if name == names[0] else None)
            setattr(self, f"{name}_kwargs", kwargs if name == names[0] else None)
