"""``lte bench``: times dense against sparse: one FFN, decoding, a training step."""

import importlib
from collections.abc import Sequence

from lte.cli.failures import UsageError

PARTS = {
    "ffn": "one FFN over sparsity and number of tokens; shows where sparse is faster here",
    "decode": "a whole model: prefill, time of a token, tokens per second",
    "train": "a training step",
}


def main(argv: Sequence[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: lte bench PART [OPTIONS]\n\nDense against sparse in seconds, in one run.\n\nparts:")
        print("\n".join(f"  {name:<10}{text}" for name, text in PARTS.items()))
        print("\nlte bench PART --help shows its options.")
        return 0
    part, *rest = argv
    if part not in PARTS:
        raise UsageError(f"unknown part {part!r}: use one of lte bench {', '.join(PARTS)}")
    return importlib.import_module(f"lte.cli.bench_{part}").main(rest)
