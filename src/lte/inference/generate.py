"""``generate``: prompts in, tokens out, by the decoding loop wherever it can, and by Hugging Face's elsewhere."""

import inspect
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import CompileConfig, EosTokenCriteria, MaxLengthCriteria, MaxTimeCriteria, PreTrainedModel
from transformers.generation.configuration_utils import GenerationMode

from lte.inference.decoder import Decoder, How, Preparing, Prompts, Streamer, timer
from lte.inference.kept import kept_with
from lte.inference.sampling import NotCovered, Sampler
from lte.inference.slot_cache import mask_kinds
from lte.modules.sparse_ffn import Selecting
from lte.modules.tensor_parallel import processes_of

logger = logging.getLogger(__name__)

_READ = frozenset(("attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep"))
_OF_ITS_OWN = ("past_key_values", "cache_implementation", "custom_generate", "assistant_model", "compile_config")


def generate(
    model: PreTrainedModel,
    inputs: Tensor | Mapping[str, Tensor],
    *,
    compile: bool | None = None,
    tune: bool = True,
    seed: int | None = None,
    preparing: Preparing | None = None,
    **options: Any,
) -> Any:
    """Continue ``inputs`` with a model that is dense, sparse, or optimised by :func:`lte.optimize_`.

    Causal models run the decoding loop of :mod:`lte.inference.decoder`, greedy or sampling: model, choice of the token
    and stop are one step. On CUDA the step is compiled and captured as a CUDA graph, once for each size of batch
    and text (rounded up to powers of 2), and kept with the model. What the loop does not cover (beams, several
    devices, encoder-decoders, logits processors of the user, ...) is left to ``model.generate``, and a line of the
    log says why. Within ``lte.track_sparsity`` and ``lte.record_scores``, which look at every pass, steps run eager.

    Args:
        model: on its device; inputs are moved there.
        inputs: token ids ``[B, P]``, or what a tokenizer returns. Prompts of unequal length are padded on the left,
            ``tokenizer(prompts, padding=True, padding_side="left", return_tensors="pt")``.
        compile: whether to compile the step. None does on CUDA, for models that Hugging Face can compile whole.
        tune: where CUDA compiles, also search for the fastest kernels: several times slower once, a tenth faster then.
        seed: of sampling. None goes on with torch's random state; a seed leaves that state alone.
        preparing: gives a context manager that is entered while a step is compiled or captured, e.g. one that shows
            a bar; it gets what is being prepared, in words. None writes that to the log,
            as a warning: it can take a minute.
        options: as ``model.generate`` has them: ``max_new_tokens``, ``do_sample``, ``temperature``, ``top_p``,
            ``top_k``, ``repetition_penalty``, ``streamer``, ...

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
    recording = any(isinstance(module, Selecting) and bool(module.kept_in) for module in model.modules())
    if compile and recording:
        raise ValueError("scores are being recorded, which a compiled step cannot do: leave compile=True out")
    calls: Any = model.generate
    with _seeded(seed, model.device):
        try:
            loop = _Loop(model, compile, tune, recording, preparing or _logged, options.get("streamer"))
            _check_options(options)
            ours = {name: value for name, value in options.items() if name != "streamer"}
            return calls(**given, **ours, custom_generate=loop)
        except NotCovered as error:
            level = logging.WARNING if model.device.type == "cuda" else logging.INFO  # where it is slower
            _say_once(f"{type(model).__name__} is decoded by model.generate: {error}", level)
    steps = _hugging_face_steps(model, compile, recording, options)
    with _seeded(seed, model.device), _explained("compile_config" in steps):
        return calls(**given, **{**steps, **options})


def _hugging_face_steps(
    model: PreTrainedModel, compile: bool | None, recording: bool, options: Mapping[str, Any]
) -> dict[str, Any]:
    """How ``model.generate`` is told to run its own steps: with a static cache and compiled where that pays."""
    cuda = model.device.type == "cuda"
    if compile is None:
        compile = cuda and model._can_compile_fullgraph and not recording
    if not compile or options.get("past_key_values") is not None:
        return {"disable_compile": True}
    config = CompileConfig(mode="reduce-overhead" if cuda else "default", fullgraph=True)
    config._compile_all_devices = not cuda  # pyright: ignore[reportAttributeAccessIssue]
    return {"cache_implementation": "static", "compile_config": config}


class _Loop:
    """What ``model.generate`` calls in place of its own loop, once it has prepared everything."""

    def __init__(
        self,
        model: PreTrainedModel,
        compile: bool | None,
        tune: bool,
        recording: bool,
        preparing: Preparing,
        streamer: Streamer | None,
    ) -> None:
        if (reason := _refused(model)) is not None:
            raise NotCovered(reason)
        mask_kinds(model.config)
        cuda = model.device.type == "cuda"
        self._may_fail = compile is None
        self._how = How(cuda and not recording if compile is None else compile, tune and cuda, cuda and not recording)
        self._preparing, self._streamer = preparing, streamer

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **inputs: Any,
    ) -> Tensor:
        mode = generation_config.get_generation_mode()
        if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
            raise NotCovered(f"{mode.value.replace('_', ' ')} is none of greedy and sampling")
        if generation_config.return_dict_in_generate:
            raise NotCovered("more than tokens is asked for")
        if not generation_config.use_cache:
            raise NotCovered("it is to keep no keys and values")
        if unknown := sorted(name for name, value in inputs.items() if value is not None and name not in _READ):
            raise NotCovered(f"it is given {', '.join(unknown)}")
        criteria = [one for one in stopping_criteria if type(one) not in (EosTokenCriteria, MaxLengthCriteria)]
        if other := [type(one).__name__ for one in criteria if type(one) is not MaxTimeCriteria]:
            raise NotCovered(f"{', '.join(other)} looks at the text")
        stops = [int(one) for each in stopping_criteria if type(each) is EosTokenCriteria for one in each.eos_token_id]
        padding = generation_config._pad_token_tensor
        length, sampling = input_ids.shape[1], mode == GenerationMode.SAMPLE
        most = stopping_criteria.max_length - length
        sampler = Sampler(logits_processor, sampling, stops, length)
        prompts = Prompts.read(model, input_ids, inputs.get("attention_mask"))
        with kept_with(model).lock if self._how.graph or self._how.compile else nullcontext():
            decoder = self._prepared(model, prompts, most, sampler)
            if self._streamer is not None:
                self._streamer.put(input_ids.cpu())
            made = decoder.decode(
                prompts, sampler, 0 if padding is None else int(padding), most, self._streamer, timer(criteria)
            )
        if self._streamer is not None:
            self._streamer.end()
        return made

    def _prepared(self, model: PreTrainedModel, prompts: Prompts, most: int, sampler: Sampler) -> Decoder:
        """A decoder that is ready. Where compiling is not asked for but tried, one that does not compile runs as is.

        Raises:
            NotCovered: the step cannot be captured.
        """
        kept, how = kept_with(model), self._how
        decoder = kept.decoder(model, prompts, most, how)
        try:
            with _explained(how.compile):
                decoder.prepare(model, sampler, self._preparing)
        except NotCovered as error:
            kept.refused = str(error)
            raise
        except ValueError as error:
            if not self._may_fail:
                raise
            _say_once(f"{error}")
            decoder = kept.decoder(model, prompts, most, replace(how, compile=False))
            decoder.prepare(model, sampler, self._preparing)
        return decoder


def _refused(model: PreTrainedModel) -> str | None:
    """Why the loop cannot run this model; None if it can."""
    attention = model.config._attn_implementation
    if model.config.is_encoder_decoder:
        return "it is an encoder-decoder"
    if attention not in ("sdpa", "eager"):
        return f"of attentions the loop runs sdpa and eager, not {attention}"
    if not model._can_compile_fullgraph:
        return "its step cannot be captured"
    if not {"position_ids", "logits_to_keep"} <= inspect.signature(model.forward).parameters.keys():
        return "it counts positions itself"
    if len(set(getattr(model, "hf_device_map", {"": 0}).values())) > 1:
        return "it is spread over several devices"
    return "its weights are divided among processes" if processes_of(model) > 1 else None


def _check_options(options: Mapping[str, Any]) -> None:
    """Raise NotCovered unless the loop does what is asked for."""
    asked = [name for name in _OF_ITS_OWN if options.get(name) is not None]
    if asked:
        raise NotCovered(f"{', '.join(asked)} is given")


@contextmanager
def _logged(what: str) -> Iterator[None]:
    logger.warning("%s", what)
    yield


@cache
def _say_once(message: str, level: int = logging.WARNING) -> None:
    logger.log(level, message)


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
        reason = error_line(error).partition(" Set TORCH")[0]  # less torch's advice to those who look into torch
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


def error_line(error: Exception) -> str:
    """What is said of an error that something else takes the place of: its type and the beginning of its message."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
