"""A whole model, dense against sparse: prefill, time per token, and the limit that bytes set."""

import copy
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from lte.bench.cutting import cut_, measured_unread
from lte.bench.decoding import Decoded, TimedDecoder
from lte.bench.llama_cpp import LlamaCpp
from lte.bench.routing import adjust_, measured_routing, random_routers_, route_
from lte.bench.step_parity import sparse_ffns, step_parity, wrong_step
from lte.bench.synthetic import layer_targets
from lte.core.accounting import cost
from lte.inference.generate import error_line
from lte.inference.optimize import optimize_
from lte.modules.input_threshold import switch_cuts_
from lte.ops.quantise import Quantised
from lte.ops.sparse_ffn import BackendName
from lte.surgery.convert import set_mode_
from lte.surgery.cost import model_shape
from lte.surgery.quantise import weights_of

_CLOSE = 0.01
_FITS = 3


@dataclass(frozen=True)
class DecodeGrid:
    """The cases to time. Without ``sparsities`` routers are not changed, because they are trained."""

    name: str
    sparsities: Sequence[float]
    batches: Sequence[int]
    attention_sparsity: float | None = None
    """The share of inputs that thresholds leave out. None does not change the thresholds."""
    backend: BackendName = "auto"
    weights: Quantised | None = None
    """How sparse is quantised. Dense is not quantised."""
    prompt_tokens: int = 128
    new_tokens: int = 256
    repeats: int = 3
    compile: bool = True
    tune: bool = False
    """Whether compiling includes coordinate descent tuning, for dense and sparse."""
    attention: str | None = None
    """One of transformers' attentions, for dense and sparse. None is the default of the model."""
    generate: bool = False
    """Whether ``model.generate`` without options is timed too."""
    peers: Sequence[str] = ()
    """Forms of :mod:`lte.bench.llama_cpp` to time beside dense and sparse, at batch 1."""
    bandwidth: float = float("nan")
    seed: int = 0


def random_model(config: PretrainedConfig, dtype: torch.dtype, device: torch.device, seed: int) -> PreTrainedModel:
    """Return a model of random weights, drawn in ``dtype`` on ``device``."""
    torch.manual_seed(seed)
    with torch.device(device):
        return cast(PreTrainedModel, AutoModelForCausalLM.from_config(config, dtype=dtype)).eval()


def be_dense_(model: PreTrainedModel) -> None:
    """Make a sparse model compute all neurons with all inputs."""
    if sparse_ffns(model):
        set_mode_(model, "dense")
    switch_cuts_(model, False)


def dense_models(model: PreTrainedModel) -> dict[str, PreTrainedModel]:
    """Return the dense contenders by name: the model, and on a CPU its copy in the other of fp32 and bf16."""
    found = {str(model.dtype).removeprefix("torch."): model.eval()}
    if model.device.type == "cpu":
        other = "float32" if model.dtype != torch.float32 else "bfloat16"
        found[other] = copy.deepcopy(model).to(getattr(torch, other))  # pyright: ignore[reportArgumentType]
    return found


@torch.no_grad()
def bench_decode(
    dense: dict[str, PreTrainedModel], sparse: PreTrainedModel, grid: DecodeGrid
) -> Iterator[dict[str, Any]]:
    """Time the grid, row by row. A row that fails, or has no parity, has ``error`` and no times.

    Args:
        dense: contenders by name. The fastest counts.
        sparse: is packed here. Its routers are drawn again if ``grid`` has sparsities.
    """
    if grid.attention is not None:
        for model in (*dense.values(), sparse):
            model.set_attn_implementation(grid.attention)
    if sparse_ffns(sparse):
        set_mode_(sparse, "hard")
    optimize_(sparse, grid.backend, grid.weights)
    if grid.sparsities:
        random_routers_(sparse, grid.seed)
    for batch in grid.batches:
        yield from _bench_batch(dense, sparse, grid, batch)
        torch._dynamo.reset()  # so that the next batch size is a new program and does not make sizes dynamic


def _bench_batch(
    dense: dict[str, PreTrainedModel], sparse: PreTrainedModel, grid: DecodeGrid, batch: int
) -> Iterator[dict[str, Any]]:
    dtype = str(sparse.dtype).removeprefix("torch.")
    row: dict[str, Any] = {"shape": grid.name, "dtype": dtype, "batch": batch, "attention": grid.attention}
    if (form := weights_of(sparse)) is not None:
        row["weights"] = form
    row |= {"prompt_tokens": grid.prompt_tokens, "new_tokens": grid.new_tokens}
    row |= {"attention_sparsity_asked": grid.attention_sparsity}
    asked_for: list[float | None] = [*grid.sparsities] or [None]
    generator = torch.Generator().manual_seed(grid.seed)
    vocabulary = sparse.config.get_text_config().vocab_size
    prompt = torch.randint(vocabulary, (batch, grid.prompt_tokens), generator=generator).to(sparse.device)
    sizes = (batch, grid.prompt_tokens, grid.new_tokens, grid.compile, grid.tune)
    began = time.perf_counter()
    try:
        if grid.attention_sparsity is not None:
            cut_(sparse, prompt, grid.attention_sparsity)
        decoders = {name: TimedDecoder(model, *sizes) for name, model in dense.items()}
        decoders["lte"] = TimedDecoder(sparse, *sizes)
        wrong = wrong_step(decoders["lte"], prompt, grid.seed)
        peers = {
            form: LlamaCpp(next(iter(dense.values())), form, grid.prompt_tokens, grid.new_tokens)
            for form in (grid.peers if batch == 1 else ())
        }
    except Exception as error:  # this batch does not fit or does not run; other batches may
        yield from ({**row, "sparsity_asked": asked, "error": error_line(error)} for asked in asked_for)
        return
    row["prepare_s"] = time.perf_counter() - began
    if wrong is not None:
        yield from ({**row, "sparsity_asked": asked, "error": wrong} for asked in asked_for)
        return
    for asked in asked_for:
        yield _bench_one(decoders, peers, grid, prompt, asked, {**row, "sparsity_asked": asked})


def _bench_one(
    decoders: dict[str, TimedDecoder],
    peers: dict[str, LlamaCpp],
    grid: DecodeGrid,
    prompt: Tensor,
    asked: float | None,
    row: dict[str, Any],
) -> dict[str, Any]:
    try:
        return _measure_one(decoders, peers, grid, prompt, asked, row)
    except Exception as error:  # this row is lost, not the table
        return {**row, "error": error_line(error)}


def _measure_one(
    decoders: dict[str, TimedDecoder],
    peers: dict[str, LlamaCpp],
    grid: DecodeGrid,
    prompt: Tensor,
    asked: float | None,
    row: dict[str, Any],
) -> dict[str, Any]:
    lte = decoders["lte"]
    if asked is not None:
        _fit_(lte, prompt, asked, grid)
    wrong, used = step_parity(lte.model, prompt, grid.backend)
    row["backend"] = used
    if wrong is not None:
        return {**row, "error": wrong}
    every: dict[str, Callable[[Tensor], Decoded]] = {**decoders, **peers}
    for decoder in every.values():  # to warm up
        decoder(prompt)
    runs: dict[str, list[Decoded]] = {name: [] for name in every}
    load = os.getloadavg()[0]
    for _ in range(grid.repeats):
        for name, decoder in every.items():
            runs[name].append(decoder(prompt))
    tokens = runs["lte"][-1].tokens[:, :-1]
    unread = measured_unread(lte.model, tokens, grid.prompt_tokens)
    by_layer, union = [unread.ffn], [unread.union_ffn]
    if sparse_ffns(lte.model):
        by_layer, union = measured_routing(lte.model, tokens, grid.prompt_tokens)
    step_ms = {name: 1e3 * statistics.median(s for one in ones for s in one.steps) for name, ones in runs.items()}
    prefill_ms = {name: 1e3 * statistics.median(one.prefill for one in ones) for name, ones in runs.items()}
    total = {name: statistics.median(one.total for one in ones) for name, ones in runs.items()}
    dense = [name for name in decoders if name != "lte"]
    best, best_total = min(dense, key=step_ms.__getitem__), min(dense, key=total.__getitem__)
    routed = union if sparse_ffns(lte.model) else None
    read = {best: _bytes(decoders[best]), "lte": _bytes(lte, routed, unread.weights)}
    made = grid.new_tokens * prompt.shape[0]
    gb_per_s = read["lte"] / step_ms["lte"] / 1e6
    row |= {
        "sparsity": sum(by_layer) / len(by_layer),
        "sparsity_range": [min(by_layer), max(by_layer)],
        "union_sparsity": sum(union) / len(union),
        "attention_sparsity": unread.attention,
        "union_attention_sparsity": unread.union_attention,
        "dense_ms": step_ms[best],
        "lte_ms": step_ms["lte"],
        "speedup": step_ms[best] / step_ms["lte"],
        "ideal_speedup": read[best] / read["lte"],
        "dense_prefill_ms": min(prefill_ms[name] for name in dense),
        "lte_prefill_ms": prefill_ms["lte"],
        "dense_total_s": total[best_total],
        "lte_total_s": total["lte"],
        "speedup_total": total[best_total] / total["lte"],
        "dense_tokens_per_s": made / total[best_total],
        "lte_tokens_per_s": made / total["lte"],
        "bytes": read["lte"],
        "gb_per_s": gb_per_s,
        "share_of_bandwidth": gb_per_s / grid.bandwidth,
        "dense_by": f"{decoders[best].how} {best}",
        "dense_total_by": f"{decoders[best_total].how} {best_total}",
        "lte_by": lte.how,
        "dense_ms_all": {name: step_ms[name] for name in dense},
    }
    if lte.device.type == "cpu":
        row |= {"threads": torch.get_num_threads(), "load": load}
    if peers:
        row["llama_cpp"] = {name: {"step_ms": step_ms[name], "prefill_ms": prefill_ms[name]} for name in peers}
    if grid.generate:
        row |= {
            f"{name}_generate_s": _generate(decoders[which], prompt)
            for name, which in (("dense", best_total), ("lte", "lte"))
        }
    return row


