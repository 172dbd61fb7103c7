"""A ``Trainer`` that stops when training has diverged. It saves only finite weights, and the error says what to do."""

import math
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any, NamedTuple, cast

import torch
from accelerate.utils import gather
from torch import Tensor, nn
from transformers import Trainer

from lte.modules.evaluating import evaluating
from lte.surgery.stages import Stage
from lte.training.checkpoints import checkpoints_in, flaw_of, rotate

_MOST = 10_000  # numbers that are kept until they are checked
_SMALL_LOSS = 1e-3  # at a smaller loss the gradient may be 0
_SMALLEST_SCALE = 1e-4  # scale of a loss in fp16: each halving is a step that was skipped


class Seen(NamedTuple):
    """A number of a training step. It stays on its device until it is checked."""

    step: int
    name: str  # loss or gradient norm
    value: Tensor


class Sign(NamedTuple):
    """A sign that training has diverged: the step, a description, and a cure besides a lower learning rate."""

    step: int
    what: str
    cure: str = ""
    after: bool = False  # the step's update was still made from finite numbers


class WatchedTrainer(Trainer):
    """Checks losses, gradient norms and weights, and raises ValueError if they show that training has diverged.

    The signs are:
    - a loss or gradient norm that is NaN or infinite;
    - a gradient of exactly 0 at a loss above 0, because values overflowed;
    - weights, or outputs of the last batch, that are not finite.

    Steps are checked when the log is written, before each save and at the end. Weights and outputs are checked before
    each save and at the end. So no step waits for a check. In fp16 the gradient scaler skips steps whose gradients
    overflow. This is a sign only if it skips all of them.
    """

    @property
    def stage(self) -> Stage | None:
        """The current stage; None in a run without stages."""
        return None

    def __init__(self, *args: Any, **kwargs: Any):
        self._seen: deque[Seen] = deque(maxlen=_MOST)
        self._last_batch: dict[str, Any] | None = None
        super().__init__(*args, **kwargs)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self._seen.clear()
        result = super().train(*args, **kwargs)
        self.stop_if_diverged()
        if self.args.should_save and (found := checkpoints_in(cast(str, self.args.output_dir))):
            rotate(found[0], self.args.save_total_limit, self.state.best_model_checkpoint)
        return result

    def training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        self._last_batch = inputs
        loss = super().training_step(model, inputs, *args, **kwargs)
        self._seen.append(Seen(self.state.global_step + 1, "loss", loss.detach().float().clone()))
        return loss

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> Any:
        norm: Any = super()._get_grad_norm(*args, **kwargs)
        if norm is not None and self.accelerator.mixed_precision != "fp16":
            value = norm.full_tensor() if hasattr(norm, "full_tensor") else torch.as_tensor(norm)
            self._seen.append(Seen(self.state.global_step + 1, "gradient norm", value.detach().float()))
        return norm

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        super().log(logs, *args, **kwargs)
        if "loss" in logs:
            self.stop_if_diverged(weights=False)

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        self.stop_if_diverged()
        super().save_model(*args, **kwargs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        output = super().evaluation_loop(*args, **kwargs)
        for name, value in (output.metrics or {}).items():
            if name.endswith("_loss") and not math.isfinite(value) and self.is_in_train and self.state.global_step:
                self.stop_if_diverged()
                self._stop(Sign(self.state.global_step, f"{name} is {value}", "or see that each batch has a label"))
        return output

    def stop_if_diverged(self, weights: bool = True) -> None:
        """Check the steps since the last call, on all ranks, and the weights if ``weights`` is true.

        Raises:
            ValueError: training has diverged. The message names step, stage, and the first weight or module.
        """
        sign = self._sign_of_steps() or self._sign_of_scale()
        if sign is None and weights:
            if self._weights_not_finite():
                sign = Sign(self.state.global_step, "not all weights are finite after it", after=True)
            elif self._overflows():
                sign = Sign(self.state.global_step, "not all outputs are finite after it", after=True)
        if self._anywhere(sign is not None):
            self._stop(sign or Sign(self.state.global_step, "another process found it"))

    def _sign_of_steps(self) -> Sign | None:
        """Return the first sign in the steps since the last check."""
        seen, loss = list(self._seen), 0.0
        self._seen.clear()
        if not seen:
            return None
        device = seen[0].value.device
        values = torch.stack([one.value.to(device).reshape(()) for one in seen]).tolist()
        for (step, name, _), value in zip(seen, values, strict=True):
            if not math.isfinite(value):
                return Sign(step, f"the {name} is {value}")
            if name == "loss":
                loss = value
            elif value == 0 and loss > _SMALL_LOSS and not self.is_deepspeed_enabled:
                return Sign(step, f"the gradient is 0 at a loss of {loss:.3g}: values overflow on the way to it")
        return None

    def _sign_of_scale(self) -> Sign | None:
        scaler = self.accelerator.scaler
        if scaler is None or scaler.get_scale() > _SMALLEST_SCALE:
            return None
        step = self.state.global_step
        return Sign(step, "gradients in fp16 overflowed at each of many steps", "or bf16, or no fp16")

    def _anywhere(self, found: bool) -> bool:
        """Return whether any process found a sign, so that all of them stop together."""
        if self.accelerator.num_processes == 1:
            return found
        return bool(cast(Tensor, gather(torch.tensor([found], device=self.accelerator.device))).any())

    def _stop(self, sign: Sign) -> None:
        stage = f" in the {self.stage} stage" if self.stage else ""
        raise ValueError(
            f"training diverged{stage}, at step {sign.step} of {self.state.max_steps}: {sign.what}; {self._where()}. "
            f"Train anew with a lower {self._rates()} {sign.cure}".rstrip()
            + self._kept(sign)
        )

    def _where(self) -> str:
        broken, count = self._weights_not_finite(), sum(1 for _ in cast(nn.Module, self.model).parameters())
        if broken:
            return f"{len(broken)} of {count} weights hold NaN or infinities, first {broken[0]}"
        module = self._first_overflow()
        return "all weights are finite" + (f", outputs are not, first that of {module}" if module else "")

    def _rates(self) -> str:
        """Return the options that decide the size of this stage's steps, with their values."""
        names = ["learning_rate"]
        if self.stage == "dense" and getattr(self.args, "dense_learning_rate", None):
            names = ["dense_learning_rate"]
        elif self.stage == "soft":
            names.append("router_learning_rate")
        return " or ".join(f"{name} than {getattr(self.args, name):g}" for name in names if hasattr(self.args, name))

    def _kept(self, sign: Sign) -> str:
        """Return a sentence about the newest checkpoint whose next step succeeded."""
        before = sign.step - (not sign.after)
        for one in checkpoints_in(cast(str, self.args.output_dir)):
            if int(one.name.rpartition("-")[2]) < before and flaw_of(one) is None:
                return f". {one} is good: it is kept, and can be the model of a new run"
        return ""

    def _weights_not_finite(self) -> list[str]:
        """Return names of parameters and buffers with NaN or infinities, in the model's order."""
        return weights_not_finite(self.accelerator.unwrap_model(cast(nn.Module, self.model)))

    def _overflows(self) -> bool:
        """Return whether outputs of the last batch are not finite. A compiled or sharded model is not checked."""
        if self._last_batch is None or self.args.torch_compile:
            return False
        outputs = {name: one for name, one in (self._forward() or {}).items() if name != "loss"}  # a mean over no label
        return not all(bool((one < math.inf).all()) for one in _floats(outputs))  # -inf may be a mask

    def _first_overflow(self) -> str | None:
        """Return the first module with outputs of the last batch that are not finite; None if there is none."""
        if self._last_batch is None:
            return None
        found: list[str] = []
        with ExitStack() as hooks:
            for name, module in self.accelerator.unwrap_model(cast(nn.Module, self.model)).named_modules():

                def look(_module: nn.Module, _args: Any, output: Any, name: str = name) -> None:
                    if not found and not all(bool(one.isfinite().all()) for one in _floats(output)):
                        found.append(name or "the loss")

                hooks.callback(module.register_forward_hook(look).remove)
            self._forward()
        return found[0] if found else None

    @torch.no_grad()
    def _forward(self) -> Any:
        """Return the model's outputs for the last batch, computed as in an evaluation."""
        model = self.accelerator.unwrap_model(cast(nn.Module, self.model))
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return None
        with evaluating(model), self.accelerator.autocast():
            return model(**self._prepare_inputs(cast(dict[str, Any], self._last_batch)))


@torch.no_grad()
def weights_not_finite(model: nn.Module) -> list[str]:
    """Return names of a model's parameters with NaN or infinities, in its order. It waits once for the device."""
    finite: dict[str, Tensor] = {}
    for name, one in model.named_parameters():
        here: Tensor = one.to_local() if hasattr(one, "to_local") else one  # pyright: ignore  # of a sharded one
        finite[name] = here.isfinite().all()
    if not finite:
        return []
    device = next(iter(finite.values())).device
    flags = torch.stack([one.to(device) for one in finite.values()]).tolist()
    return [name for name, flag in zip(finite, flags, strict=True) if not flag]


def _floats(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, dict):
        yield from (tensor for one in output.values() for tensor in _floats(one))
    elif isinstance(output, (list, tuple)):
        yield from (tensor for one in output for tensor in _floats(one))
