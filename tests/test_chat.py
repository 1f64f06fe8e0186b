"""Chats as texts: the same on any day, contents in every form, and which tokens of a reply count."""

import datetime
import json
import time
from typing import Any

import numpy as np
import pytest
import transformers.utils.chat_template_utils as clock
from faults.texts import tiny_lens
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import philens
from conftest import make_llama
from philens.bases.tokenizer import byte_tokenizer, character_tokenizer
from philens.reasoning.sampling import prompt_ids
from philens.reasoning.solutions import measure_replies, render_prompt
from philens.scoring.score import score
from philens.scoring.texts import render_chat, tokenize
from philens.support.errors import InputError
from philens.tasks.automata import TaskConfig
from philens.tasks.chat import MOMENT, encode_chat, end_marks, plain_chat, render
from philens.tasks.sources import TextPart
from philens.tasks.text import TextMixture
from test_score import lens_of
from test_scores import byte_level, unigram
from test_solutions import LLAMA_3, llama_3

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHAT = [{"role": "user", "content": "2 + 3?"}, {"role": "assistant", "content": "It is 5."}]


def many_parts(unk: str, bos: str, eos: str, pad: str, template: str = CHATML) -> Any:
    """A byte-level tokenizer that puts no BOS first and whose special tokens play several parts."""
    special = dict.fromkeys((unk, bos, eos, pad, "<|im_start|>", "<|im_end|>"))
    tokens = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE(vocab={token: n for n, token in enumerate(tokens)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    backend.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    backend.add_special_tokens([*special])
    parts = {"unk_token": unk, "bos_token": bos, "eos_token": eos, "pad_token": pad}
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template, **parts)


def unknown_ends() -> Any:
    """One token stands for unknown words and ends, begins and fills texts."""
    backend = Tokenizer(models.WordLevel({"<e>": 0, "It": 1, "is": 2, "5": 3}, unk_token="<e>"))  # pyright: ignore[reportCallIssue]
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    parts = dict.fromkeys(("unk_token", "bos_token", "eos_token", "pad_token"), "<e>")
    return PreTrainedTokenizerFast(tokenizer_object=backend, **parts)


def gpt_2() -> Any:
    return many_parts(*["<|endoftext|>"] * 4)


def smollm2() -> Any:
    return many_parts("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|im_end|>")


TOKENIZERS = {
    "characters": character_tokenizer,
    "bytes": byte_tokenizer,
    "BPE with BOS": byte_level,
    "unigram with BOS and EOS": unigram,
    "byte pairs": lambda: tiny_lens("byte pairs")[1],
    "unigram with bytes": lambda: tiny_lens("unigram with bytes")[1],
    "WordPiece": lambda: tiny_lens("WordPiece")[1],
    "Llama 3": llama_3,
    "GPT-2": gpt_2,
    "SmolLM2": smollm2,
    "unknown ends": unknown_ends,
}


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return TOKENIZERS[request.param]()


def with_template(template: str) -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


# Which tokens count.


def test_what_ends_a_reply_does_not_count_and_all_else_does(tokenizer: Any) -> None:
    """The rule of docs/ranking.md, whatever parts special tokens play."""
    lens = lens_of(make_llama(vocab_size=len(tokenizer)))
    end = tokenizer.eos_token or tokenizer.sep_token or tokenizer.unk_token
    prompts: list[Any] = ["Add: "]
    if tokenizer.chat_template:
        prompts.append(CHAT[:1])
    for prompt in prompts:
        replies = ["It is 5", "It is é 日 5", f"It {end} is 5"]
        ends = [end, f"{end}{end}", f"{end}\n"] if tokenizer.eos_token else []
        table = measure_replies(lens, tokenizer, [prompt] * 3, replies)
        before = render_prompt(tokenizer, prompt)
        for reply, count in zip(replies, table["tokens"], strict=True):
            own = tokenizer(before + reply, add_special_tokens=False, return_offsets_mapping=True)
            assert count == sum(stop > max(len(before), start) for start, stop in own.offset_mapping)
            for mark in ends:
                marked = measure_replies(lens, tokenizer, [prompt], [reply + mark])
                np.testing.assert_allclose(
                    marked.iloc[0].to_numpy(float),
                    table.iloc[replies.index(reply)].to_numpy(float),
                    rtol=1e-4,
                )


def test_marks_at_the_end_alone() -> None:
    tokenizer = smollm2()
    for reply, own in [
        ("5<|im_end|>\n", "5"),
        ("5 \n<|im_end|>\n<|endoftext|>", "5 \n"),
        ("<|im_end|>5", "<|im_end|>5"),
        ("<|im_end|>", ""),
        ("5 \n", "5 \n"),
        ("<|im_end", "<|im_end"),
    ]:
        assert end_marks(tokenizer).sub("", reply) == own
    silent = measure_replies(lens_of(make_llama(vocab_size=300)), tokenizer, ["a"] * 2, ["<|im_end|>", "b"])
    assert silent["tokens"].tolist() == [0, 1]


@pytest.mark.parametrize("make", [gpt_2, smollm2, unknown_ends])
def test_a_text_of_special_tokens_alone_is_refused_and_unknown_words_are_read(make: Any) -> None:
    tokenizer = make()
    with pytest.raises(InputError, match="gives only special tokens"):
        tokenize(tokenizer, tokenizer.eos_token, "the text")
    found = tokenize(tokenizer, "日本 words", "the text")
    assert found.leading == 0
    assert tokenize(tokenizer, f"{tokenizer.bos_token} words", "the text").leading == 1


def test_training_counts_replies_by_their_place() -> None:
    for make in (gpt_2, smollm2):
        tokenizer = make()
        tokens, counted = encode_chat(tokenizer, [*CHAT, *CHAT])
        assert tokenizer.decode(tokens[counted]) == "It is 5.<|im_end|>\nIt is 5.<|im_end|>\n"
    tokenizer = gpt_2()
    tokenizer.chat_template = None
    tokens, counted = encode_chat(tokenizer, CHAT)
    assert tokenizer.decode(tokens) == "2 + 3?\n\nIt is 5.<|endoftext|>"
    assert tokenizer.decode(tokens[counted]) == "It is 5.<|endoftext|>"


# The clock.

CLOCKS = {
    "strftime_now": "{{ strftime_now('%Y-%m-%d %H:%M:%S') }}",
    "in a macro": "{% macro day() %}{{ strftime_now('%-d. %B') }}{% endmacro %}{{ day() }}",
    "if defined": "{% if strftime_now is defined %}{{ strftime_now('%A') }}{% endif %}",
    "date_string": "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}"
    "{% endif %}{{ date_string }}",
    "every letter": "{{ strftime_now('%a %A %b %B %c %d %D %e %F %H %I %j %m %M %p %S %T %U %y %Y %% %-m')}}",
}


@pytest.mark.parametrize("template", CLOCKS.values(), ids=CLOCKS)
def test_the_clock_stands_still_wherever_a_chat_is_rendered(
    template: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    body = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}"
    tokenizer = with_template("  \n" + template + "\n" + body)
    lens = lens_of(make_llama(vocab_size=len(tokenizer)))
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": CHAT}) + "\n")
    part = {"mine": TextPart(str(tmp_path / "chats.jsonl"))}

    class Clock(datetime.datetime):
        day = 1

        @classmethod
        def now(cls, tz: Any = None) -> datetime.datetime:
            return datetime.datetime(2031, 3, cls.day, 4 + cls.day, 9)

    monkeypatch.setattr(clock, "datetime", Clock)

    def everything() -> list[Any]:
        reward = philens.PHiReward(lens, tokenizer)
        return [
            score(lens, tokenizer, [CHAT])[0].text,
            encode_chat(tokenizer, CHAT)[0].tolist(),
            TextMixture(part, tokenizer, 999, 0, TaskConfig()).documents(np.arange(1)).tokens.tolist(),
            prompt_ids(tokenizer, CHAT[:1]),
            render_prompt(tokenizer, CHAT[:1]),
            philens.rank(lens, tokenizer, [CHAT[:1]], [["a", "b"]])["phi_sum"].tolist(),
            reward([CHAT[:1]], [CHAT[1:]]),
        ]

    first = everything()
    Clock.day = 12
    assert everything() == first
    # It is what the real clock would say at that moment, and blanks are those of the template.
    monkeypatch.setattr(Clock, "now", classmethod(lambda cls, tz=None: MOMENT))
    day = {"date_string": "26 Jul 2024"} if "date_string" in template else {}
    assert first[0] == tokenizer.apply_chat_template(CHAT, tokenize=False, **day)
    assert first[4] == tokenizer.apply_chat_template(CHAT[:1], tokenize=False, **day)


def test_the_moment_is_llama_3s_date() -> None:
    tokenizer = llama_3(LLAMA_3)
    assert "Today Date: 26 Jul 2024" in render_prompt(tokenizer, CHAT[:1])
    assert time.strftime("%d %b %Y", MOMENT.timetuple()) == "26 Jul 2024"


# Contents.


def parts(*texts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text} for text in texts]


