"""Start of the command ``lte``. It answers without libraries if it can, and Ctrl-C gives one line while they load."""

import importlib.metadata
import os
import sys

COMMANDS = {
    "sparsify": "make a dense model sparse, by any method, and save it",
    "prune": "set single weights of a dense model to 0, by Wanda or by magnitude",
    "train": "train a model to use few neurons, in all stages",
    "sample": "let a model write its own training data, for example chats",
    "sweep": "train, sparsify, prune or calibrate over a grid of options; one row for each run",
    "calibrate": "give a trained model another sparsity, without training",
    "quantise": "store the experts of a trained sparse model as int8 or int4",
    "eval": "measure perplexity, accuracy, ROUGE or tasks of lm_eval (MMLU, GSM8K, HumanEval), with sparsity and cost",
    "generate": "continue a prompt",
    "serve": "answer requests over HTTP in OpenAI's protocol, by vLLM or transformers",
    "bench": "time dense against sparse: ffn, decode or train",
    "report": "make one page of results: curves, Table 1, layers, routers, speed",
    "inspect": "show a model's family, its experts, and the cost of a token",
    "demo": "run everything on a real small model, on a CPU",
}
_CLOSED = 141  # the exit code that a shell gives for a process ended by SIGPIPE


def answer(arguments: list[str]) -> str | None:
    """Return the list of commands or the version, if the arguments ask for it; else None."""
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
    except (
        BrokenPipeError
    ):  # nobody reads the output any more, as with | head -1; Python would print an error at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _CLOSED
    except KeyboardInterrupt:
        print("lte: error: interrupted", file=sys.stderr)
        return 130
    return run()
