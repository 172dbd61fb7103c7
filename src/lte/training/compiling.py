"""What of a run ``torch.compile`` makes faster: blocks, by accelerate, and by this what lies between them."""

from collections.abc import Callable
from typing import Any

import torch
from accelerate.utils import recursively_apply
from transformers import TrainingArguments

_PROGRAMS = 32  # of a block: stages, teacher, evaluation; torch's own limit is 8


class Compilation:
    """How a run compiles.

    Attributes:
        options: of ``torch.compile``; None where nothing is compiled.
    """

    def __init__(self, args: TrainingArguments, accelerator: Any):
        self.options: dict[str, Any] | None = None
        if args.torch_compile:
            self.options = accelerator.state.dynamo_plugin.to_kwargs()
            torch._dynamo.config.recompile_limit = max(_PROGRAMS, torch._dynamo.config.recompile_limit)
        self._graphs = args.torch_compile and args.torch_compile_mode in ("reduce-overhead", "max-autotune")

    def __call__(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function of tensors, compiled where blocks are."""
        return function if self.options is None else torch.compile(function, **self.options)

    def only(self, function: Callable[..., Any]) -> Callable[..., Any] | None:
        """The same; None where blocks are not compiled."""
        return None if self.options is None else self(function)

    def begin_pass(self) -> None:
        """What CUDA graphs put out until now may be overwritten. Torch left to itself says so at every block of a pass
        without gradient, the teacher's."""
        if self._graphs:
            torch.compiler.cudagraph_mark_step_begin()

    def keep(self, outputs: Any) -> Any:
        """Outputs that outlive the next pass."""
        return recursively_apply(torch.clone, outputs) if self._graphs else outputs
