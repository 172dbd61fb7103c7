"""``lte sample``: a model writes its own training data."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path

from lte.cli.console import bar, err, out, print_json
from lte.cli.main import parse
from lte.cli.options import DeviceOptions, Output, open_model, optimize_where_possible_
from lte.cli.switches import switches
from lte.data.text_files import read_text
from lte.files import write_whole
from lte.ops.sparse_ffn import BackendName
from lte.surgery.loading import check_causal, load_config, load_tokenizer
from lte.surgery.method import mode_of
from lte.training.batch_log import batch_log, json_lines
from lte.training.own_samples import SampleOptions, Writer, own_samples, wanted
from lte.training.row_identity import row_identity


@dataclass
class Sample:
    model: str
    """A local folder, a hub id, or a .gguf file; dense or sparse."""
    output: Output
    """The .jsonl file to write: a chat or a text on each line. Until it is complete, its batches are in OUTPUT.batches,
    and the same command, also with another --num-samples, continues after them."""
    prompts: str | None = None
    """A file with one prompt a line: the model writes only the answers."""
    shard: str = "0/1"
    """I/N: write only the I-th of N parts, I from 0. For several GPUs, start a process for each with its own --device
    and --output."""
    backend: BackendName = "auto"
    """The backend for the FFNs of a model in mode hard, see lte generate."""
    json: bool = False
    """Print one JSON object on the last line."""
    how: SampleOptions = field(default_factory=SampleOptions)
    where: DeviceOptions = field(default_factory=DeviceOptions)


def main(argv: Sequence[str]) -> None:
    options: Sample = parse(Sample, "sample", switches(argv, Sample))
    output = Path(options.output)
    if output.suffix != ".jsonl":
        raise ValueError(f"output {output} has to end in .jsonl")
    if output.exists():
        raise ValueError(f"{output} is there already: delete it, or give another output")
    shard, shards = _shard(options.shard)
    prompts = _lines(options.prompts)
    device, dtype = options.where.resolve()
    config = load_config(options.model, options.where.trust_remote_code)
    check_causal(config, "lte sample asks")
    tokenizer = load_tokenizer(options.model, options.where.trust_remote_code)
    identity = row_identity(replace(options, how=replace(options.how, num_samples=None)))  # batches do not depend on it
    with batch_log(output.with_name(f"{output.name}.batches"), identity) as log:
        model = open_model(options.model, "causal", device, dtype, options.where.trust_remote_code).eval()
        if mode_of(config) == "hard" or options.backend != "auto":
            optimize_where_possible_(model, options.backend)
        writer = Writer(model, tokenizer, options.how, prompts)
        before, began = len(log.batches), time.perf_counter()
        most = len(range(shard, wanted(options.how, len(prompts)), shards))
        size = options.how.batch_size
        numbers = range(shard, -(-len(prompts) // size), shards) if prompts else count(shard, shards)
        with bar() as progress:
            task = progress.add_task("writing", total=most)
            rows, dropped = own_samples(writer, log, most, numbers, lambda new: progress.advance(task, new))
        seconds, tokens = time.perf_counter() - began, sum(one.tokens for one in log.batches[before:])
        write_whole(output, json_lines(rows))
        log.path.unlink()
    speed = tokens / seconds if tokens else 0.0
    out.print(f"{output}: {len(rows):,} rows", soft_wrap=True, markup=False)
    reasons = ", ".join(f"{number:,} {reason}" for reason, number in dropped.most_common()) or "nothing"
    err.print(f"{tokens:,} tokens in {seconds:.1f} s, {speed:,.0f} a second; dropped: {reasons}", markup=False)
    if options.json:
        found = {"output": str(output), "rows": len(rows), "dropped": dict(dropped), "tokens": tokens}
        print_json(found | {"seconds": round(seconds, 2), "tokens_per_second": round(speed, 1), "device": str(device)})


def _shard(text: str) -> tuple[int, int]:
    index, _, number = text.partition("/")
    if not (index.isdecimal() and number.isdecimal() and int(index) < int(number)):
        raise ValueError(f"shard is {text!r}: write I/N, I from 0 to N - 1, e.g. 0/4")
    return int(index), int(number)


def _lines(path: str | None) -> list[str]:
    if path is None:
        return []
    return [line for line in read_text(path).replace("\r\n", "\n").split("\n") if line.strip()]
