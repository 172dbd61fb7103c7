"""``lte sparsify``: a dense checkpoint in, one with experts and routers out, by any method."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import tyro
from torch.utils.data import DataLoader

from lte.cli.console import out, track
from lte.cli.main import parse
from lte.cli.method_options import chosen, method_in, with_method
from lte.cli.options import DataOptions, DeviceOptions, Output, open_model
from lte.modules.recording import sparse_layers
from lte.surgery.convert import sparsify_
from lte.surgery.loading import load_config, load_tokenizer


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
            "deja-vu, cats, static-pruning, relufication (which needs fine-tuning: lte train). "
            "--method NAME --help shows the options of that one."
        ),
    ] = "lte"
    data: DataOptions = field(default_factory=DataOptions)
    where: DeviceOptions = field(default_factory=DeviceOptions)


def main(argv: Sequence[str]) -> None:
    options: Any = parse(with_method(Sparsify, method_in(argv)), "sparsify", argv)
    method = chosen(options)
    device, dtype = options.where.resolve()
    config = load_config(options.model)
    tokenizer = load_tokenizer(options.model)
    batches = None
    if method.data_tokens:
        dataset = options.data.load(options.data.text, tokenizer, config)
        batches = DataLoader(dataset, batch_size=1, collate_fn=dataset.collator)
    model = open_model(options.model, options.data.head(config), device, dtype)
    sparsify_(model, method, batches, progress=lambda sites: track(list(sites), "grouping neurons"))
    model.save_pretrained(options.output)
    tokenizer.save_pretrained(options.output)
    layers = sparse_layers(model)
    experts = next(iter(layers.values())).router.num_experts
    out.print(f"{options.output}: {len(layers)} FFNs of {experts} experts x {method.expert_size} neurons")
