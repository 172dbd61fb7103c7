"""``lte generate``: continue prompts. One prompt streams to stdout token by token; several run as a batch."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import tyro
from torch import Tensor
from transformers import PreTrainedModel, TextStreamer
from transformers.generation.streamers import BaseStreamer

from lte.cli.console import bar, err, print_json, waiting
from lte.cli.main import parse
from lte.cli.options import DeviceOptions, Model, open_model, optimize_where_possible_
from lte.cli.switches import switches
from lte.data.chat import ChatTemplate
from lte.data.text_files import read_text
from lte.data.tokenise import encode, most_tokens, without_start, wrapping
from lte.evaluation.inputs import generating_head
from lte.inference.clock import Clock
from lte.inference.completions import GREEDY, Completion, complete, completions_sparsity, padded, stop_ids
from lte.ops.quantise import Quantised
from lte.ops.sparse_ffn import BackendName
from lte.surgery.conversion import conversion_of
from lte.surgery.loading import load_config, load_tokenizer
from lte.surgery.method import Method, mode_of
from lte.surgery.quantise import weights_of


@dataclass
class Generate:
    model: Model
    """A local folder, a hub id, or a .gguf file; dense or sparse."""
    prompt: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Text to continue. Given several times, the prompts run as a batch."""
    prompts: str | None = None
    """A file with one prompt a line."""
    batch_size: int = 16
    """Prompts decoded together."""
    max_new_tokens: int = 128
    """At most so many tokens a prompt."""
    temperature: float = 0.0
    """0 is greedy; above, tokens are sampled."""
    top_p: float = 1.0
    """Sample from the most likely tokens that together have this probability."""
    top_k: int = 50
    """Sample from so many most likely tokens; 0 takes all."""
    chat: bool = False
    """Put the prompts into the tokenizer's chat template."""
    seed: int = 0
    """Of sampling."""
    backend: BackendName = "auto"
    """What skips the idle experts of a sparse model; one that is named runs or is an error."""
    weights: Quantised | None = None
    """int8 or int4: quantise a sparse model before it runs. None: as it was saved."""
    compile: bool | None = None
    """Compile the decoding step: up to a minute or two the first time on a machine, seconds later on, then each token
    is faster. The default is yes on a GPU, no on a CPU."""
    json: bool = False
    """Print one JSON object on the last line."""
    where: DeviceOptions = field(default_factory=DeviceOptions)


@dataclass
class Generated:
    """What decoding gave, a prompt each.

    Attributes:
        seconds: that decoding took in all, preparing left out.
        first: seconds of these until a batch had its first tokens, of all batches.
        preparing: seconds spent before on compiling and capturing steps.
        prepared: what that was, in words.
    """

    texts: list[str] = field(default_factory=list)
    completions: list[Completion] = field(default_factory=list)
    seconds: float = 0.0
    first: float = 0.0
    preparing: float = 0.0
    prepared: list[str] = field(default_factory=list)

    @property
    def tokens(self) -> list[int]:
        return [len(one.new) for one in self.completions]

    @property
    def later_per_second(self) -> float | None:
        """Tokens a second after the first of each text; None where there are none."""
        later, seconds = sum(self.tokens) - len(self.tokens), self.seconds - self.first
        return later / seconds if later and seconds > 0 else None


@torch.no_grad()
def main(argv: Sequence[str]) -> None:
    options: Generate = parse(Generate, "generate", switches(argv, Generate))
    prompts = _prompts(options)
    device, dtype = options.where.resolve()
    config = load_config(options.model, options.where.trust_remote_code)
    tokenizer = load_tokenizer(options.model, options.where.trust_remote_code)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    batches = [
        _encode(tokenizer, prompts[first : first + options.batch_size], options, bool(config.is_encoder_decoder))
        for first in range(0, len(prompts), options.batch_size)
    ]
    longest, positions = max(batch["input_ids"].shape[1] for batch in batches), most_tokens(tokenizer, config)
    asked = longest if config.is_encoder_decoder else longest + options.max_new_tokens
    if asked > positions:
        raise ValueError(
            f"a prompt of {longest} tokens and --max-new-tokens {options.max_new_tokens} are beyond the model's "
            f"{positions} positions: give less of either"
        )
    model = open_model(options.model, generating_head(config), device, dtype, options.where.trust_remote_code).eval()
    mode, has_routers = mode_of(config), isinstance(conversion_of(config), Method)
    if mode == "hard" or options.backend != "auto" or options.weights is not None:
        optimize_where_possible_(model, options.backend, options.weights)
    run = _decode(model, tokenizer, batches, options)
    speed = sum(run.tokens) / run.seconds
    err.print(_summary(run))
    sparsity = completions_sparsity(model, run.completions).overall if has_routers else None
    if sparsity is not None:
        err.print(f"sparsity {sparsity:.1%} (mode {mode})")
    if options.json:
        result = {"texts": run.texts, "tokens": run.tokens, "seconds": round(run.seconds, 4), "mode": mode}
        result |= {"tokens_per_second": round(speed, 2), "sparsity": sparsity}
        result |= {"device": str(model.device), "backend": options.backend, "weights": weights_of(model)}
        result["preparing"] = round(run.preparing, 4)
        result |= {"first_token_seconds": round(run.first, 4), "later_tokens_per_second": run.later_per_second}
        result["compiled"] = any(what.startswith("compiling") for what in run.prepared)
        print_json(result)


