"""``generate``: prompts in, tokens out, by the decoding loop wherever it can, and by Hugging Face's elsewhere."""

import inspect
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import (
    CompileConfig,
    EosTokenCriteria,
    MaxLengthCriteria,
    MaxTimeCriteria,
    PreTrainedModel,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.distributed.fsdp import is_fsdp_managed_module
from transformers.generation.configuration_utils import GenerationMode
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from lte.inference.decoder import Decoder, How, Preparing, Prompts, Streamer, timer
from lte.inference.ends import OF_TEXTS, Ends
from lte.inference.kept import kept_with
from lte.inference.sampling import NotCovered, Sampler
from lte.inference.slot_cache import mask_kinds
from lte.modules.tensor_parallel import processes_of
from lte.surgery.architectures import hugging_face_generate

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

    Causal models run the decoding loop of :mod:`lte.inference.decoder`, greedy or sampling. One step runs the model,
    chooses the token and checks for the end. On CUDA the step is compiled and captured as a CUDA graph, and kept with
    the model. This happens once for each size of batch and text, rounded up to powers of 2. On a CPU the step of a
    Llama-like model is one call of our own kernels, if Numba is installed. The loop does not cover beams, several
    devices, encoder-decoders, or logits processors of the user. ``model.generate`` decodes in these cases, and a line
    of the log says why. Within ``lte.track_sparsity`` and ``lte.record_scores``, which record every pass, steps run
    eager.

    Args:
        model: on its device. Inputs are moved there.
        inputs: token ids ``[B, P]``, or what a tokenizer returns. Prompts of unequal length are padded on the left:
            ``tokenizer(prompts, padding=True, padding_side="left", return_tensors="pt")``.
        compile: whether to compile the step. None compiles on CUDA, if Hugging Face can compile the whole model.
        tune: whether compiling on CUDA includes a search for the fastest kernels. Compiling then takes several times
            as long, and steps are a tenth faster.
        seed: of sampling. None continues torch's random state. A seed does not change that state.
        preparing: called with words that say what is compiled or captured. It returns a context manager for that
            time, for example one that shows a bar. None writes the words to the log as a warning, because it can take
            a minute.
        options: all options of ``model.generate``, for example ``max_new_tokens``, ``do_sample``, ``temperature``,
            ``top_p``, ``top_k``, ``repetition_penalty`` and ``streamer``.

    Returns:
        What ``model.generate`` returns: token ids, including the prompts (except for encoder-decoders).

    Raises:
        ValueError: prompts are padded on the right, ``compile=True`` is given while recording, a step does not
            compile, or Hugging Face raises it.
    """
    given = dict(inputs) if isinstance(inputs, Mapping) else {"input_ids": inputs}
    given = {name: value.to(model.device) for name, value in given.items()}
    mask = given.get("attention_mask")
    if mask is not None and mask.ndim == 2 and not model.config.is_encoder_decoder and not mask[:, -1].all():
        raise ValueError('prompts are padded on the right: tokenize them with padding_side="left"')
    recording = _is_recorded(model)
    if compile and recording:
        raise ValueError("a compiled step cannot record scores: leave compile=True out while scores are recorded")
    calls = hugging_face_generate(model)
    with _seeded(seed, model.device):
        try:
            loop = _Loop(model, compile, tune, recording, preparing or _logged, options.get("streamer"))
            return _looped(calls, loop, **given, **options)
        except NotCovered as error:
            _say_not_covered(model, error)
    steps = _hugging_face_steps(model, compile, recording, options)
    with _seeded(seed, model.device), _explained("compile_config" in steps):
        return calls(**given, **{**steps, **options})


def generate_packed(model: PreTrainedModel, *args: Any, **options: Any) -> Any:
    """``model.generate`` of a model that :func:`lte.optimize_` packed: the decoding loop, without compiling.

    On CUDA a step is a CUDA graph, and to capture it takes about a second. Arguments, results and random numbers are
    those of Hugging Face's ``generate``, which also decodes what the loop does not cover.
    """
    calls = hugging_face_generate(model)
    if options.get("custom_generate") is not None:
        return calls(*args, **options)
    try:
        loop = _Loop(model, False, False, _is_recorded(model), lambda _: nullcontext(), options.get("streamer"))
        return _looped(calls, loop, *args, **options)
    except NotCovered as error:
        _say_not_covered(model, error)
    return calls(*args, **options)


def _looped(calls: Callable[..., Any], loop: "_Loop", *args: Any, **options: Any) -> Any:
    """Call Hugging Face's ``generate`` with our loop in place of its own.

    Raises:
        NotCovered: the loop does not have these options.
    """
    asked = [name for name in _OF_ITS_OWN if options.get(name) is not None]
    if asked:
        raise NotCovered(f"{', '.join(asked)} is given")
    options.pop("streamer", None)
    if None not in (options.get("stop_strings"), options.get("tokenizer")):  # generate drops a loop's tokenizer
        one = StopStringCriteria(options.pop("tokenizer"), options.pop("stop_strings"))
        options["stopping_criteria"] = StoppingCriteriaList([*(options.get("stopping_criteria") or ()), one])
    return calls(*args, **options, custom_generate=loop)


def _is_recorded(model: PreTrainedModel) -> bool:
    return any(bool(vars(module).get("kept_in")) for module in model.modules())


def _say_not_covered(model: PreTrainedModel, reason: NotCovered) -> None:
    level = logging.WARNING if model.device.type == "cuda" else logging.INFO  # where it is slower
    _say_once(f"{type(model).__name__} is decoded by Hugging Face's own generate: {reason}", level)


def _hugging_face_steps(
    model: PreTrainedModel, compile: bool | None, recording: bool, options: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the options for the steps of ``model.generate``: a static cache and compiled steps if faster."""
    cuda = model.device.type == "cuda"
    if compile is None:
        compile = cuda and model._can_compile_fullgraph and not recording
    if not compile or options.get("past_key_values") is not None:
        return {"disable_compile": True}
    config = CompileConfig(mode="reduce-overhead" if cuda else "default", fullgraph=True)
    config._compile_all_devices = not cuda  # pyright: ignore[reportAttributeAccessIssue]
    return {"cache_implementation": "static", "compile_config": config}


class _Loop:
    """The loop that ``model.generate`` calls instead of its own, after its preparations."""

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
        compiles = cuda and not recording if compile is None else compile
        own = model.device.type == "cpu" and not (compiles or recording)
        self._how = How(compiles, tune and cuda, cuda and not recording, own)
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
            raise NotCovered(f"{mode.value.replace('_', ' ')} is neither greedy nor sampling")
        if generation_config.return_dict_in_generate:
            raise NotCovered("the options ask for more than tokens")
        if not generation_config.use_cache:
            raise NotCovered("the options say to keep no keys and values")
        mask = inputs.get("attention_mask")
        if mask is not None and not mask[:, -1].all():
            raise NotCovered("prompts are padded on the right")
        if unknown := sorted(name for name, value in inputs.items() if value is not None and name not in _READ):
            raise NotCovered(f"it is given {', '.join(unknown)}")
        criteria = [one for one in stopping_criteria if type(one) not in (EosTokenCriteria, MaxLengthCriteria)]
        of_texts = [one for one in criteria if type(one) in OF_TEXTS]
        timed = [one for one in criteria if type(one) is MaxTimeCriteria]
        if other := [type(one).__name__ for one in criteria if one not in of_texts and one not in timed]:
            raise NotCovered(f"{', '.join(other)} may look at scores")
        stops = [int(one) for each in stopping_criteria if type(each) is EosTokenCriteria for one in each.eos_token_id]
        padding = generation_config._pad_token_tensor
        length, sampling = input_ids.shape[1], mode == GenerationMode.SAMPLE
        most = stopping_criteria.max_length - length
        sampler = Sampler(logits_processor, sampling, stops, length)
        keeps = self._how.graph or self._how.compile
        with kept_with(model).lock if keeps else nullcontext():
            if keeps:
                kept_with(model).renew(model)  # before the prompts, which another loop would have to read again
            prompts = Prompts.read(model, input_ids, mask)
            decoder = self._prepared(model, prompts, most, sampler)
            if self._streamer is not None:
                self._streamer.put(input_ids.cpu())
            pad, late = 0 if padding is None else int(padding), timer(timed)
            if of_texts:
                ends = Ends(of_texts, input_ids, most, stops, self._streamer)
                made = decoder.decode(prompts, sampler, pad, most, ends, lambda: ends.all_ended() or late())
                made = ends.cut(made, pad)
            else:
                made = decoder.decode(prompts, sampler, pad, most, self._streamer, late)
        if self._streamer is not None:
            self._streamer.end()
        return made

    def _prepared(self, model: PreTrainedModel, prompts: Prompts, most: int, sampler: Sampler) -> Decoder:
        """Return a decoder that is ready. If compiling fails and was not asked for, its step is not compiled.

        Raises:
            NotCovered: the step cannot be captured, or there is no memory for its cache.
        """
        kept, how = kept_with(model), self._how
        try:
            decoder = kept.decoder(model, prompts, most, how)
            with _explained(how.compile):
                decoder.prepare(model, sampler, self._preparing)
        except NotCovered as error:
            kept.refused = str(error)
            raise
        except torch.OutOfMemoryError as error:
            kept.forget()
            size = f"{prompts.ids.shape[0]} texts of {prompts.ids.shape[1] + most} tokens"
            raise NotCovered(f"its fixed memory for {size} is not free") from error
        except ValueError as error:
            if not self._may_fail:
                raise
            _say_once(f"{error}")
            decoder = kept.decoder(model, prompts, most, replace(how, compile=False))
            decoder.prepare(model, sampler, self._preparing)
        return decoder


def _refused(model: PreTrainedModel) -> str | None:
    """Return why the loop cannot run this model; None if it can."""
    attention = model.config._attn_implementation
    if model.config.is_encoder_decoder:
        return "it is an encoder-decoder"
    if attention not in ("sdpa", "eager"):
        return f"the loop runs the attentions sdpa and eager, not {attention}"
    if not model._can_compile_fullgraph:
        return "its step cannot be captured"
    if not {"position_ids", "logits_to_keep"} <= inspect.signature(model.forward).parameters.keys():
        return "it counts positions itself"
    if len(set(getattr(model, "hf_device_map", {"": 0}).values())) > 1:
        return "it is spread over several devices"
    divided = processes_of(model) > 1 or is_fsdp_managed_module(model) or is_deepspeed_zero3_enabled()
    return "its weights are divided among processes, which all have to take each step" if divided else None


@contextmanager
def _logged(what: str) -> Iterator[None]:
    logger.warning("%s", what)
    yield


@cache
def _say_once(message: str, level: int = logging.WARNING) -> None:
    logger.log(level, message)


@contextmanager
def _explained(compile: bool) -> Iterator[None]:
    """Turn a failure of the compiler into a ValueError if steps are compiled. Other errors are not changed."""
    try:
        yield
    except RuntimeError as error:
        if not compile:
            raise
        from torch._dynamo.exc import TorchDynamoException  # also the base of inductor's errors; slow to import

        if not isinstance(error, TorchDynamoException):
            raise
        reason = error_line(error).partition(" Set TORCH")[0]  # without advice on how to debug torch
        raise ValueError(
            f"this model's step does not compile here: {reason}; leave --compile out (compile=False)"
        ) from error


@contextmanager
def _seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    """Start random numbers at ``seed`` inside the context. Afterwards the random state is the one from before."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def error_line(error: Exception) -> str:
    """Return the type of an error and the beginning of its message, on one line, for a row or another message."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
