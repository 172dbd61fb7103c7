"""``lte quantise``: stores the experts of a trained sparse model as int8 or int4, in a smaller folder."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch.utils.data import DataLoader

from lte.cli.console import out, print_json, track
from lte.cli.main import parse
from lte.cli.options import DeviceOptions, Model, Output, as_written, check_folder, open_model
from lte.evaluation.inputs import Inputs
from lte.evaluation.origin import keep_quantisation
from lte.evaluation.record import Made, given
from lte.ops.quantise import Quantised
from lte.saving import saving
from lte.surgery.loading import load_config, load_tokenizer
from lte.surgery.quantise import quantise_


@dataclass
class Quantise:
    model: Model
    """A trained sparse model: a local folder or a hub id."""
    output: Output
    """Folder to save to."""
    weights: Quantised = "int4"
    """int8: 8 bits a weight, from the weights alone. int4: 4.5 bits a weight; give text with --text, so that rounding
    keeps the outputs of the sparse model on the first 16,384 tokens of it."""
    json: bool = False
    """Print one JSON object on the last line."""
    data: Inputs = field(default_factory=Inputs)
    where: DeviceOptions = field(default_factory=DeviceOptions)


def main(argv: Sequence[str]) -> None:
    options: Quantise = parse(Quantise, "quantise", argv)
    options.data = as_written(options.data)
    check_folder(options.output, options.model)
    device, dtype = options.where.resolve()
    trusted = options.where.trust_remote_code
    config, tokenizer = load_config(options.model, trusted), load_tokenizer(options.model, trusted)
    head, batches = options.data.kept_head(config), None
    if options.data.text:
        dataset = options.data.load(options.data.text, tokenizer, config, labelled=False)
        batches = DataLoader(dataset, batch_size=1, collate_fn=dataset.collator)
    model = open_model(options.model, head, device, dtype, trusted)
    quantise_(model, options.weights, batches, progress=lambda sites: track(sites, "quantising"))
    with saving(options.output) as fresh:
        model.save_pretrained(fresh)
        tokenizer.save_pretrained(fresh)
        how = {"weights": options.weights, **given(options.data)}
        made = Made(shlex.join(["lte", "quantise", *argv]), options.model, options.data.text, how)
        keep_quantisation(config, fresh, made)
    size = sum(file.stat().st_size for file in Path(options.output).glob("*.safetensors"))
    out.print(f"{options.output}: experts in {options.weights}, {size / 1e6:,.0f} MB", soft_wrap=True, markup=False)
    if options.json:
        print_json({"output": options.output, "weights": options.weights, "bytes": size})
