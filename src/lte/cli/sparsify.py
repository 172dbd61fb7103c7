"""``lte sparsify``: a dense checkpoint in, the same function with experts and routers out."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Annotated

import tyro
from torch.utils.data import DataLoader

from lte.cli.console import out, track
from lte.cli.main import parse
from lte.cli.options import DataOptions, DeviceOptions, Output, open_model
from lte.methods.lte import Grouping, LTEConfig
from lte.modules.recording import sparse_layers
from lte.surgery.convert import sparsify_
from lte.surgery.loading import load_config, load_tokenizer

_RECORDED_BATCHES = 64


@dataclass
class Sparsify:
    model: str
    """A local folder, a hub id, or a .gguf file."""
    output: Output
    """Folder to save to."""
    expert_size: int = 32
    """Neurons an expert; must divide d_ff."""
    grouping: Grouping = "kmeans"
    """How neurons are grouped; coactivation needs --text."""
    tau: float = 0.5
    """An expert is active when its score is above it."""
    seed: Annotated[int, tyro.conf.arg(help="Of grouping and routers.")] = 0
    data: DataOptions = field(default_factory=DataOptions)
    where: DeviceOptions = field(default_factory=DeviceOptions)


def main(argv: Sequence[str]) -> None:
    options: Sparsify = parse(Sparsify, "sparsify", argv)
    method = LTEConfig(expert_size=options.expert_size, tau=options.tau, seed=options.seed, grouping=options.grouping)
    device, dtype = options.where.resolve()
    config = load_config(options.model)
    tokenizer = load_tokenizer(options.model)
    batches = None
    if method.needs_activations:
        dataset = options.data.load(options.data.text, tokenizer, config)
        batches = islice(DataLoader(dataset, batch_size=1, collate_fn=dataset.collator), _RECORDED_BATCHES)
    model = open_model(options.model, options.data.head(config), device, dtype)
    sparsify_(model, method, batches, progress=lambda sites: track(list(sites), "grouping neurons"))
    model.save_pretrained(options.output)
    tokenizer.save_pretrained(options.output)
    layers = sparse_layers(model)
    experts = next(iter(layers.values())).router.num_experts
    out.print(f"{options.output}: {len(layers)} FFNs of {experts} experts x {options.expert_size} neurons")
