"""``generate``: Hugging Face's, with a static cache and a compiled step where those pay."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import CompileConfig, PreTrainedModel

from lte.modules.sparse_ffn import Selecting


def generate(
    model: PreTrainedModel,
    inputs: Tensor | Mapping[str, Tensor],
    *,
    compile: bool | None = None,
    seed: int | None = None,
    **options: Any,
) -> Any:
    """Continue ``inputs`` with a model that is dense, sparse, or optimised by :func:`lte.optimize_`.

    A compiled step is traced once (tens of seconds) and replayed for every token, on CUDA as a CUDA graph;
    it needs a static cache, so a longer text than any before traces it again. Within
    ``lte.track_sparsity`` and ``lte.record_scores``, which look at every pass, steps are not compiled.

    Args:
        model: on its device; inputs are moved there.
        inputs: token ids, or what a tokenizer returns. Prompts of unequal length are padded on the left,
            ``tokenizer(prompts, padding=True, padding_side="left", return_tensors="pt")``.
        compile: whether to compile the step. None does on CUDA, for models that Hugging Face can compile whole.
        seed: of sampling. None goes on with torch's random state; a seed leaves that state alone.
        options: as ``model.generate`` has them: ``max_new_tokens``, ``do_sample``, ``temperature``, ``top_p``,
            ``top_k``, ``streamer``, ... They win over what ``compile`` asks for.

    Returns:
        What ``model.generate`` returns: token ids, prompts included (not for encoder-decoders).

    Raises:
        ValueError: prompts padded on the right, ``compile=True`` while recording, a step that does not compile, and
            Hugging Face's own.
    """
    given = dict(inputs) if isinstance(inputs, Mapping) else {"input_ids": inputs}
    given = {name: value.to(model.device) for name, value in given.items()}
    mask = given.get("attention_mask")
    if mask is not None and mask.ndim == 2 and not model.config.is_encoder_decoder and not mask[:, -1].all():
        raise ValueError('prompts are padded on the right: tokenize them with padding_side="left"')
    calls: Any = model.generate
    steps = {**_steps(model, compile, options), **options}
    with _seeded(seed, model.device), _explained("compile_config" in steps):
        return calls(**given, **steps)


def _steps(model: PreTrainedModel, compile: bool | None, options: dict[str, Any]) -> dict[str, Any]:
    """How Hugging Face is told to run the steps."""
    recording = any(isinstance(module, Selecting) and bool(module.kept_in) for module in model.modules())
    if compile and recording:
        raise ValueError("scores are being recorded, which a compiled step cannot do: leave compile=True out")
    if compile is None:
        compile = model.device.type == "cuda" and model._can_compile_fullgraph and not recording
    if not compile or options.get("past_key_values") is not None:
        return {"disable_compile": True}
    cuda = model.device.type == "cuda"
    config = CompileConfig(mode="reduce-overhead" if cuda else "default", fullgraph=True)
    config._compile_all_devices = not cuda  # pyright: ignore[reportAttributeAccessIssue]
    return {"cache_implementation": "static", "compile_config": config}


@contextmanager
def _explained(compile: bool) -> Iterator[None]:
    """Where steps are compiled, a failure of the compiler becomes a ValueError; other errors stay what they are."""
    try:
        yield
    except RuntimeError as error:
        if not compile:
            raise
        from torch._dynamo.exc import TorchDynamoException  # of inductor's failures too; slow to import

        if not isinstance(error, TorchDynamoException):
            raise
        reason = one_line(error).partition(" Set TORCH")[0]  # less torch's advice to those who look into torch
        raise ValueError(
            f"this model's step does not compile here: {reason}; leave --compile out (compile=False)"
        ) from error


@contextmanager
def _seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    """Random numbers start at ``seed`` within, and go on afterwards as if nothing had been drawn."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def one_line(error: Exception) -> str:
    """What is said of an error that something else takes the place of: its type and the beginning of its message."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
