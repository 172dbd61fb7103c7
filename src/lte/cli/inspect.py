"""``lte inspect``: shows a model's family, its FFNs and the cost of a token. It loads no weights."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import tyro

from lte.cli.console import out, print_json, table
from lte.cli.main import parse
from lte.cli.options import Model
from lte.core.grouping import check_divisible
from lte.methods.lte import LTEConfig
from lte.surgery.conversion import Conversion, conversion_of, is_sparse, sections_of
from lte.surgery.cost import cost_per_token, meta_model
from lte.surgery.families import check_family
from lte.surgery.loading import load_config
from lte.surgery.reading import reading
from lte.surgery.sites import find_sites


@dataclass
class Inspect:
    model: Model
    """A local folder, a hub id, or a .gguf file."""
    expert_size: int = 32
    """Neurons of an expert."""
    sparsity: Annotated[tuple[float, ...], tyro.conf.arg(help="Sparsities for the cost.")] = (0.5, 0.7, 0.9)
    trust_remote_code: bool = False
    """Run code that comes with the model, if there is any. Read the code first."""
    json: bool = False
    """Print one JSON object on the last line."""


def describe(
    name: str, expert_size: int, sparsities: Sequence[float], trust_remote_code: bool = False
) -> dict[str, Any]:
    """Return all values that the command prints, as one dictionary."""
    config = load_config(name, trust_remote_code)
    check_family(config)
    made = conversion_of(config) or Conversion()
    size = getattr(made, "expert_size", expert_size)
    with reading(name):
        model = meta_model(config)
        ffns = [
            {
                "name": site.name,
                "d_model": site.d_model,
                "d_ff": site.d_ff,
                "gated": site.gated,
                "experts": check_divisible(site.d_ff, size),
                "weights": site.num_weights,
                "converts": site.place,
            }
            for site in find_sites(model, config.model_type)
        ]
        dense = cost_per_token(model, 0.0, size)
        costs = made if is_sparse(config) else LTEConfig(expert_size=size)  # of a dense model, as it would be then
        cost = {s: costs.cost(model, s) for s in sparsities}
    return {
        "model": name,
        "architecture": type(model).__name__,
        "family": config.model_type,
        "state": made.describe(config),
        "sparse": is_sparse(config),
        **sections_of(config),
        "parameters": sum(p.numel() for p in model.parameters()),
        "expert_size": size,
        "num_ffns": len(ffns),
        "ffns": ffns,
        "cost_dense": asdict(dense),
        "cost": {str(sparsity): asdict(one) for sparsity, one in cost.items()},
    }


def main(argv: Sequence[str]) -> None:
    options: Inspect = parse(Inspect, "inspect", argv)
    found = describe(options.model, options.expert_size, options.sparsity, options.trust_remote_code)
    first = found["ffns"][0]
    kind, size = f"{found['architecture']}: family {found['family']}", f"{found['parameters']:,} parameters"
    out.print(f"{kind}, {size}, {found['state']}")
    shapes: dict[tuple, int] = {}
    for ffn in found["ffns"]:
        key = (ffn["d_model"], ffn["d_ff"], ffn["gated"], ffn["experts"], ffn["converts"])
        shapes[key] = shapes.get(key, 0) + 1
    table(
        f"FFNs, from {first['name']}",
        ["FFNs", "d_model", "d_ff", "gated", "experts", "replaced in each layer"],
        [[n, d, f, "yes" if gated else "no", e, c] for (d, f, gated, e, c), n in shapes.items()],
    )
    rows = [["dense", *_row(found["cost_dense"])]]
    rows += [[f"{float(s):.0%} sparse", *_row(cost)] for s, cost in found["cost"].items()]
    table("cost per token (G = 2^30)", ["", "GFLOPs", "FFN", "attention", "router", "LM head", "weights read"], rows)
    if options.json:
        print_json(found)


def _row(cost: dict[str, Any]) -> list[str]:
    names = ("gflops", "ffn_gflops", "attention_gflops", "router_gflops", "head_gflops")
    return [*(f"{cost[name]:.4g}" for name in names), f"{cost['weight_bytes'] / 2**20:,.1f} MiB"]
