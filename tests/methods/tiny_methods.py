"""What tests of methods share: data, and an FFN that is read off a model in plain matrices."""

import torch
from tiny_models import SHAPES, tiny_inputs, tiny_model
from torch import Tensor
from transformers import PreTrainedModel

import lte
from lte.surgery.sites import find_sites


def batches(family: str, count: int = 8, rows: int = 4, length: int = 12) -> list[dict[str, Tensor]]:
    """Random tokens; a row of each batch is padded."""
    made = []
    for index in range(count):
        batch = tiny_inputs(family, rows, length)
        generator = torch.Generator().manual_seed(index)
        batch["input_ids"] = torch.randint(3, 48, batch["input_ids"].shape, generator=generator)
        if SHAPES[family][0] != "Seq2SeqLM":
            batch["attention_mask"][0, length // 2 :] = 0
        made.append(batch)
    return made


def converted(family: str, method, count: int = 8, **overrides) -> PreTrainedModel:
    return lte.sparsify_(tiny_model(family, **overrides), method, data=batches(family, count))


@torch.no_grad()
def logits(model: PreTrainedModel, family: str) -> Tensor:
    return model(**tiny_inputs(family)).logits


@torch.no_grad()
def agreement(model: PreTrainedModel, family: str, oracle) -> float:
    """Of the experts that ``oracle`` chooses by a layer's neurons, the share its router chooses, on ``batches``."""
    found, wanted = 0, 0
    lte.set_mode_(model, "dense")  # so that neurons are seen before any is left out
    for site in find_sites(model, model.config.model_type):
        seen = {}
        hooks = [
            site.first.register_forward_pre_hook(lambda _module, args, seen=seen: seen.update(x=args[0])),
            site.down.register_forward_pre_hook(lambda _module, args, seen=seen: seen.update(hidden=args[0])),
        ]
        for batch in batches(family):
            model(**batch)
            chosen_TE = oracle(seen["hidden"])
            found += int((site.installed.router(seen["x"]) & chosen_TE).sum())
            wanted += int(chosen_TE.sum())
        for hook in hooks:
            hook.remove()
    return found / wanted


@torch.no_grad()
def measured(model: PreTrainedModel, data: list[dict[str, Tensor]]):
    """The meter after a pass over ``data``."""
    with lte.track_sparsity(model) as meter:
        for batch in data:
            model(**batch)
    return meter
