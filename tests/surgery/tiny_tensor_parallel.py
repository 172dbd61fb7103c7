"""One process of tensor parallelism: ``torchrun --nproc-per-node 2 tiny_tensor_parallel.py FOLDER``.

Every family with a plan, in all modes, beside the same model whole in this process. Writes what it found to
``FOLDER/RANK.json``. On a machine with two GPUs the same goes over NCCL.
"""

import json
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tiny_models
import torch
import transformers
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, PreTrainedModel

import lte
from lte.modules.recording import record_scores, sparse_layers, track_inputs
from lte.surgery.families import known_families

try:
    from transformers.distributed import DistributedConfig
except ImportError:  # transformers before it had one
    DistributedConfig = None

warnings.simplefilter("ignore", FutureWarning)  # tp_plan="auto" is the older spelling

EXPERT_SIZE = 8
MODES = ("dense", "soft", "hard")


def families() -> list[str]:
    """Those that transformers has a plan for."""
    return [name for name in known_families() if AutoConfig.for_model(name).base_model_tp_plan]


def sparse(model_type: str, method: Any = None, **overrides: Any) -> PreTrainedModel:
    """Its routers and compensation drawn at random, so that each expert is open for some tokens only."""
    method = method or lte.LTEConfig(expert_size=EXPERT_SIZE, grouping="random", compensation_rank=4)
    data = [tiny_models.tiny_inputs(model_type, rows=8, length=16)]
    model = lte.sparsify_(tiny_models.tiny_model(model_type, **overrides), method, data)
    for layer in sparse_layers(model).values():
        tiny_models.randomise_(layer.router)
        if layer.compensation is not None:
            tiny_models.randomise_(layer.compensation)
    lte.set_mode_(model, "hard")
    return model


def load(folder: Path, model_type: str, **how: Any) -> PreTrainedModel:
    auto = getattr(transformers, f"AutoModelFor{tiny_models.SHAPES[model_type][0]}")
    return auto.from_pretrained(folder, **how)


def logits_of(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**{name: value.to(model.device) for name, value in inputs.items()}).logits.float().cpu()


def whole_beside_shared(folder: Path, model_type: str, method: Any = None) -> tuple[PreTrainedModel, PreTrainedModel]:
    if rank() == 0:
        sparse(model_type, method).save_pretrained(folder)
    torch.distributed.barrier()
    whole = load(folder, model_type)
    shared = load(folder, model_type, tp_plan="auto")
    return whole.to(shared.device), shared


def rank() -> int:
    return int(os.environ["RANK"])


def family(folder: Path, model_type: str) -> dict[str, Any]:
    """Relative errors of the logits by mode, with compensation and without, and what else one pair of models shows."""
    whole, shared = whole_beside_shared(folder, model_type)
    inputs = tiny_models.tiny_inputs(model_type)
    found: dict[str, Any] = {}
    for compensation in ("with", "without"):
        for mode in MODES:
            outputs = []
            for model in (whole, shared):
                lte.set_mode_(model, mode)
                if compensation == "without":
                    for layer in sparse_layers(model).values():
                        layer.compensation = None
                outputs.append(logits_of(model, inputs))
            found[f"{mode} {compensation} compensation"] = tiny_models.relative_rms(outputs[1], outputs[0])
    found |= {"sparsity": recorded(whole, shared, inputs)}
    return found


def recorded(whole: PreTrainedModel, shared: PreTrainedModel, inputs: dict[str, Tensor]) -> list[float]:
    """Sparsity that each of both measures; the largest difference of their scores."""
    measured, scores = [], []
    for model in (whole, shared):
        with lte.track_sparsity(model) as meter, record_scores(model) as recording:
            logits_of(model, inputs)
        measured.append(meter.overall)
        scores.append(torch.stack(list(recording.scores.values())).float())
    return [*measured, float((scores[0] - scores[1]).abs().max())]


