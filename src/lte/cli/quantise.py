"""``lte quantise``: stores the experts of a trained sparse model as int8 or int4, in a smaller folder."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lte.cli.console import err, out, print_json
from lte.cli.main import parse
from lte.cli.options import DeviceOptions, Model, Output, check_folder, open_model
from lte.evaluation.origin import keep_quantisation
from lte.evaluation.record import Made
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
    """int8: 8 bits a weight. int4: 4.5 bits a weight."""
    json: bool = False
    """Print one JSON object on the last line."""
    where: DeviceOptions = field(default_factory=DeviceOptions)


def main(argv: Sequence[str]) -> None:
    options: Quantise = parse(Quantise, "quantise", argv)
    check_folder(options.output, options.model)
    device, dtype = options.where.resolve()
    trusted = options.where.trust_remote_code
    config, tokenizer = load_config(options.model, trusted), load_tokenizer(options.model, trusted)
    model = open_model(options.model, "own", device, dtype, trusted)
    with err.status("quantising"):
        quantise_(model, options.weights)
    with saving(options.output) as fresh:
        model.save_pretrained(fresh)
        tokenizer.save_pretrained(fresh)
        made = Made(shlex.join(["lte", "quantise", *argv]), options.model, (), {"weights": options.weights})
        keep_quantisation(config, fresh, made)
    size = sum(file.stat().st_size for file in Path(options.output).glob("*.safetensors"))
    out.print(f"{options.output}: experts in {options.weights}, {size / 1e6:,.0f} MB", soft_wrap=True, markup=False)
    if options.json:
        print_json({"output": options.output, "weights": options.weights, "bytes": size})
