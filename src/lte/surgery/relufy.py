"""The first step of ReLUfication: it replaces a model's activation by one that gives zeros."""

import copy
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN

from lte.surgery.sites import find_sites

ReLUName = Literal["relu", "relu2"]

_NAMES = ("hidden_activation", "hidden_act", "activation_function", "activation")  # of a config's attribute


def check_activation(activation: str) -> None:
    """Raise ValueError unless the activation is ``relu`` or ``relu2``."""
    if activation not in get_args(ReLUName):
        raise ValueError(f"activation is {activation!r}, but it is one of {', '.join(get_args(ReLUName))}")


def relufy_(model: PreTrainedModel, activation: ReLUName = "relu") -> Callable[[], None]:
    """Replace the activation of every FFN of a dense model, in place and in its config.

    Other parts with an activation from the same option of the config change too, such as the head of a BERT.

    The model's function changes, so it must be fine-tuned (Mirzadeh et al., arXiv 2310.04564; ReluLLaMA). The model
    gets a new config object, and the old one does not change.

    Args:
        model: dense, of a known family.
        activation: ``relu``, or ``relu2`` (its square).

    Returns:
        A function that undoes the change.

    Raises:
        ValueError: an unknown activation or family, or a family whose config does not decide its activation.
    """
    check_activation(activation)
    sites = find_sites(model, model.config.model_type)
    config = copy.deepcopy(model.config)
    _name(config, activation, sites[0].gated)
    wanted = type(ACT2FN[activation])
    with torch.device("meta"):
        built = type(model)(config)
    places = [f"{site.name}.{site.family.act}" for site in sites]
    found = {name for name, module in built.named_modules() if type(module) is wanted}
    if not found.issuperset(places):
        raise ValueError(
            f"the config of {type(model).__name__} does not decide its activation, so it cannot be swapped: "
            "leave the option activation out"
        )
    acts = {name: model.get_submodule(name) for name in sorted(found)}  # BERT's head has this activation too
    configs: list[tuple[Any, Any]] = []
    copies: dict[int, Any] = {}
    part: Any
    for part in model.modules():  # the head and the backbone share one config object or have copies of it
        if isinstance(before := getattr(part, "config", None), PretrainedConfig):
            configs.append((part, before))
            part.config = copy.deepcopy(before, copies)
            if type(before) is type(config):
                _name(part.config, activation, sites[0].gated)
    for name in acts:
        _put(model, name, ACT2FN[activation])

    def undo() -> None:
        for name, act in acts.items():
            _put(model, name, act)
        for part, before in configs:
            part.config = before

    return undo


def _put(model: nn.Module, path: str, act: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, act)


def _name(config: Any, activation: str, gated: bool) -> None:
    """Write the activation into a config."""
    if hasattr(config, "feed_forward_proj"):  # T5
        config.feed_forward_proj = f"gated-{activation}" if gated else activation
        config.dense_act_fn = activation
    for name in _NAMES:
        if isinstance(getattr(config, name, None), str):
            setattr(config, name, activation)
