"""The identity of a run: its model and data by content, and all options that change its result.

An identity is a flat dict of names and JSON values. A name that only one of two identities has is not compared. It may
be an option of another version of a library, or an entry that a user removed from a file.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from lte.data.content import content_of
from lte.data.digest import digest
from lte.modules.recording import sparse_layers
from lte.surgery.method import Method
from lte.surgery.training_options import Schedule
from lte.training.arguments import LTETrainingArguments

_REASONS = {
    "where and what it writes": """
        output_dir overwrite run_name project save_only_model save_strategy save_steps save_on_each_node
        save_total_limit enable_jit_checkpoint push_to_hub hub_token hub_private_repo hub_model_id hub_strategy
        hub_always_push hub_revision save_adapter trackio_space_id trackio_bucket_id trackio_static_space_id""",
    "what it logs": """
        logging_strategy logging_steps logging_first_step log_on_each_node logging_nan_inf_filter log_level
        log_level_replica disable_tqdm report_to include_num_input_tokens_seen debug skip_memory_metrics""",
    "how it is evaluated during training": """
        eval_strategy eval_steps eval_delay eval_on_start per_device_eval_batch_size eval_accumulation_steps
        eval_do_concat_batches eval_use_gather_object prediction_loss_only include_for_metrics batch_eval_metrics
        bf16_full_eval fp16_full_eval do_train do_eval do_predict""",
    "on what device and how it is computed: the result is the same except for rounding": """
        use_cpu local_rank loss_in_pieces torch_compile torch_compile_backend torch_compile_mode torch_empty_cache_steps
        activation_checkpointing activation_checkpointing_kwargs gradient_checkpointing gradient_checkpointing_kwargs
        ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout
        dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor
        dataloader_multiprocessing_context dataloader_in_order accelerator_config.non_blocking""",
    "how it is resumed": "resume_from_checkpoint ignore_data_skip restore_callback_states_from_checkpoint",
}
MAY_CHANGE = frozenset(name for names in _REASONS.values() for name in names.split())
"""Options that do not change the result of a run. All other options do. Only this table says so."""

CHOOSE = ("eval_strategy", "eval_steps", "eval_delay", "save_strategy", "save_steps")
"""These options do change the result if the best of several evaluations becomes the result."""

_NOT_THE_MODEL = frozenset(
    ["_name_or_path", "architectures", "auto_map", "dtype", "torch_dtype", "transformers_version", "use_cache", "lte"]
)
"""Keys of a config that are not compared: origin and names, and values that are compared elsewhere."""
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_SHOWN = 8  # differences in a message


def model_identity(model: Any) -> dict[str, Any]:
    """Return the model's class, config, method and weights, before training.

    Only the weights of the body count. Routers, compensation and heads may be new and random. Weights are compared by a
    sum of their bits, which is exact on any device and does not depend on the order of neurons.
    """
    config = {name: value for name, value in model.config.to_dict().items() if name not in _NOT_THE_MODEL}
    made = Method.from_dict(model.config.lte)
    method = {"method": made.name, **{name: getattr(made, name) for name in made.options()}}
    body = getattr(model, "base_model", model)
    added = {id(p) for layer in sparse_layers(model).values() for part in _added(layer) for p in part.parameters()}
    weights = [(name, one) for name, one in body.named_parameters() if id(one) not in added]
    return _plain(
        {
            "model.class": type(model).__name__,
            "model.dtype": " ".join(sorted({str(one.dtype).removeprefix("torch.") for _, one in weights})),
            "model.weights": digest(
                f"{name} {[*one.shape]} {one.dtype} {bits}\n".encode()
                for (name, one), bits in zip(weights, _sums_of_bits([one for _, one in weights]), strict=True)
            ),
            **_flat("model.config", config),
            **_flat("method", method),
        }
    )


def run_identity(
    args: LTETrainingArguments, model: Mapping[str, Any], datasets: Mapping[str, Any], collator: Any
) -> dict[str, Any]:
    """Return the identity of a run.

    Args:
        args: of the run.
        model: the result of :func:`model_identity`.
        datasets: by name. They are read, see :func:`lte.data.content.content_of`.
        collator: of the batches. It is compared only if it is a dataclass.
    """
    found: dict[str, Any] = {**model, **options_of(args), "ranks": args.world_size}
    for name, dataset in datasets.items():
        found |= _flat(name, content_of(dataset))
    if is_dataclass(collator) and not isinstance(collator, type):
        simple = {one.name: getattr(collator, one.name) for one in fields(collator)}
        found |= _flat("collator", {n: v for n, v in simple.items() if isinstance(v, str | int | float | None)})
    return _plain(found)


def options_of(args: LTETrainingArguments) -> dict[str, Any]:
    """Return the options that change the result, by name. An entry of a mapping is named OPTION.ENTRY."""
    kept = MAY_CHANGE - {*CHOOSE} if args.load_best_model_at_end else MAY_CHANGE
    if args.is_dense:
        kept |= {one.name for one in fields(Schedule)}  # a dense run reads none of them
    given = args.to_dict()
    given["recipe"] = given.pop("schedule")  # older runs wrote it under its former name
    flat = {name: value for one, value in given.items() for name, value in _flat(one, value).items()}
    return _plain({name: value for name, value in flat.items() if name not in kept})


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return each value that differs, as "NAME THEN, and this one NOW"."""
    return [f"{one} {_short(then[one])}, and this one {_short(now[one])}" for one in then if _differs(one, then, now)]


def check_same(then: Mapping[str, Any], now: Mapping[str, Any], file: str) -> None:
    """Raise ValueError unless a run has the identity of the checkpoint's run.

    Args:
        then: the identity of the checkpoint's run.
        now: the identity of this run.
        file: from which ``then`` was read.
    """
    if found := differences(then, now):
        more = f"; and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
        raise ValueError(
            f"the checkpoint's run has {'; '.join(found[:_SHOWN])}{more}: resume with the same, or train anew in "
            f"another folder ({file} holds what is compared)"
        )


def _differs(name: str, then: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    return name in now and json.dumps(then[name], sort_keys=True) != json.dumps(now[name], sort_keys=True)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _added(layer: Any) -> Iterator[Any]:
    yield layer.router
    if layer.compensation is not None:
        yield layer.compensation


@torch.no_grad()
def _sums_of_bits(parameters: list[Tensor]) -> list[int]:
    """Return for each parameter the sum of its values' bits as integers, modulo 2^64. The device is read once."""
    sums = [torch.zeros((), dtype=torch.int64)]
    for parameter in parameters:
        local: Tensor = getattr(
            parameter, "to_local", lambda one=parameter: one
        )()  # this rank's part of a sharded parameter
        bits = torch.zeros(0) if local.is_meta else local.detach()
        bits = (torch.view_as_real(bits) if bits.is_complex() else bits).contiguous().view(-1)
        sums.append(bits.view(_INTEGERS[bits.element_size()]).sum(dtype=torch.int64))
    return torch.stack([one.to(sums[-1].device) for one in sums])[1:].tolist()


def _flat(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        return {name: value}
    return {key: one for inner, held in value.items() for key, one in _flat(f"{name}.{inner}", held).items()}


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """Return the values as JSON would give them back."""
    return json.loads(json.dumps(values, default=str))
