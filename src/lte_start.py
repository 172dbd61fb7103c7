"""Start of the command ``lte``: what needs no library is answered at once; Ctrl-C while they load is one line too."""

import importlib.metadata
import os
import sys

COMMANDS = {
    "sparsify": "make a dense model sparse, by any method, and save it",
    "prune": "set single weights of a dense model to 0, by Wanda or by size",
    "train": "train a model to use few neurons, through all stages",
    "sweep": "train, sparsify, prune or calibrate over a grid of options: a row a run, resumable",
    "calibrate": "another sparsity for a trained model, without training it again",
    "eval": "perplexity, accuracy, ROUGE, MMLU or tasks of lm_eval, with sparsity and cost",
    "generate": "continue a prompt",
    "bench": "dense against sparse in seconds: ffn, decode or train",
    "report": "one page of results: trade-off curves, Table 1, layers, routers, speed",
    "inspect": "what a model is, what would be converted, and what a token costs",
    "demo": "the whole of it on a real small model, on CPU",
}
_CLOSED = 141  # as a shell gives it for a process ended by SIGPIPE


def answer(arguments: list[str]) -> str | None:
    """What ``lte`` says of itself, if that is asked for: its commands, or its version."""
    if not arguments or arguments[0] in ("-h", "--help"):
        commands = "\n".join(f"  {name:<10}{text}" for name, text in COMMANDS.items())
        return (
            "usage: lte COMMAND [OPTIONS]\n\nTrain a language model to use few of its FFN neurons.\n\n"
            f"commands:\n{commands}\n\nlte COMMAND --help shows its options."
        )
    return importlib.metadata.version("lte") if arguments[0] == "--version" else None


def main() -> int:
    try:
        said = answer(sys.argv[1:])
        if said is not None:
            print(said, flush=True)
            return 0
        from lte.cli.main import main as run
    except BrokenPipeError:  # nobody reads any more, as behind | head -1; Python would say so once more at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _CLOSED
    except KeyboardInterrupt:
        print("lte: error: interrupted", file=sys.stderr)
        return 130
    return run()
