"""What tests of methods share: data, and an FFN that is read off a model in plain matrices."""

import torch
from tiny_models import SHAPES, tiny_inputs, tiny_model
from torch import Tensor
from transformers import PreTrainedModel

import lte


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
def measured(model: PreTrainedModel, data: list[dict[str, Tensor]]):
    """The meter after a pass over ``data``."""
    with lte.track_sparsity(model) as meter:
        for batch in data:
            model(**batch)
    return meter
