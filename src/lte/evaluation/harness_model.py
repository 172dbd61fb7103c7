"""`LoopLM`: a model as lm_eval sees it. It generates by our loop, and sparsity is measured beside the answers."""

import inspect
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from lm_eval.models import huggingface
from lm_eval.models.utils import normalize_gen_kwargs
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteriaList

from lte.data.tokenise import wrapping
from lte.evaluation.generation import COMPILED_FROM
from lte.evaluation.measuring import check_finite, measure
from lte.inference.completions import GREEDY, Completion, complete, padded, stop_ids
from lte.inference.ends import Until
from lte.modules.sparsity_meter import SparsityMeter
from lte.surgery.conversion import is_sparse

_HFLM: Any = huggingface.HFLM  # its decorators hide the class from the type checker


class _Counted(nn.Module):
    """Calls a model. A meter of this module counts the tokens of the first argument, a mask ``[B, T]``."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, attention_mask: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)


class LoopLM(_HFLM):
    """lm_eval's ``HFLM`` with the same answers.

    Args:
        model: a causal language model, on its device.
        tokenizer: the model's.
        batch_size: rows of a forward pass.
        progress: wraps the iteration over batches of generated texts, while their sparsity is measured.

    Attributes:
        meters: of passes over all tokens: of scored rows, and of prompts with their generated texts.
        of_new: the meter of generated tokens alone; None if there are none, or the model is dense.
        new_tokens: the number of generated tokens.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int,
        progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
    ) -> None:
        bos = bool(wrapping(tokenizer)[0])  # versions of HFLM have different defaults
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, add_bos_token=bos)
        self.meters: list[SparsityMeter] = []
        self.of_new: SparsityMeter | None = None
        self.new_tokens = 0
        self._all = _Counted(model)
        self._new = _Counted(self._all)
        self._stops, self._progress = stop_ids(model, tokenizer), progress
        self._completions: list[Completion] = []
        self._compile: bool | None = None

    def _loglikelihood_tokens(self, *args: Any, **kwargs: Any) -> Any:
        with measure(self.model, self._all) as meter:
            answers = super()._loglikelihood_tokens(*args, **kwargs)
        self.meters.append(meter)
        return answers

    def _model_call(self, inps: Tensor, *_: Any, **__: Any) -> Tensor:
        with torch.no_grad():
            logits_BTV = self._all(not_padding(inps), inps).logits
        check_finite(self.model, logits_BTV[:, -1])
        return logits_BTV

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Return a text for each request. Decoding is not recorded: its tokens pass through the model once more."""
        asked: list[Any] = [normalize_gen_kwargs(one.args[1], self.max_gen_toks) for one in requests]
        most = max(one["max_gen_toks"] for one in asked)
        if most >= self.max_length:
            raise ValueError(f"a task writes up to {most} tokens, but the model has {self.max_length} positions")
        steps = -(-len(requests) // self.batch_size) * most
        self._compile = None if steps >= COMPILED_FROM else False
        self._completions = []
        texts = super().generate_until(requests, disable_tqdm)
        self.new_tokens += sum(len(one.new) for one in self._completions)
        if is_sparse(self.model.config):
            self._measure()
        return texts

    def _model_generate(
        self, context: Tensor, max_length: int, stop: list[str], attention_mask: Tensor, **options: Any
    ) -> Tensor:
        until = Until(stop, self.tokenizer, context.shape[1])
        done = complete(
            self.model,
            {"input_ids": context, "attention_mask": attention_mask},
            self._stops,
            compile=self._compile,
            max_length=max_length,
            stopping_criteria=StoppingCriteriaList([until]),
            pad_token_id=self.tokenizer.pad_token_id,
            **(options if options.get("do_sample") else options | GREEDY),
        )
        done = [replace(one, new=until.cut(one.new)) for one in done]
        self._completions += done
        new_BN = padded([one.new for one in done], token=self.tokenizer.pad_token_id)["input_ids"]
        return torch.cat([context, new_BN.to(context.device)], dim=1)

    @torch.no_grad()
    def _measure(self) -> None:
        """Pass prompts and texts through the model, and count all tokens and generated ones."""
        one_logit = "logits_to_keep" in inspect.signature(self.model.forward).parameters
        keep = {"logits_to_keep": 1} if one_logit else {}
        ordered = sorted(self._completions, key=lambda one: -len(one.prompt) - len(one.new))
        with ExitStack() as meters:
            all_tokens = meters.enter_context(measure(self.model, self._all))
            new_tokens = meters.enter_context(measure(self.model, self._new))
            for first in self._progress(range(0, len(ordered), self.batch_size)):
                some = ordered[first : first + self.batch_size]
                rows = padded([torch.cat([one.prompt, one.new]) for one in some])
                made = padded([torch.cat([torch.zeros_like(one.prompt), torch.ones_like(one.new)]) for one in some])
                ids, mask, new = (
                    one.to(self.device) for one in (rows["input_ids"], rows["attention_mask"], made["input_ids"])
                )
                self._new(new, mask, ids, **keep)
        self.meters.append(all_tokens)
        if self.of_new is None:
            self.of_new = new_tokens
        else:
            self.of_new.include(new_tokens)


def not_padding(ids_BT: Tensor) -> Tensor:
    """Return the mask of a batch that HFLM has padded on the right with token 0.

    If a shorter row itself ends in token 0, that token does not count. The model does not get this mask and does not
    need it, because no earlier token sees the padding.
    """
    padding_BT = ids_BT.eq(0).flip(-1).cumprod(-1).flip(-1)
    padding_BT[:, 0] = 0  # a row may be only a BOS that is token 0
    return 1 - padding_BT
