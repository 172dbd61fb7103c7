"""``lte prune``: ``lte sparsify`` by Wanda or magnitude, which set single weights to 0, with the cost in JSON."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from lte.cli.console import print_json
from lte.cli.main import parse
from lte.cli.options import DeviceOptions, Output, check_folder
from lte.cli.sparsify import convert
from lte.evaluation.inputs import Inputs
from lte.methods.weight_pruning import MagnitudeConfig, WandaConfig
from lte.surgery.cost import cost_per_token, weight_sparsity


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
    """With wanda: the number of tokens of the data."""
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
    model = convert(options, options.config(), shlex.join(["lte", "prune", *argv]))
    if options.json:
        share = weight_sparsity(model)
        print_json(
            {
                "output": options.output,
                "weight_sparsity": share,
                "gflops_per_token_if_skipped": options.config().cost(model, share).gflops,
                "gflops_per_token_dense": cost_per_token(model).gflops,
            }
        )


def parse_prune(argv: Sequence[str]) -> Prune:
    """Return the options, checked as far as possible before a model is loaded."""
    options: Prune = parse(Prune, "prune", argv)
    check_folder(options.output, options.model)
    options.config()  # raises ValueError for an option out of its range
    return options
