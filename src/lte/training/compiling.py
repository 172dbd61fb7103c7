"""The parts of a run that ``torch.compile`` makes faster: blocks (by accelerate) and the functions between them."""

from collections.abc import Callable
from typing import Any

import torch
from accelerate.utils import recursively_apply
from transformers import TrainingArguments

_PROGRAMS = 32  # programs of a block: for stages, teacher, evaluation; torch's own limit is 8


class Compilation:
    """How a run compiles.

    Attributes:
        options: of ``torch.compile``; None if nothing is compiled.
        accelerator: of the run.
    """

    def __init__(self, args: TrainingArguments, accelerator: Any):
        self.options: dict[str, Any] | None = None
        self.accelerator = accelerator
        if args.torch_compile:
            self.options = accelerator.state.dynamo_plugin.to_kwargs()
            torch._dynamo.config.recompile_limit = max(_PROGRAMS, torch._dynamo.config.recompile_limit)
        self._graphs = args.torch_compile and args.torch_compile_mode in ("reduce-overhead", "max-autotune")

    def __call__(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function of tensors, compiled if blocks are compiled."""
        return function if self.options is None else torch.compile(function, **self.options)

    def only(self, function: Callable[..., Any]) -> Callable[..., Any] | None:
        """Return the compiled function; None if blocks are not compiled."""
        return None if self.options is None else self(function)

    def begin_pass(self) -> None:
        """Tell torch that earlier outputs of CUDA graphs may be overwritten. By itself, torch would overwrite them at
        every block of a pass without gradient, as the teacher's is."""
        if self._graphs:
            torch.compiler.cudagraph_mark_step_begin()

    def keep(self, outputs: Any) -> Any:
        """Return outputs that stay valid in the next pass."""
        return recursively_apply(torch.clone, outputs) if self._graphs else outputs