# As Qwen2-VL's, in short: texts or parts.
BOTH = (
    "{% for m in messages %}<{{ m['role'] }}>{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for p in m['content'] %}{% if p['type'] == 'text' %}{{ p['text'] }}{% endif %}{% endfor %}{% endif %}"
    "</>{% endfor %}"
)
# As LLaVA's: parts alone, each with a blank after it; a text as content is left out.
PARTS_ALONE = (
    "{% for m in messages %}<{{ m['role'] }}>"
    "{% for p in m['content'] | selectattr('type', 'equalto', 'text') %}{{ p['text'] + ' ' }}"
    "{% endfor %}</>{% endfor %}"
)
LINES = BOTH.replace("{{ p['text'] }}", "{{ '' if loop.first else '\\n' }}{{ p['text'] }}")
SIMPLE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</>{% endfor %}"
STRICT = SIMPLE.replace("m['content']", "m['content'] + ''")
FORMS = {
    "both": (BOTH, "ab"),
    "parts alone": (PARTS_ALONE, "a b "),
    "by line": (LINES, "a\nb"),
    "prints what it gets": (SIMPLE, "ab"),
    "texts alone": (STRICT, "ab"),
}


@pytest.mark.parametrize(("template", "joined"), FORMS.values(), ids=FORMS)
def test_parts_are_joined_as_the_template_would(template: str, joined: str) -> None:
    tokenizer = with_template(template)
    chat = [{"role": "user", "content": parts("a", "b")}, {"role": "assistant", "content": "reply"}]
    blank = " " if template == PARTS_ALONE else ""
    expected = f"<user>{joined}</><assistant>reply{blank}</>"
    text, spans = render_chat(tokenizer, chat, "the chat")
    assert text == expected
    assert [text[span.start : span.end].strip() for span in spans] == [joined.strip(), "reply"]
    assert tokenizer.decode(encode_chat(tokenizer, chat)[0]) == expected
    assert render_prompt(tokenizer, chat[:1]) == f"<user>{joined}</>"
    if template in (BOTH, LINES, PARTS_ALONE):  # as transformers itself renders it
        assert tokenizer.apply_chat_template(chat[:1], tokenize=False) == f"<user>{joined}</>"
    assert chat[0]["content"] == parts("a", "b")


