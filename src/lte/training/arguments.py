"""Arguments of ``LTETrainer``: Hugging Face's, and :class:`~lte.surgery.training_options.TrainingOptions`."""

import json
import os
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any, cast

from transformers import TrainingArguments

from lte.surgery.training_options import TrainingOptions
from lte.training.loggers import check_loggers
from lte.training.optimizers import check_optimizer


@dataclass
class LTETrainingArguments(TrainingOptions, TrainingArguments):
    """The fields of ``transformers.TrainingArguments``, and the options that make the model sparse.

    Steps (``max_steps`` or epochs) count all stages together. In each stage the learning rate warms up and decays, and
    the optimizer is fresh. Without ``restart_hard`` the hard stage continues those of the soft stage.

    Raises:
        ValueError: an unknown schedule, an option outside its range, or options that contradict each other.
    """

    learning_rate: float | None = field(  # pyright: ignore[reportIncompatibleVariableOverride]
        default=None,
        metadata={"help": "Peak learning rate (default: from the model's weights and the tokens of a step)."},
    )
    num_train_epochs: float | None = field(  # pyright: ignore[reportIncompatibleVariableOverride]
        default=None, metadata={"help": "Epochs (default: 1200 steps, but at most 10 epochs)."}
    )
    per_device_train_batch_size: int = field(default=16, metadata={"help": "Rows of a step on each device."})
    lr_scheduler_type: str | None = field(  # pyright: ignore[reportIncompatibleVariableOverride]
        default=None,
        metadata={
            "help": "How the learning rate decays (default: polynomial with power 0.5; dense and paper: linear)."
        },
    )
    warmup_steps: float = field(
        default=0.06,
        metadata={"help": "Warm-up of each stage: a number of steps, or below 1 a share of the stage (paper: 0.06)."},
    )
    logging_steps: float = field(default=10, metadata={"help": "Write the log after this number of steps."})
    logging_nan_inf_filter: bool = field(
        default=False,
        metadata={"help": "Leave a loss of NaN or inf out of the log. Then each step waits for its loss."},
    )
    lora_rank: int | None = field(
        default=None,
        metadata={
            "help": "Train adapters of this rank (LoRA) and freeze the weights; norms, routers and compensation train "
            "in full. The adapters are merged at the end."
        },
    )
    lora_targets: list[str] | None = field(
        default=None,
        metadata={"help": "Linear layers with an adapter, e.g. q_proj v_proj; without it all of the blocks."},
    )
    save_adapter: bool = field(
        default=False,
        metadata={"help": "With lora_rank, save adapters, norms, routers and compensation alone, not a merged model."},
    )
    loss_in_pieces: bool = field(
        default=False,
        metadata={"help": "Compute logits and loss for a few tokens at a time: less memory for a large vocabulary."},
    )
    overwrite: bool = field(
        default=False, metadata={"help": "Delete the checkpoints of an earlier run in the output folder."}
    )

    def __post_init__(self) -> None:
        self.fill_in()
        if not self.is_dense and (self.load_best_model_at_end or self.save_strategy == "best"):
            name = "load_best_model_at_end" if self.load_best_model_at_end else "save_strategy='best'"
            raise ValueError(
                f"{name} could choose a model of the dense or soft stage, where more experts are active: only "
                "schedule='dense' takes it"
            )
        check_optimizer(str(getattr(self.optim, "value", self.optim)))
        self._check_lora()
        if self.loss_in_pieces and (self.torch_compile or self.label_smoothing_factor):
            other = "torch_compile" if self.torch_compile else "label_smoothing_factor"
            raise ValueError(f"loss_in_pieces and {other} do not go together: drop one of them")
        if self.ddp_find_unused_parameters is None:
            self.ddp_find_unused_parameters = (
                True  # routers are frozen, and in the dense stage they are not in the graph
            )
        self._checkpoint_without_reentry()
        # compile block by block: a whole model takes minutes. Trainer uses accelerate's environment variables too
        os.environ.setdefault("ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION", "true")
        unset = self.accelerator_config is None
        super().__post_init__()
        check_loggers(self.report_to or ())
        if self.device.type == "cpu":
            self.dataloader_pin_memory = False
        elif self.device.type == "cuda" and unset and self.dataloader_pin_memory:
            cast(Any, self.accelerator_config).non_blocking = True  # a batch is copied while the previous step runs

    def fill_in(self) -> None:
        super().fill_in()
        if self.lr_scheduler_type is None:
            rooted = self.schedule == "default"
            named = "polynomial" if rooted else "linear"
            self.lr_scheduler_type = named  # pyright: ignore[reportIncompatibleVariableOverride]
            self.lr_scheduler_kwargs = self.lr_scheduler_kwargs or ({"power": 0.5} if rooted else None)

    @property
    def dense_learning_rate_factor(self) -> float:
        """The peak learning rate of the dense stage, divided by that of the other stages."""
        return (self.dense_learning_rate or self.learning_rate) / self.learning_rate if self.learning_rate else 1.0

    @property
    def recomputes(self) -> bool:
        """Whether the backward pass computes activations again. transformers has two names for it."""
        return any(getattr(self, name, None) for name in ("activation_checkpointing", "gradient_checkpointing"))

    def _check_lora(self) -> None:
        if self.lora_rank is None:
            if self.lora_targets or self.save_adapter:
                name = "lora_targets" if self.lora_targets else "save_adapter"
                raise ValueError(f"{name} needs lora_rank, e.g. 16")
            return
        if self.lora_rank < 1:
            raise ValueError(f"lora_rank is {self.lora_rank}, but it is at least 1, e.g. 16")
        if (optim := str(getattr(self.optim, "value", self.optim))).startswith(("galore", "apollo")):
            raise ValueError(f"lora_rank and optim={optim!r} do not go together: drop one of them")
        if self.save_adapter and self.is_dense:
            raise ValueError("schedule='dense' saves a plain checkpoint: drop save_adapter")
        if find_spec("peft") is None:
            raise ImportError('lora_rank needs the package peft: pip install "lte[lora]"')

    def _checkpoint_without_reentry(self) -> None:
        """Make checkpointing non-reentrant: a reentrant forward pass has no gradient, and it records the scores."""
        names = [n for n in ("activation_checkpointing", "gradient_checkpointing") if hasattr(self, n)]
        if not any(getattr(self, name) for name in names):
            return
        given: Any = next(filter(None, (getattr(self, f"{name}_kwargs") for name in names)), {})
        kwargs = json.loads(given) if isinstance(given, str) else dict(given)
        if kwargs.setdefault("use_reentrant", False):
            raise ValueError("gradient checkpointing must be non-reentrant here: set use_reentrant to false")
        for name in names:  # if both exist, the second is an alias of the first, and setting it warns
            setattr(self, name, True if name == names[0] else None)
            setattr(self, f"{name}_kwargs", kwargs if name == names[0] else None)
