"""Tokenizers of models trained from nothing: characters for formal languages, bytes or pairs for text."""

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

PAD, BEGIN, END = "<|pad|>", "<|begin|>", "<|end|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
SPECIAL_TOKENS = (PAD, BEGIN, END, *ROLES)
# A role's token, the message, and the token that ends a text; a reply is what stands after its role's.
CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
{{- '<|' + message['role'] + '|>' -}}
{%- if message['role'] == 'assistant' -%}
{%- generation -%}{{- message['content'] + eos_token -}}{%- endgeneration -%}
{%- else -%}
{{- message['content'] + eos_token -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}
"""


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


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Make a tokenizer with one token for each byte of UTF-8, six special ones, and a chat template.

    It puts `<|begin|>` before a text; `<|end|>` ends a text or a message. Decoding gives any text back.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = {token: number for number, token in enumerate([*SPECIAL_TOKENS, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=tokens, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return _byte_level(tokenizer)


def train_bpe(texts: Iterable[str], vocab_size: int, split_digits: bool = False) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer, else like `byte_tokenizer`.

    Args:
        texts: what to learn frequent pairs from.
        vocab_size: tokens, special ones included; fewer if the texts have not as many pairs.
        split_digits: each digit is a token of its own, so that numbers can be calculated with.
    """
    tokenizer = Tokenizer(models.BPE())
    steps: list[pre_tokenizers.PreTokenizer] = [pre_tokenizers.ByteLevel(add_prefix_space=False)]
    if split_digits:
        steps.insert(0, pre_tokenizers.Digits(individual_digits=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _byte_level(tokenizer)


def _byte_level(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    tokenizer.decoder = decoders.ByteLevel()
    begin = processors.TemplateProcessing(
        single=f"{BEGIN} $A", special_tokens=[(BEGIN, SPECIAL_TOKENS.index(BEGIN))]
    )
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), begin])  # pyright: ignore[reportAttributeAccessIssue]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BEGIN,
        eos_token=END,
        extra_special_tokens=list(ROLES),
        chat_template=CHAT_TEMPLATE,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )
