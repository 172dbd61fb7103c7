"""``lte sparsify``: a dense checkpoint in, one with experts and routers out, by any method."""

from collections.abc import Sequence
from dataclasses import dataclass, field, make_dataclass
from typing import Annotated, Any

import tyro
from torch.utils.data import DataLoader

from lte.cli.console import out, track
from lte.cli.main import parse
from lte.cli.options import DataOptions, DeviceOptions, Output, open_model
from lte.modules.recording import sparse_layers
from lte.surgery.convert import sparsify_
from lte.surgery.loading import load_config, load_tokenizer
from lte.surgery.method import Method


@dataclass
class Sparsify:
    """The options that every method has. :func:`options_of` adds those of one method, as ``chosen_method``."""

    model: str
    """A local folder, a hub id, or a .gguf file."""
    output: Output
    """Folder to save to."""
    method: Annotated[
        str,
        tyro.conf.arg(
            help="lte, to be trained; or sparse at once, with --text: moefication, deja-vu, cats, static-pruning. "
            "--method NAME --help shows the options of that one."
        ),
    ] = "lte"
    data: DataOptions = field(default_factory=DataOptions)
    where: DeviceOptions = field(default_factory=DeviceOptions)


def main(argv: Sequence[str]) -> None:
    options: Any = parse(options_of(argv), "sparsify", argv)
    method: Method = options.chosen_method
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


def options_of(argv: Sequence[str]) -> type:
    """The command's options with those of the method that ``argv`` names.

    Raises:
        ValueError: there is no such method.
    """
    name = Sparsify.method
    for flag, value in zip(argv, [*argv[1:], ""], strict=True):
        flag, equals, joined = flag.partition("=")
        if flag == "--method":
            name = joined if equals else value
    cls = Method.named(name)
    return make_dataclass("Sparsify", [("chosen_method", cls, field(default_factory=cls))], bases=(Sparsify,))
