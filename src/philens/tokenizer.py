"""The character tokenizer of the synthetic tasks: one token per ASCII character, its id the ASCII code."""

from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast


def character_tokenizer() -> PreTrainedTokenizerFast:
    """Make the tokenizer, with 128 tokens, ids equal to ASCII codes and nothing added to the text.

    Special tokens are control characters, which texts do not hold: NUL pads, ETX (3) ends a text, SUB (26)
    stands for each character outside ASCII. Offsets are character indices into the text. Decoding gives the
    text back, spaces included. `save_pretrained` writes what `AutoTokenizer.from_pretrained` reads.
    """
    vocabulary = {chr(code): code for code in range(128)}
    # Byte-pair encoding without a merge leaves single characters and needs no pre-tokenizer.
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="\x1a", fuse_unk=False))
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="\x00",
        eos_token="\x03",
        unk_token="\x1a",
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )
