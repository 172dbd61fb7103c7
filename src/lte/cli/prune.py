"""``lte prune``: single weights of a dense checkpoint set to 0, by Wanda or by size."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch.utils.data import DataLoader

from lte.cli.console import err, out, print_json
from lte.cli.main import parse
from lte.cli.options import DeviceOptions, Output, as_written, check_folder, open_model
from lte.evaluation.inputs import Inputs
from lte.methods.weight_pruning import MagnitudeConfig, WandaConfig, prune_, weight_sparsity
from lte.saving import saving
from lte.surgery.cost import cost_per_token
from lte.surgery.loading import load_config, load_tokenizer


@dataclass
class Prune:
    model: str
    """A local folder, a hub id, or a .gguf file; dense."""
    output: Output
    """Folder to save to."""
    method: Literal["wanda", "magnitude"] = "wanda"
    """wanda: by weight and input, needs --text. magnitude: by weight alone."""
    target_sparsity: float = 0.5
    """Fraction of the weights that become 0, in every linear layer of the blocks."""
    pattern: str | None = None
    """N:M keeps N of every M consecutive inputs, e.g. 2:4 or 4:8."""
    tokens: int = 4096
    """With wanda: how many tokens of the data to look at."""
    json: bool = False
    """Print one JSON object on the last line."""
    data: Inputs = field(default_factory=Inputs)
    where: DeviceOptions = field(default_factory=DeviceOptions)

    def config(self) -> MagnitudeConfig:
        if self.method == "wanda":
            return WandaConfig(self.target_sparsity, self.pattern, self.tokens)
        return MagnitudeConfig(self.target_sparsity, self.pattern)


def main(argv: Sequence[str]) -> None:
    options = parse_prune(argv)
    options.data = as_written(options.data)
    device, dtype = options.where.resolve()
    config = load_config(options.model, options.where.trust_remote_code)
    tokenizer = load_tokenizer(options.model, options.where.trust_remote_code)
    head, batches = options.data.kept_head(config), None
    if options.method == "wanda":
        dataset = options.data.load(options.data.text, tokenizer, config, labelled=False)
        batches = DataLoader(dataset, batch_size=1, collate_fn=dataset.collator)
    model = open_model(options.model, head, device, dtype, options.where.trust_remote_code)
    with err.status("pruning"):
        prune_(model, options.config(), batches)
    with saving(options.output) as fresh:
        model.save_pretrained(fresh)
        tokenizer.save_pretrained(fresh)
    share, dense = weight_sparsity(model), cost_per_token(model).gflops
    out.print(f"{options.output}: {share:.1%} of the blocks' weights are 0", soft_wrap=True, markup=False)
    if options.json:
        print_json(
            {
                "output": options.output,
                "weight_sparsity": share,
                "gflops_per_token_if_skipped": (1 - share) * dense,
                "gflops_per_token_dense": dense,
            }
        )


def parse_prune(argv: Sequence[str]) -> Prune:
    """The options, checked as far as they can be before a model is loaded."""
    options: Prune = parse(Prune, "prune", argv)
    check_folder(options.output, options.model)
    options.config()  # refuses what is out of its range
    return options
