"""``lte calibrate``: gives a trained model another sparsity, without training."""

import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

import tyro
from torch.utils.data import DataLoader

from lte.cli.console import err, out, print_json, table, track
from lte.cli.eval_tables import cost_cells
from lte.cli.main import parse
from lte.cli.options import DeviceOptions, Model, as_written, check_folder, open_model
from lte.data.batches import two_samples
from lte.evaluation.evaluate import Evaluation, evaluate
from lte.evaluation.inputs import Inputs, pad_alike_
from lte.evaluation.origin import keep_calibration
from lte.evaluation.record import Made, given
from lte.methods.lte.calibration import calibrate_, check_calibration, check_calibration_target
from lte.saving import saving
from lte.surgery.loading import load_config, load_tokenizer

_PASSES = 3  # shifts here are larger than those of a training run


@dataclass
class Calibrate:
    model: Model
    """A trained sparse model: a local folder or a hub id."""
    target_sparsity: float
    """Fraction of inactive neurons to reach on text like --text."""
    output: Annotated[str | None, tyro.conf.arg(aliases=("-o",))] = None
    """Folder to save to."""
    in_place: bool = False
    """Save to the model's own folder."""
    rows: int = 64
    """Number of rows (blocks) for calibration, and of other rows to measure on; at most half of the data each."""
    batch_size: int = 8
    """Rows of a forward pass."""
    seed: Annotated[int, tyro.conf.arg(help="Of the choice of rows.")] = 0
    json: bool = False
    """Print one JSON object on the last line."""
    data: Inputs = field(default_factory=Inputs)
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""
    trust_remote_code: bool = False
    """Run code that comes with the model, if there is any. Read the code first."""


def main(argv: Sequence[str]) -> None:
    options = parse_calibrate(argv)
    options.data = as_written(options.data)
    folder = _output(options)
    device, dtype = DeviceOptions(options.device).resolve()
    trusted = options.trust_remote_code
    config, tokenizer = load_config(options.model, trusted), load_tokenizer(options.model, trusted)
    data = options.data.load(options.data.text, tokenizer, config)
    calibration, held_out = two_samples(data, options.rows, options.seed)
    model = open_model(options.model, options.data.head(config), device, dtype, trusted)
    pad_alike_(model, calibration)
    check_calibration(model, options.target_sparsity)  # check now, not after the first evaluation

    def measure(what: str) -> Evaluation:
        return evaluate(model, held_out, options.batch_size, progress=lambda batches: track(batches, what))

    before = measure("measuring")
    batches = DataLoader(calibration, batch_size=options.batch_size, collate_fn=calibration.collator)
    with err.status("calibrating"):
        shift = calibrate_(model, batches, options.target_sparsity, passes=_PASSES)
    after = measure("measuring again")
    with saving(folder) as fresh:
        model.save_pretrained(fresh)
        tokenizer.save_pretrained(fresh)
        seed = {"seed": options.seed} if options.seed else {}
        made = Made(shlex.join(["lte", "calibrate", *argv]), "", options.data.text, {**given(options), **seed})
        keep_calibration(options.model, config, fresh, made, measured=options.in_place)
    _show(before, after, f"{len(held_out)} rows, calibrated on {len(calibration)} others")
    out.print(f"saved to {folder}", soft_wrap=True, markup=False)
    if options.json:
        print_json(
            {
                "target_sparsity": options.target_sparsity,
                "rows": len(calibration),
                "rows_measured": len(held_out),
                "output": str(folder),
                "shift": shift,
                "before": asdict(before),
                "after": asdict(after),
            }
        )


def parse_calibrate(argv: Sequence[str]) -> Calibrate:
    """Return the options, checked as far as possible before a model is loaded."""
    options: Calibrate = parse(Calibrate, "calibrate", argv)
    _output(options)  # raises ValueError if it cannot save there
    if options.rows < 1:
        raise ValueError(f"rows is {options.rows}: give at least 1")
    check_calibration_target(options.target_sparsity)
    return options


def _output(options: Calibrate) -> Path:
    """Return the folder to save to.

    Raises:
        ValueError: no folder is given, or the model's own folder without ``--in-place``.
    """
    if options.output is not None and options.in_place:
        raise ValueError("give --output or --in-place, not both")
    if options.output is None and not options.in_place:
        raise ValueError("give -o FOLDER to save to, or --in-place to change the model's own folder")
    folder = Path(options.model if options.output is None else options.output)
    if options.in_place and not folder.is_dir():
        raise ValueError(f"{options.model} is no folder to save to: give -o FOLDER")
    check_folder(folder, None if options.in_place else options.model, "give another one, or --in-place")
    return folder


def _show(before: Evaluation, after: Evaluation, title: str) -> None:
    measured = {"before": before, "after": after}
    metric = next(name for name in ("perplexity", "accuracy", "pearson", "loss") if getattr(before, name) is not None)
    digits = 3 if metric == "perplexity" else 4
    table(
        title,
        ["", metric, "sparsity", "GFLOPs per token", "dense"],
        [[name, f"{getattr(one, metric):.{digits}f}", *cost_cells(one)] for name, one in measured.items()],
    )
    for name, one in measured.items():
        out.print(f"layers {name}: {' '.join(f'{share:.2f}' for share in one.layer_sparsity)}", soft_wrap=True)