def _prompts(options: Generate) -> list[str]:
    """The prompts, with the other options checked.

    Raises:
        ValueError: an option out of its range, no prompt, an empty one.
    """
    if options.temperature < 0:
        raise ValueError(f"temperature is {options.temperature}: give 0 for greedy, or more")
    for name in ("max_new_tokens", "batch_size"):
        if getattr(options, name) < 1:
            raise ValueError(f"{name} is {getattr(options, name)}: give at least 1")
    if bool(options.prompt) == bool(options.prompts):
        raise ValueError("give either --prompt TEXT (any number of times) or --prompts FILE")
    if options.prompts is None:
        prompts = list(options.prompt)
        if not all(prompt.strip() for prompt in prompts):
            raise ValueError("the prompt is empty: give some text to continue")
        return prompts
    return [line for line in read_text(options.prompts).replace("\r\n", "\n").split("\n") if line.strip()]


def _encode(tokenizer: Any, prompts: list[str], options: Generate, encoder_decoder: bool) -> Any:
    if options.chat:
        if not tokenizer.chat_template:
            raise ValueError(f"{options.model} has no chat template: leave --chat out")
        template = ChatTemplate(tokenizer)
        turns = ([{"role": "user", "content": prompt}] for prompt in prompts)
        prompts = [template.render(chat, add_generation_prompt=True) for chat in turns]
    start, end = wrapping(tokenizer)
    encoded = (without_start(ids, start) for ids in encode(prompts, tokenizer))
    rows = [start + ids + (end if encoder_decoder else []) for ids in encoded]
    if not all(rows):
        raise ValueError("the prompt is empty: give some text to continue")
    return padded([torch.tensor(row) for row in rows], "right" if encoder_decoder else "left")


def _decode(model: PreTrainedModel, tokenizer: Any, batches: list[dict[str, Tensor]], options: Generate) -> Generated:
    sampling = (
        {"do_sample": True, "temperature": options.temperature, "top_p": options.top_p, "top_k": options.top_k}
        if options.temperature
        else GREEDY
    )
    run, stops = Generated(), stop_ids(model, tokenizer)
    streams = len(batches) == 1 and len(batches[0]["input_ids"]) == 1
    with _shown(tokenizer, streams, len(batches) * options.max_new_tokens) as (streamer, waits):

        @contextmanager
        def preparing(what: str) -> Iterator[None]:
            began = time.perf_counter()
            with waits(what):
                yield
            run.prepared.append(what)
            run.preparing += time.perf_counter() - began

        for index, inputs in enumerate(batches):
            began, clock = time.perf_counter() - run.preparing, Clock(streamer())
            completions = complete(
                model,
                inputs,
                stops,
                compile=options.compile,
                preparing=preparing,
                seed=options.seed + index,
                max_new_tokens=options.max_new_tokens,
                pad_token_id=tokenizer.pad_token_id,
                streamer=clock,
                **sampling,
            )
            run.seconds += time.perf_counter() - run.preparing - began
            run.first += clock.times[1] - run.preparing - began
            run.completions += completions
            run.texts += [tokenizer.decode(one.new, skip_special_tokens=True) for one in completions]
    if not streams:
        print("\n\n".join(run.texts), flush=True)
    return run


def _summary(run: Generated) -> str:
    said = f"{sum(run.tokens)} tokens in {run.seconds:.2f} s"
    if run.later_per_second is not None:
        said += f": {run.first:.2f} s until the first, then {run.later_per_second:.1f} a second"
    return said + (f"; {run.preparing:.1f} s of preparing before" if run.preparing else "")


@contextmanager
def _shown(
    tokenizer: Any, streams: bool, total: int
) -> Iterator[tuple[Callable[[], BaseStreamer], Callable[[str], AbstractContextManager[None]]]]:
    """What each call of ``generate`` gets, and what shows that a step is being prepared.

    The text goes to stdout; where several prompts run, a bar of tokens takes its place.
    """
    if streams:
        yield lambda: TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True), waiting
        return
    with bar() as progress:
        task = progress.add_task("tokens of each prompt", total=total)
        yield lambda: _Steps(lambda: progress.advance(task)), lambda what: waiting(what, progress)


class _Steps(BaseStreamer):
    """Calls ``advance`` for every token after the prompt."""

    def __init__(self, advance: Callable[[], None]) -> None:
        self._advance, self._prompt_seen = advance, False

    def put(self, value: Tensor) -> None:
        if self._prompt_seen:
            self._advance()
        self._prompt_seen = True

    def end(self) -> None:
        pass
