"""``lte generate``: continue a prompt, token by token on stdout."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from transformers import TextStreamer, set_seed

from lte.cli.console import err
from lte.cli.main import parse
from lte.cli.options import DeviceOptions, Model, generating_head, open_model
from lte.modules.recording import SparsityMeter, track_sparsity
from lte.surgery.loading import load_config, load_tokenizer


@dataclass
class Generate:
    model: Model
    """A local folder, a hub id, or a .gguf file; dense or sparse."""
    prompt: str
    """Text to continue."""
    max_new_tokens: int = 128
    """At most so many tokens."""
    temperature: float = 0.0
    """0 is greedy; above, tokens are sampled."""
    top_p: float = 1.0
    """Sample from the most likely tokens that together have this probability."""
    top_k: int = 50
    """Sample from so many most likely tokens; 0 takes all."""
    chat: bool = False
    """Put the prompt into the tokenizer's chat template."""
    seed: int = 0
    """Of sampling."""
    where: DeviceOptions = field(default_factory=DeviceOptions)


@torch.no_grad()
def main(argv: Sequence[str]) -> None:
    options: Generate = parse(Generate, "generate", argv)
    if options.temperature < 0:
        raise ValueError(f"temperature is {options.temperature}: give 0 for greedy, or more")
    if options.max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {options.max_new_tokens}: give at least 1")
    device, dtype = options.where.resolve()
    config = load_config(options.model)
    tokenizer = load_tokenizer(options.model)
    model = open_model(options.model, generating_head(config), device, dtype).eval()
    text = options.prompt
    if options.chat:
        if not tokenizer.chat_template:
            raise ValueError(f"{options.model} has no chat template: leave --chat away")
        turn = [{"role": "user", "content": text}]
        text = str(tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True))
    inputs = tokenizer(text, return_tensors="pt", add_special_tokens=not options.chat).to(device)
    if inputs["input_ids"].shape[1] == 0:
        raise ValueError("the prompt is empty: give some text to continue")
    set_seed(options.seed)
    sampling = (
        {"do_sample": True, "temperature": options.temperature, "top_p": options.top_p, "top_k": options.top_k}
        if options.temperature
        else {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    )
    with track_sparsity(model) if hasattr(config, "lte") else nullcontext(SparsityMeter()) as meter:
        model.generate(  # pyright: ignore[reportCallIssue]
            **inputs,
            **sampling,
            max_new_tokens=options.max_new_tokens,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
            streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
        )
    if hasattr(config, "lte"):
        err.print(f"sparsity {meter.overall:.1%} (mode {config.lte['mode']})")