def test_parts_without_a_template() -> None:
    tokenizer = character_tokenizer()
    chat = [{"role": "user", "content": parts("a", "b")}, {"role": "assistant", "content": ["c"]}]
    tokens, counted = encode_chat(tokenizer, chat)
    assert tokenizer.decode(tokens) == "ab\n\nc\x03"
    assert tokenizer.decode(tokens[counted]) == "c\x03"
    assert render_prompt(tokenizer, chat[:1]) == "Question: ab\nAnswer:"


# As Qwen 2.5's, in short.
CALLING = (
    "{% for m in messages %}<{{ m.role }}>{% if m.content %}{{ m.content }}{% endif %}"
    "{% for call in m.tool_calls %}"
    "<call>{{ call.function.name }}({{ call.function.arguments | tojson }})</call>"
    "{% endfor %}</>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
# As DeepSeek V3's: arguments are text.
JOINING = CALLING.replace("call.function.arguments | tojson", "'json ' + call.function.arguments")


def calling(arguments: Any, content: Any = None) -> list[dict[str, Any]]:
    call = {"id": None, "type": "function", "function": {"name": "add", "arguments": arguments}}
    return [
        {"role": "user", "content": "2 + 3?", "tool_calls": None},
        {"role": "assistant", "content": content, "tool_calls": [call]},
        {"role": "tool", "content": "5", "tool_calls": None},
        {"role": "assistant", "content": "It is 5.", "tool_calls": []},
    ]


@pytest.mark.parametrize("arguments", [{"a": 2, "b": 3, "c": None}, '{"a": 2, "b": 3}'])
def test_tool_calls_are_rendered_and_count(arguments: Any) -> None:
    tokenizer = with_template(CALLING)
    call = '<call>add({"a": 2, "b": 3})</call>'
    text, spans = render_chat(tokenizer, calling(arguments), "the chat")
    assert text == f"<user>2 + 3?</><assistant>{call}</><tool>5</><assistant>It is 5.</>"
    assert [text[span.start : span.end] for span in spans] == ["2 + 3?", call, "5", "It is 5."]
    tokens, counted = encode_chat(tokenizer, calling(arguments))
    assert tokenizer.decode(tokens) == text
    assert tokenizer.decode(tokens[counted]) == f"{call}</>It is 5.</>"
    text, spans = render_chat(tokenizer, calling(arguments, "Let me see."), "the chat")
    assert text[spans[1].start : spans[1].end] == f"Let me see.{call}"


def test_arguments_as_the_template_takes_them() -> None:
    text, _ = render_chat(with_template(JOINING), calling('{"a": 2}'), "the chat")
    assert '<call>add(json {"a": 2})</call>' in text


def test_a_call_that_is_rendered_otherwise_once_others_follow() -> None:
    last = "<{{ m.role }}>{% if loop.last %}!{% endif %}"
    tokenizer = with_template(CALLING.replace("<{{ m.role }}>", last, 1))
    tokens, counted = encode_chat(tokenizer, calling({"a": 2}))
    assert tokenizer.decode(tokens[counted]) == '<call>add({"a": 2})</call>It is 5.'


@pytest.mark.parametrize(
    ("message", "sentence"),
    [
        ({"content": None}, r"a content that is no text in message 2 \(None\)"),
        ({"content": None, "tool_calls": []}, "holds .*; a chat is a list of messages|no text in message 2"),
        ({"content": [{"type": "image", "image": "a.png"}]}, r"no text in message 2 \(\[\{'type': 'image'"),
        ({"content": [*parts("a"), {"type": "text"}]}, "no text in message 2"),
        ({"content": 5}, r"no text in message 2 \(5\)"),
        ({}, "a chat is a list of messages, each with role and content"),
    ],
)
def test_other_contents_are_one_sentence(message: Any, sentence: str, tmp_path: Any) -> None:
    chat = [CHAT[0], {"role": "assistant"} | message]
    tokenizer = with_template(SIMPLE)
    lens = lens_of(make_llama(vocab_size=len(tokenizer)))
    with pytest.raises(InputError, match=rf"texts\[1\] .*{sentence}"):
        score(lens, tokenizer, [CHAT, chat])
    with pytest.raises(InputError, match=sentence):
        encode_chat(tokenizer, chat, "row 7")
    with pytest.raises(InputError, match=rf"prompt of candidate 0 of prompt 0 .*{sentence}"):
        philens.rank(lens, tokenizer, [chat], [["a", "b"]])
    with pytest.raises(InputError, match=sentence):
        philens.PHiReward(lens, tokenizer)([chat], ["a"])
    with pytest.raises(InputError, match="A completion is a string"):
        philens.PHiReward(lens, tokenizer)([CHAT[:1]], [[{"role": "assistant"} | message]])


def test_a_template_without_tool_calls_says_so(tmp_path: Any) -> None:
    tokenizer = with_template(SIMPLE)
    with pytest.raises(InputError, match=r"leaves out the tool calls of texts\[0\]; use a tokenizer"):
        score(lens_of(make_llama(vocab_size=len(tokenizer))), tokenizer, [calling({"a": 2})])
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": calling({"a": 2})}) + "\n")
    text = TextMixture({"mine": TextPart(str(tmp_path / "a.jsonl"))}, tokenizer, 99, 0, TaskConfig())
    with pytest.raises(InputError, match=r"the tool calls of document 0 of data\.parts\.mine;"):
        text.documents(np.arange(1))
    tokenizer.chat_template = None
    with pytest.raises(InputError, match="calls tools and the tokenizer has no chat template to write that"):
        encode_chat(tokenizer, calling({"a": 2}))


def test_replies_as_parts() -> None:
    tokenizer = byte_tokenizer()
    lens = lens_of(make_llama(vocab_size=len(tokenizer)))
    reward = philens.PHiReward(lens, tokenizer)
    of_parts = [{"role": "assistant", "content": parts("It is", " 5")}]
    of_text = [{"role": "assistant", "content": "It is 5"}]
    assert reward([CHAT[:1]], [of_parts]) == reward([CHAT[:1]], [of_text])


def test_rows_of_a_table(tmp_path: Any) -> None:
    """Training names the row."""
    rows = [{"messages": CHAT}] * 3 + [{"messages": [CHAT[0], {"role": "assistant", "content": None}]}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = TextMixture({"mine": TextPart(str(tmp_path / "a.jsonl"))}, byte_tokenizer(), 99, 0, TaskConfig())
    with pytest.raises(InputError, match=r"Document 3 of .*a\.jsonl has a content that is no text"):
        text.documents(np.arange(40))


def test_a_chat_stays_as_it_was() -> None:
    chat = calling('{"a": 2}')
    before = json.dumps(chat)
    render(with_template(CALLING), plain_chat(with_template(CALLING), chat, "the chat"), "the chat")
    assert json.dumps(chat) == before
