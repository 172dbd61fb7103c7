"""A tokenizer for tiny models, made in place."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast


def byte_tokenizer(**special: str) -> PreTrainedTokenizerFast:
    """A token a byte, and <eos> (0), <pad> (1)."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<eos>", "<pad>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **{"eos_token": "<eos>", "pad_token": "<pad>", **special}
    )


def with_bos() -> PreTrainedTokenizerFast:
    """The same with token 1 as BOS, which it puts before each text."""
    tokenizer = byte_tokenizer(bos_token="<pad>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<pad> $A", special_tokens=[("<pad>", 1)])
    return tokenizer
