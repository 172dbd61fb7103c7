"""Parity of a decoding step: its parts and the whole, against the reference, before it is timed."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lte.bench.decoding import TimedDecoder
from lte.bench.parity import TOLERANCE, parity, relative_rms
from lte.bench.routing import router_inputs
from lte.bench.synthetic import OPEN
from lte.inference.packed import PackedLayer
from lte.inference.packed_linear import PackedLinear
from lte.modules.input_threshold import CUT, cut_layers
from lte.modules.sparse_ffn import Selecting
from lte.ops.sparse_ffn import BackendName, choose
from lte.ops.sparse_linear import reference, sparse_linears

_CHECKED = 8
_SHORT = {torch.float32: 0.01, torch.bfloat16: 0.25, torch.float16: 0.25}
"""Rounding may put a token below the best one by this many standard deviations of the logits."""


def sparse_ffns(model: PreTrainedModel) -> list[Selecting]:
    """Return the sparse FFNs. TEAL's models have none."""
    return [module for module in model.modules() if isinstance(module, Selecting)]


def step_parity(model: PreTrainedModel, prompt: Tensor, backend: BackendName) -> tuple[str | None, BackendName]:
    """Return an error of the backend on a step's inputs to the first and last FFN, or None, and the backend used."""
    layers = sparse_ffns(model)
    if (wrong := _wrong_linear(model, prompt[:, :1])) is not None or not layers:
        return wrong, _linear_backend(model, prompt[:, :1])
    with router_inputs(model) as seen:
        model(input_ids=prompt[:, :1], use_cache=False)
    inputs = [x_BSD.flatten(0, -2) for x_BSD in seen.values()]
    weights = [
        cast(PackedLayer, layer).packed.weights(layer.lte_router, layer.compensation, layer.tau) for layer in layers
    ]
    return parity(inputs, weights, backend), choose(inputs[0], weights[0], backend)


def _wrong_linear(model: PreTrainedModel, tokens_B1: Tensor) -> str | None:
    """Return an error of linear layers that leave out small inputs of a step, against all weights times zeros."""
    errors: list[float] = []

    def look(linear: nn.Module, args: tuple[Tensor, ...]) -> None:
        assert isinstance(linear, PackedLinear)
        if linear.skips(x := args[0]):
            weights = linear.weights()
            errors.append(relative_rms(sparse_linears(x, [weights], linear.backend)[0], reference(x, weights)))

    with ExitStack() as hooks:
        for module in model.modules():
            if isinstance(module, PackedLinear):
                hooks.callback(module.register_forward_hook(lambda linear, args, _y: look(linear, args)).remove)
        model(input_ids=tokens_B1, use_cache=False)
    worst = max(errors, default=0.0)
    return None if worst <= TOLERANCE[model.dtype] else f"parity red: relative RMS error {worst:.3g} of a linear layer"


def _linear_backend(model: PreTrainedModel, tokens_B1: Tensor) -> BackendName:
    """Return the backend of linear layers with thresholds, for a step of these tokens."""
    packed = [module for module in model.modules() if isinstance(module, PackedLinear)]
    steps = (one.weights().rows_IO.new_zeros(*tokens_B1.shape, one.weights().rows_IO.shape[0]) for one in packed)
    return "triton" if any(one.skips(x) for one, x in zip(packed, steps, strict=True)) else "reference"


def wrong_step(lte: TimedDecoder, prompt: Tensor, seed: int) -> str | None:
    """Return an error of the first tokens that the step decodes, or None.

    An eager pass by the reference has to find each token best, or almost as good as the best. The pass reads the tokens
    that were decoded before. So if rounding decides one tie differently, later tokens are still compared. Half of the
    experts are open for all tokens meanwhile, and no input is small. With scores close to tau, or inputs close to their
    threshold, rounding would choose others. In a random model that changes all outputs after a few layers.
    """
    with fixed_choice(lte.model, seed):
        tokens = lte(prompt).tokens
        end = min(lte.prompt_tokens + _CHECKED, tokens.shape[1])
        new_BS = tokens[:, lte.prompt_tokens : end]
        with by_reference(lte.model):
            logits = lte.model(input_ids=tokens[:, : end - 1], use_cache=False, logits_to_keep=new_BS.shape[1]).logits
    logits_BSV = logits.float()
    short_BS = logits_BSV.amax(-1) - logits_BSV.gather(-1, new_BS[..., None])[..., 0]
    short = float((short_BS / logits_BSV.std(-1)).max())
    if short <= _SHORT[lte.model.dtype]:
        return None
    return f"parity red: a decoded token is {short:.3g} standard deviations below the reference's best"


@contextmanager
def fixed_choice(model: PreTrainedModel, seed: int) -> Iterator[None]:
    """Open half of the experts for every token and close the others, by router biases, inside the context.

    Thresholds on inputs are 0 meanwhile.
    """
    routers = [layer.lte_router for layer in sparse_ffns(model)]
    kept = [router.bias.clone() for router in routers]
    cuts = [linear.get_buffer(CUT) for linear in cut_layers(model).values()]
    cuts_before = [cut.clone() for cut in cuts]
    generator = torch.Generator().manual_seed(seed)
    try:
        for cut in cuts:
            cut.zero_()
        for router in routers:
            open_E = torch.rand(router.num_experts, generator=generator) < 0.5
            router.bias.copy_(torch.where(open_E, OPEN, -OPEN))
        yield
    finally:
        for router, bias in zip(routers, kept, strict=True):
            router.bias.copy_(bias)
        for cut, before in zip(cuts, cuts_before, strict=True):
            cut.copy_(before)


@contextmanager
def by_reference(model: PreTrainedModel) -> Iterator[None]:
    """Run the layers by the reference inside the context. Afterwards their ``packed`` are the same objects again."""
    layers = [cast(PackedLayer, layer) for layer in sparse_ffns(model)]
    linears = [module for module in model.modules() if isinstance(module, PackedLinear)]
    kept = [layer.packed for layer in layers]
    backends: list[BackendName] = [linear.backend for linear in linears]
    try:
        for layer in layers:
            layer.packed = replace(layer.packed, backend="reference")
        for linear in linears:
            linear.backend = "reference"
        yield
    finally:
        for layer, packed in zip(layers, kept, strict=True):
            layer.packed = packed
        for linear, backend in zip(linears, backends, strict=True):
            linear.backend = backend
