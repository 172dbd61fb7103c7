"""``lte sparsify``: makes a sparse checkpoint of a dense one, by any conversion."""

import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import tyro
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from lte.cli.console import out, track
from lte.cli.main import parse
from lte.cli.method_options import method_name, with_method
from lte.cli.options import DeviceOptions, Output, as_written, check_folder, open_model
from lte.evaluation.inputs import Inputs
from lte.evaluation.origin import keep_conversion
from lte.evaluation.record import Made, given
from lte.saving import saving
from lte.surgery.conversion import Conversion
from lte.surgery.convert import sparsify_
from lte.surgery.loading import load_config, load_tokenizer
from lte.surgery.streaming import streaming


@dataclass
class Sparsify:
    """The options of every method. Those of the chosen method are added."""

    model: str
    """A local folder, a hub id, or a .gguf file."""
    output: Output
    """Folder to save to."""
    method: Annotated[
        str,
        tyro.conf.arg(
            help="To be trained: lte, topk-moe, noisy-topk, sigma-moe. Sparse at once, with --text: moefication, "
            "deja-vu, cats, static-pruning, teal, relufication (which needs fine-tuning: lte train). Single weights "
            "become 0: wanda, with --text, and magnitude. --method NAME --help shows the options of that one."
        ),
    ] = "lte"
    stream: bool = False
    """Keep one block of the model in memory, for a model that is larger than memory. It must be a folder of safetensors
    files, and the method must read no data. After an interruption the same command goes on."""
    data: Inputs = field(default_factory=Inputs)
    where: DeviceOptions = field(default_factory=DeviceOptions)


def main(argv: Sequence[str]) -> None:
    options = parse_sparsify(argv)
    (stream if options.stream else convert)(options, options.chosen_method, shlex.join(["lte", "sparsify", *argv]))


def convert(options: Any, conversion: Conversion, command: str) -> PreTrainedModel:
    """Load the model of the options, convert it, save it with its tokenizer and its origin, and print the result.

    Args:
        options: of the command.
        conversion: the same as a config.
        command: a caption.
    """
    options.data = as_written(options.data)
    device, dtype = options.where.resolve()
    config = load_config(options.model, options.where.trust_remote_code)
    tokenizer = load_tokenizer(options.model, options.where.trust_remote_code)
    head, batches = options.data.kept_head(config), []
    if conversion.data_tokens:
        dataset = options.data.load(options.data.text, tokenizer, config, labelled=False)
        batches = DataLoader(dataset, batch_size=1, collate_fn=dataset.collator)
    model = open_model(options.model, head, device, dtype, options.where.trust_remote_code)
    sparsify_(model, conversion, batches, progress=lambda steps: track(list(steps), conversion.doing))
    with saving(options.output) as fresh:
        model.save_pretrained(fresh)
        tokenizer.save_pretrained(fresh)
        keep_conversion(config, fresh, _made(options, conversion, command), conversion)
    out.print(f"{options.output}: {conversion.outcome(model)}", soft_wrap=True, markup=False)
    return model


def stream(options: Any, conversion: Conversion, command: str) -> None:
    """Do the same as :func:`convert` with one block of the model in memory."""
    device, dtype = options.where.resolve()
    trusted = options.where.trust_remote_code
    config = load_config(options.model, trusted)
    options.data.kept_head(config)
    tokenizer = load_tokenizer(options.model, trusted)

    def shown(parts: Iterable[Any]) -> Iterable[Any]:
        return track(parts, conversion.doing)

    try:
        with streaming(options.model, conversion, options.output, device, dtype, trusted, shown) as (fresh, model):
            tokenizer.save_pretrained(fresh)
            keep_conversion(config, fresh, _made(options, conversion, command), conversion)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("interrupted: the same command goes on with the next weight file") from None
    out.print(f"{options.output}: {conversion.outcome(model)}", soft_wrap=True, markup=False)


def _made(options: Any, conversion: Conversion, command: str) -> Made:
    inputs = options.data if conversion.data_tokens else Inputs()  # other conversions read no data
    method = {"method": conversion.name} if conversion.name != Sparsify.method else {}
    how = {**method, **given(inputs), **given(conversion), **given(options.where)}
    return Made(command, options.model, inputs.text, how)


def parse_sparsify(argv: Sequence[str]) -> Any:
    """Return the options and those of the conversion, checked as far as possible before a model is loaded."""
    chosen = Conversion.named(method_name(argv))
    options = parse(with_method(Sparsify, chosen, chosen.of_training), "sparsify", argv)
    check_folder(options.output, options.model)
    return options
