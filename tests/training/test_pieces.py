"""The loss in pieces is the loss of all logits at once."""

import pytest
import torch
from tiny_models import relative_rms
from tiny_training import dense_llama, trainer_for
from torch.nn import functional as F
from transformers import Gemma2Config, Gemma2ForCausalLM

from lte.training import pieces
from lte.training.pieces import PiecewiseLoss, check_pieces, headless


def by_step(trainer, name):
    return {logs["step"]: logs[name] for logs in trainer.state.log_history if name in logs}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("share", [0.0, 0.9])
def test_value_and_gradients(monkeypatch, share, dtype):
    monkeypatch.setattr(pieces, "_LOGITS", 3 * 11)  # three tokens a piece, of 20
    torch.manual_seed(0)
    head, other = (torch.nn.Linear(8, 11).to(dtype) for _ in range(2))
    hidden = torch.randn(2, 10, 8).to(dtype).requires_grad_()
    teacher = torch.randn(2, 10, 8).to(dtype)
    labels = torch.randint(0, 11, (2, 10))
    labels[0, ::3] = -100
    counted = F.pad(labels[:, 1:], (0, 1), value=-100).flatten()
    mask = counted != -100
    logits, target = head(hidden).float().flatten(0, 1)[mask], other(teacher).detach().float().flatten(0, 1)[mask]
    cross_entropy = F.cross_entropy(logits, counted[mask])
    kl = F.kl_div(logits.log_softmax(-1), target.softmax(-1), reduction="batchmean")
    expected = (1 - share) * cross_entropy + share * kl
    trained = (hidden, head.weight, head.bias)
    gradients = torch.autograd.grad(2 * expected, trained)

    loss = PiecewiseLoss(head, teacher if share else None, other if share else None, share)
    found = loss(hidden, labels, 11)
    close = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 3e-2, "atol": 3e-3}
    torch.testing.assert_close(found, expected, **close)
    torch.testing.assert_close(loss.parts[0], cross_entropy.detach(), **close)
    for one, other_one in zip(torch.autograd.grad(2 * found, trained), gradients, strict=True):
        assert one.dtype == dtype
        torch.testing.assert_close(one, other_one, **close)


@pytest.mark.parametrize("options", [{}, pytest.param({"lora_rank": 4}, marks=pytest.mark.slow)], ids=["full", "lora"])
def test_a_run_with_it_is_the_same(tmp_path, monkeypatch, options):
    expected = trainer_for(tmp_path / "whole", **options)
    expected.train()
    monkeypatch.setattr(pieces, "_LOGITS", 64 * 7)
    checkpointing = {"gradient_checkpointing": True} if options else {}
    found = trainer_for(tmp_path / "pieces", loss_in_pieces=True, **options, **checkpointing)
    found.train()
    for name in ("loss", "task_loss", "distillation_loss", "sparsity", "grad_norm"):
        assert by_step(found, name) == pytest.approx(by_step(expected, name), rel=1e-3, abs=1e-6), name
    for name, value in found.model.state_dict().items():
        assert relative_rms(value, expected.model.state_dict()[name]) < 1e-3, name


def test_without_its_head_a_model_gives_hidden_states():
    model, ids = dense_llama(), torch.arange(3, 9)[None]
    with torch.no_grad():
        logits = model(ids).logits
        with headless(model.lm_head):
            hidden = model(ids).logits
        assert torch.equal(model.lm_head(hidden), logits)
        assert torch.equal(model(ids).logits, logits)


def test_a_model_that_changes_its_logits_is_refused():
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 20, "head_dim": 4}
    config = Gemma2Config(**shape, num_attention_heads=4, num_key_value_heads=4)
    with pytest.raises(ValueError, match="changes the logits of its head"):
        check_pieces(Gemma2ForCausalLM(config))
    assert check_pieces(dense_llama()) is not None


def test_what_it_does_not_go_with(tmp_path):
    with pytest.raises(ValueError, match="torch_compile"):
        trainer_for(tmp_path, loss_in_pieces=True, torch_compile=True)
    with pytest.raises(ValueError, match="label_smoothing_factor"):
        trainer_for(tmp_path, loss_in_pieces=True, label_smoothing_factor=0.1)
