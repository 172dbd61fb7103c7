import pytest
import torch
from tiny_models import tiny_inputs, tiny_model

from lte.surgery.activations import first_tokens, record_inputs
from lte.surgery.sites import find_sites


def batch(rows, length, padded=0):
    mask = torch.ones(rows, length, dtype=torch.long)
    mask[0, length - padded :] = 0
    return {"input_ids": torch.full((rows, length), 5), "attention_mask": mask}


def test_first_tokens_counts_what_is_not_padding():
    data = [batch(2, 5, padded=3), batch(2, 5), batch(2, 5)]  # 7, 10 and 10 tokens
    assert [len(first_tokens(data, count)) for count in (0, 1, 7, 8, 17, 18, 1000)] == [0, 1, 1, 2, 2, 3, 3]
    assert first_tokens([batch(1, 4, padded=4)], 5) == []
    assert len(first_tokens([{"input_ids": torch.ones(2, 5)}] * 3, 11)) == 2


def test_records_up_to_so_many_tokens_of_each_module():
    model = tiny_model("llama").train()
    sites = find_sites(model, "llama")
    wanted = [(sites[0].name, sites[0].first, torch.clone)]
    wanted.append((sites[1].name, sites[1].down, lambda hidden_TF: hidden_TF.sum(0, keepdim=True)))
    x_TD, sums = record_inputs(model, wanted, [batch(2, 5, padded=3), batch(2, 5), batch(2, 5)], 9)
    assert x_TD.shape == (9, 32)
    assert sums.shape == (2, 64)  # a row a batch; the third is not run
    assert model.training
    assert not any(module._forward_pre_hooks for site in sites for module in site.projections().values())


def test_encoder_decoder_masks_are_told_apart():
    model = tiny_model("t5")
    inputs = tiny_inputs("t5")  # 2 x 7 tokens, of which the decoder has 2 x 5
    inputs["attention_mask"][0, 4:] = 0
    sites = find_sites(model, "t5")
    recorded = record_inputs(model, [(site.name, site.down, torch.clone) for site in sites], [inputs], 100)
    assert [len(one) for one in recorded] == [11, 11, 10, 10]


def test_nothing_but_padding():
    model = tiny_model("llama")
    site = find_sites(model, "llama")[0]
    for data in ([], [batch(1, 4, padded=4)]):
        with pytest.raises(ValueError, match="the data is empty"):
            record_inputs(model, [(site.name, site.down, torch.clone)], data, 10)