def _fit_(lte: TimedDecoder, prompt: Tensor, sparsity: float, grid: DecodeGrid) -> None:
    """Set routers and thresholds to what is asked for in decoding: first on the prompt, then on the decoded tokens."""
    model, asked = lte.model, grid.attention_sparsity or 0.0
    route_(model, prompt, sparsity, grid.seed)
    cut_(model, prompt, asked)
    targets = layer_targets(len(sparse_ffns(model)), sparsity, grid.seed)
    for _ in range(_FITS):
        tokens = lte(prompt).tokens[:, :-1]  # the last one was never read
        found, _union = measured_routing(model, tokens, lte.prompt_tokens)
        unread = measured_unread(model, tokens, lte.prompt_tokens)
        if max(abs(sum(found) / len(found) - sparsity), abs(unread.attention - asked)) <= _CLOSE:
            return
        cut_(model, tokens, asked, lte.prompt_tokens)
        if sparsity not in (0, 1):
            adjust_(model, tokens, targets, lte.prompt_tokens)


def _bytes(decoder: TimedDecoder, union_sparsity: list[float] | None = None, unread: float = 0.0) -> int:
    """Return the bytes of weights, keys and values that one step reads.

    Args:
        union_sparsity: of each FFN. None stands for dense FFNs without routers.
        unread: number of weights that thresholds leave unread.
    """
    model, size = decoder.model, decoder.model.dtype.itemsize
    counted = cost(
        model_shape(model), 0.0 if union_sparsity is None else union_sparsity, union_sparsity is not None, size
    )
    text = model.config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    context = decoder.prompt_tokens + decoder.new_tokens // 2
    cached = 2 * text.num_hidden_layers * heads * width * size * decoder.batch * context
    return counted.weight_bytes - round(unread * size) + counted.head_bytes + cached


def _generate(decoder: TimedDecoder, prompt: Tensor) -> float:
    """Return the seconds of Hugging Face's own ``generate`` without options.

    It runs once untimed: torch plans attention for each length of the cache when it first meets that length, which
    takes milliseconds, and the model that comes first would pay for all others.
    """
    call: Any = decoder.model.generate
    options = {"do_sample": False, "attention_mask": torch.ones_like(prompt), "pad_token_id": 0, "eos_token_id": None}
    call(prompt, max_new_tokens=decoder.new_tokens, **options)[0, -1].item()
    began = time.perf_counter()
    call(prompt, max_new_tokens=decoder.new_tokens, **options)[0, -1].item()
    return time.perf_counter() - began