def gradients(folder: Path, model_type: str) -> dict[str, float]:
    """Relative errors of weights' gradients in mode soft, of logits and recorded scores together."""
    whole, shared = whole_beside_shared(folder, model_type)
    inputs = tiny_models.tiny_inputs(model_type)
    for model in (whole, shared):
        lte.set_mode_(model, "soft")
        with record_scores(model) as recording:
            logits = model(**{name: value.to(model.device) for name, value in inputs.items()}).logits
            scores = torch.stack(list(recording.scores.values()))
        (logits.square().mean() + scores.square().mean()).backward()
    expected = {name: weight.grad for name, weight in whole.named_parameters()}
    found = {}
    for name, weight in shared.named_parameters():  # older transformers rename biases and have no DTensors
        grad = weight.grad.full_tensor() if isinstance(weight.grad, DTensor) else weight.grad
        if name in expected and grad is not None and grad.shape == expected[name].shape:
            found[name] = tiny_models.relative_rms(grad, expected[name])
    return found


def saved_again(folder: Path, model_type: str) -> dict[str, Any]:
    """A model saved under tensor parallelism beside the folder that it was loaded from, as ``equal`` and ``logits``."""
    whole, shared = whole_beside_shared(folder / "first", model_type)
    shared.save_pretrained(folder / "again")  # whole when it returns, in both processes
    again = load(folder / "again", model_type).to(whole.device)
    shared_again = load(folder / "again", model_type, tp_plan="auto")
    inputs = tiny_models.tiny_inputs(model_type)
    before, after = whole.state_dict(), again.state_dict()
    return {
        "same weights": before.keys() == after.keys()
        and all(torch.equal(before[name], after[name]) for name in before),
        "same section": again.config.lte == whole.config.lte,
        "whole": tiny_models.relative_rms(logits_of(again, inputs), logits_of(whole, inputs)),
        "shared": tiny_models.relative_rms(logits_of(shared_again, inputs), logits_of(whole, inputs)),
    }


METHODS = {
    "moefication-oracle": lte.MoEficationConfig(expert_size=8, grouping="random", selection="oracle"),
    "moefication-mlp": lte.MoEficationConfig(expert_size=8, grouping="random", fit_epochs=2),
    "deja-vu": lte.DejaVuConfig(fit_epochs=2, tokens=300),
    "cats": lte.CATSConfig(tokens=300),
    "static-pruning": lte.StaticPruningConfig(),
    "topk-moe": lte.TopKMoEConfig(expert_size=8, grouping="random"),
    "sigma-moe": lte.SigmaMoEConfig(expert_size=8, grouping="random"),
    "noisy-topk": lte.NoisyTopKConfig(expert_size=8, grouping="random"),
}


def other_method(folder: Path, model_type: str, method: Any) -> dict[str, Any]:
    whole, shared = whole_beside_shared(folder, model_type, method)
    inputs = tiny_models.tiny_inputs(model_type)
    error = tiny_models.relative_rms(logits_of(shared, inputs), logits_of(whole, inputs))
    return {"hard": error, "sparsity": recorded(whole, shared, inputs)}


def teal(folder: Path) -> float:
    if rank() == 0:
        data = [tiny_models.tiny_inputs("llama", rows=8, length=16)]
        lte.teal_(tiny_models.tiny_model("llama"), lte.TEALConfig(), data).save_pretrained(folder)
    torch.distributed.barrier()
    whole, shared = load(folder, "llama"), load(folder, "llama", tp_plan="auto")
    inputs = tiny_models.tiny_inputs("llama")
    return tiny_models.relative_rms(logits_of(shared, inputs), logits_of(whole.to(shared.device), inputs))


def spellings(folder: Path) -> dict[str, float]:
    """Relative errors in mode hard, by how tensor parallelism is asked for; tokens of ``generate`` that differ."""
    from accelerate import Accelerator
    from accelerate.parallelism_config import ParallelismConfig

    whole, shared = whole_beside_shared(folder, "llama")
    inputs = tiny_models.tiny_inputs("llama")
    asked: dict[str, Any] = {"tp_plan": {"tp_plan": "auto"}, "tp_size": {"tp_plan": "auto", "tp_size": 2}}
    if DistributedConfig is not None:
        asked["DistributedConfig"] = {"distributed_config": DistributedConfig(tp_size=2)}
    models = {name: load(folder, "llama", **how) for name, how in asked.items()}
    if torch.cuda.is_available():  # accelerate has it on accelerators only
        models["accelerate"] = Accelerator(parallelism_config=ParallelismConfig(tp_size=2)).prepare(shared)
    expected = logits_of(whole, inputs)
    found = {name: tiny_models.relative_rms(logits_of(model, inputs), expected) for name, model in models.items()}
    prompt = {name: value.to(whole.device) for name, value in inputs.items()}
    texts = [model.generate(**prompt, max_new_tokens=8, do_sample=False) for model in (whole, models["tp_plan"])]
    found["generate"] = float(texts[0].ne(texts[1]).sum())
    for model in (whole, models["tp_plan"]):
        lte.calibrate_(model, [prompt], 0.7)
    found["calibrate_"] = tiny_models.relative_rms(logits_of(models["tp_plan"], inputs), logits_of(whole, inputs))
    return found


def message_of(call: Callable[[], Any]) -> str:
    try:
        call()
    except ValueError as error:
        return str(error)
    return ""


def refusals(folder: Path) -> dict[str, str]:
    """What each way to ask for what cannot be done says."""
    if rank() == 0:
        model = sparse("llama", lte.LTEConfig(expert_size=32, grouping="random"), intermediate_size=96)
        model.save_pretrained(folder / "three")
        tiny_models.tiny_model("llama").save_pretrained(folder / "dense")
    torch.distributed.barrier()
    whole, shared = whole_beside_shared(folder / "four", "llama")
    dense = load(folder / "dense", "llama", tp_plan="auto")
    data = [tiny_models.tiny_inputs("llama")]
    cpu = not torch.cuda.is_available()
    args = lte.LTETrainingArguments(
        str(folder / "out"), schedule="paper", eta=0.1, max_steps=1, use_cpu=cpu, report_to="none"
    )
    rows = [{"input_ids": row, "labels": row} for row in data[0]["input_ids"]]
    by_hand = torch.distributed.tensor.parallel
    mesh = shared._device_mesh
    mesh = mesh if mesh.ndim == 1 else mesh["tp"]
    for layer in whole.model.layers:
        plan = {"gate_proj": by_hand.ColwiseParallel(), "up_proj": by_hand.ColwiseParallel()}
        by_hand.parallelize_module(layer.mlp, mesh, {**plan, "down_proj": by_hand.RowwiseParallel()})
    return {
        "uneven": message_of(lambda: load(folder / "three", "llama", tp_plan="auto")),
        "optimize_": message_of(lambda: lte.optimize_(shared)),
        "densify": message_of(lambda: lte.densify(shared)),
        "sparsify_": message_of(lambda: lte.sparsify_(dense, lte.LTEConfig(expert_size=8))),
        "teal_": message_of(lambda: lte.teal_(dense, lte.TEALConfig(), data)),
        "prune_": message_of(lambda: lte.prune_(dense, lte.MagnitudeConfig())),
        "track_inputs": message_of(lambda: track_inputs(shared, {"down": nn.Linear(2, 2)}).__enter__()),
        "train": message_of(lambda: lte.LTETrainer(shared, args, train_dataset=rows).train()),
        "by hand": message_of(lambda: logits_of(whole, data[0])),
    }


def main(folder: Path) -> None:
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.backends.cuda.matmul.allow_tf32 = False
    torch.set_num_threads(1)
    torch.distributed.init_process_group("nccl" if cuda else "gloo")
    found = {"families": {name: family(folder / name, name) for name in families()}}
    found["gradients"] = {
        name: gradients(folder / f"gradients-{name}", name) for name in ("llama", "phi3", "starcoder2")
    }
    found["saved"] = {name: saved_again(folder / f"saved-{name}", name) for name in ("llama", "phi3")}
    found["methods"] = {
        name: {kind: other_method(folder / f"{name}-{kind}", kind, method) for kind in ("llama", "phi3")}
        for name, method in METHODS.items()
    }
    found |= {"teal": teal(folder / "teal"), "spellings": spellings(folder / "spellings")}
    found["refusals"] = refusals(folder / "refusals")
    (folder / f"{rank()}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
