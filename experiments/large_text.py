"""A text of any size, and a small model that reads it: ``python experiments/large_text.py GIGABYTES FOLDER TEXT...``

Writes ``FOLDER/text.txt``, lines of the texts, drawn again and again, and ``FOLDER/model``, a random Llama of two
layers whose tokenizer has a token for each line. Reading, splitting and storing such a text takes what any text of its
size takes. Only the tokenizer is faster than a usual one.
"""

import random
import sys
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


def main(gigabytes: float, folder: Path, texts: list[Path]) -> None:
    """Write text and model."""
    lines = [line.strip() for text in texts for line in text.read_text(encoding="utf-8").splitlines()]
    sentences = sorted({line for line in lines if len(line) > 80})
    folder.mkdir(parents=True, exist_ok=True)
    words = {word: index for index, word in enumerate(("<unk>", "<s>", "</s>", *sentences))}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("\n", "removed")  # pyright: ignore[reportAttributeAccessIssue]
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder / "model")
    sizes = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(words), **sizes)).save_pretrained(folder / "model")
    draw, written, wanted = random.Random(0), 0, int(gigabytes * 1e9)
    with (folder / "text.txt").open("w", encoding="utf-8") as text:
        while written < wanted:
            part = "\n".join(draw.choices(sentences, k=10_000)) + "\n"
            text.write(part)
            written += len(part.encode())


if __name__ == "__main__":
    main(float(sys.argv[1]), Path(sys.argv[2]), [Path(one) for one in sys.argv[3:]])
