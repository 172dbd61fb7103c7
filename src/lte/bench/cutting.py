"""Set thresholds on the inputs of linear layers for some tokens of a whole model, and measure what they leave out."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lte.modules.input_threshold import CUT, cut_layers
from lte.surgery.sites import linear_sites


@dataclass(frozen=True)
class Unread:
    """Numbers of weights that small inputs leave unread in a step, as a mean over steps.

    Attributes:
        ffn, attention: of a token, as fractions of all weights of these projections.
        union_ffn, union_attention: of all rows of a batch together.
        weights: of all rows together, a number of weights.
    """

    ffn: float = 0.0
    attention: float = 0.0
    union_ffn: float = 0.0
    union_attention: float = 0.0
    weights: float = 0.0


@torch.no_grad()
def cut_(model: nn.Module, tokens_BS: Tensor, share: float, first: int = 0) -> None:
    """Set the thresholds, in place, so that these tokens leave out ``share`` of the inputs from position ``first`` on.

    A threshold is set just before its layer runs, so the layers after it see what it leaves over.
    """

    def set_(_name: str, linear: nn.Module, x_BSI: Tensor) -> None:
        sizes = x_BSI[:, first:].abs().float().flatten()
        rank = round(share * len(sizes))
        linear.get_buffer(CUT).copy_(sizes.kthvalue(rank).values if rank else sizes.new_zeros(()))

    with _seeing_inputs(model, set_, before=True):
        model(input_ids=tokens_BS, use_cache=False, logits_to_keep=1)


@torch.no_grad()
def measured_unread(model: PreTrainedModel, tokens_BS: Tensor, first: int) -> Unread:
    """Return what the positions from ``first`` on leave unread. A model without thresholds leaves out nothing."""
    own: dict[str, float] = {}
    union: dict[str, float] = {}

    def count(name: str, _linear: nn.Module, x_BSI: Tensor) -> None:
        zero_BSI = x_BSI[:, first:].eq(0)
        own[name], union[name] = float(zero_BSI.float().mean()), float(zero_BSI.all(0).float().mean())

    if not cut_layers(model):
        return Unread()
    with _seeing_inputs(model, count, before=False):
        model(input_ids=tokens_BS, use_cache=False, logits_to_keep=1)
    sites = linear_sites(model, model.config.model_type)

    def unread(shares: dict[str, float], in_ffn: bool) -> tuple[float, int]:
        weights = {site.name: site.num_weights for site in sites if site.in_ffn == in_ffn}
        return sum(weights[name] * shares.get(name, 0.0) for name in weights), sum(weights.values())

    (ffn, ffns), (attention, attentions) = unread(own, True), unread(own, False)
    union_ffn, union_attention = unread(union, True)[0], unread(union, False)[0]
    return Unread(
        ffn / ffns, attention / attentions, union_ffn / ffns, union_attention / attentions, union_ffn + union_attention
    )


@contextmanager
def _seeing_inputs(model: nn.Module, look: Callable[[str, nn.Module, Tensor], None], before: bool) -> Iterator[None]:
    """Call ``look`` with the inputs of each layer with a threshold, before or after small ones became 0."""
    with ExitStack() as hooks:
        for name, linear in cut_layers(model).items():

            def see(linear: nn.Module, args: tuple[Tensor, ...], name: str = name) -> None:
                look(name, linear, args[0])

            hooks.callback(linear.register_forward_pre_hook(see, prepend=before).remove)
        yield
