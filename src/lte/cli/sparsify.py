"""``lte sparsify``: a dense checkpoint in, a sparse one out, by any method."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import tyro
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from lte.cli.console import err, out, track
from lte.cli.main import parse
from lte.cli.method_options import method_in, method_name, with_method
from lte.cli.options import DeviceOptions, Output, as_written, check_folder, open_model
from lte.evaluation.inputs import Inputs
from lte.methods.teal import teal_
from lte.modules.recording import sparse_layers
from lte.saving import saving
from lte.surgery.convert import sparsify_
from lte.surgery.loading import load_config, load_tokenizer
from lte.surgery.method import Method
from lte.surgery.sites import block_linears
from lte.surgery.teal import TEALConfig


@dataclass
class Sparsify:
    """The options that every method has. Those of one method are added."""

    model: str
    """A local folder, a hub id, or a .gguf file."""
    output: Output
    """Folder to save to."""
    method: Annotated[
        str,
        tyro.conf.arg(
            help="To be trained: lte, topk-moe, noisy-topk, sigma-moe. Sparse at once, with --text: moefication, "
            "deja-vu, cats, static-pruning, teal, relufication (which needs fine-tuning: lte train). "
            "--method NAME --help shows the options of that one."
        ),
    ] = "lte"
    data: Inputs = field(default_factory=Inputs)
    where: DeviceOptions = field(default_factory=DeviceOptions)


def main(argv: Sequence[str]) -> None:
    options = parse_sparsify(argv)
    options.data = as_written(options.data)
    method: Method | TEALConfig = options.chosen_method
    device, dtype = options.where.resolve()
    config = load_config(options.model, options.where.trust_remote_code)
    tokenizer = load_tokenizer(options.model, options.where.trust_remote_code)
    head, batches = options.data.kept_head(config), []
    if isinstance(method, TEALConfig) or method.needs_activations or method.fit_tokens:
        dataset = options.data.load(options.data.text, tokenizer, config, labelled=False)
        batches = DataLoader(dataset, batch_size=1, collate_fn=dataset.collator)
    model = open_model(options.model, head, device, dtype, options.where.trust_remote_code)
    made = _teal_(model, method, batches) if isinstance(method, TEALConfig) else _sparsify_(model, method, batches)
    with saving(options.output) as fresh:
        model.save_pretrained(fresh)
        tokenizer.save_pretrained(fresh)
    out.print(f"{options.output}: {made}", soft_wrap=True, markup=False)


def parse_sparsify(argv: Sequence[str]) -> Any:
    """The options and the method's, checked as far as they can be before a model is loaded."""
    config_class = TEALConfig if method_name(argv) == TEALConfig.name else method_in(argv)
    later = getattr(config_class, "of_training", ())
    options = parse(with_method(Sparsify, config_class, later), "sparsify", argv)
    check_folder(options.output, options.model)
    return options


def _teal_(model: PreTrainedModel, config: TEALConfig, batches: Iterable[dict[str, Tensor]]) -> str:
    with err.status("setting thresholds"):
        teal_(model, config, batches)
    return f"thresholds on the inputs of {len(block_linears(model, model.config.model_type))} linear layers"


def _sparsify_(model: PreTrainedModel, method: Method, batches: Iterable[dict[str, Tensor]]) -> str:
    sparsify_(model, method, batches, progress=lambda sites: track(list(sites), "grouping neurons"))
    layers = sparse_layers(model)
    experts = next(iter(layers.values())).router.num_experts
    return f"{len(layers)} FFNs of {experts} experts x {method.expert_size} neurons"
