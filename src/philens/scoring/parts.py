"""Parts of a text with numbers of their own: thoughts, the answers after them, and steps of reasoning."""

import re
from collections.abc import Iterator, Sequence
from typing import Literal, get_args

from philens.scoring.scores import Span
from philens.support.errors import ConfigError

Steps = Literal["lines", "sentences", "equations"]

# What begins a thought, and what ends it.
_THOUGHTS = (
    *((f"<{name}>", f"</{name}>") for name in ("think", "thinking", "thought", "reasoning", "seed:think")),
    ("[THINK]", "[/THINK]"),  # Magistral
    ("\u25c1think\u25b7", "\u25c1/think\u25b7"),  # Kimi
    ("<|inner_prefix|>", "<|inner_suffix|>"),  # Apertus
    ("<|START_THINKING|>", "<|END_THINKING|>"),  # Command A
    ("<|channel>thought", "<channel|>"),  # Gemma 4
    ("<|channel|>analysis<|message|>", "<|end|>"),  # gpt-oss
)
_CLOSES = dict(_THOUGHTS)
# Ends more than thoughts, so that it tells of none by itself.
_ENDS_ANYTHING = "<|end|>"
_MARK = re.compile("|".join(re.escape(mark) for pair in _THOUGHTS for mark in pair))
# What else may stand before an answer, of gpt-oss and Command A; and special tokens after one, backwards.
_HEAD = re.compile(
    r"(?:<\|start\|>assistant)?<\|channel\|>(?!analysis)(?:[^<]|<\|constrain\|>){,200}<\|message\|>"
    r"|<\|START_(?:RESPONSE|TEXT)\|>"
)
_TAIL = re.compile(r"(?:\s*>\|\w{1,40}\|?<)*")
_LINE = re.compile(r"\S(?:.*\S)?")
# Of a line: up to a mark that ends one, with what closes after it, and a blank that no small letter follows.
_SENTENCE = re.compile(
    r"\S.*?(?:(?<![.!?\u2026])[.!?\u2026]++[\"'\u201d\u2019)\]*]*+(?=\s++[^\sa-z])"
    r"|[\u3002\uff01\uff1f]++[\"'\u201d\u2019\uff09]*+|\Z)"
)
# What repeats is bounded, so that a text takes no longer for each character the longer it is.
_NUMBER = r"\d{1,30}(?:,\d{3}){,9}(?:\.\d{1,30})?|\.\d{1,30}"
_OPERAND = rf"\({{,9}}[-\u2212]?[$\u20ac\u00a3]?(?:{_NUMBER}|[A-Za-z](?![A-Za-z]))%?\){{,9}}"
_SIGN = r"[-\u2212+*/\u00d7\u00f7\u00b7^]"
_SIDE = rf"{_OPERAND}(?:[^\S\n]{{,3}}{_SIGN}[^\S\n]{{,3}}{_OPERAND}){{,30}}"
_EQUATION = re.compile(
    # A formula of LaTeX; else numbers and letters on both sides of =, from the first of them on.
    r"\$\$[^$]{,1000}\$\$|\\\[.{,1000}?\\\]|\\\(.{,1000}?\\\)|\$[^$\n]{,1000}\$(?!\d)"
    rf"|(?<![\w.(=])(?<!{_SIGN})(?<!{_SIGN}\s){_SIDE}(?:[^\S\n]{{,3}}=[^\S\n]{{,3}}{_SIDE}){{1,30}}",
    re.DOTALL,
)


def _lines(text: str, start: int, end: int) -> Iterator[re.Match[str]]:
    return _LINE.finditer(text, start, end)


def _sentences(text: str, start: int, end: int) -> Iterator[re.Match[str]]:
    for line in _lines(text, start, end):
        yield from _SENTENCE.finditer(text, *line.span())


def _equations(text: str, start: int, end: int) -> Iterator[re.Match[str]]:
    return (match for match in _EQUATION.finditer(text, start, end) if "=" in match[0])


_FIND = {"lines": _lines, "sentences": _sentences, "equations": _equations}


def check_steps(steps: str | None) -> None:
    """Raise a ConfigError unless this names a kind of steps, or None."""
    if steps is not None and steps not in _FIND:
        raise ConfigError(f"steps must be one of {', '.join(_FIND)}, not {steps!r}.")


def parts_of(text: str, messages: Sequence[Span] = (), steps: Steps | None = None) -> list[Span]:
    """The spans `think` and `answer` of a text that has them, then those of its steps, `line 1` and so on.

    Of a chat, the assistant's messages are looked at, each from the end of the message before it: templates
    write thoughts in front of a content. Steps are those of thoughts and answers, else of these messages,
    else of the text.

    Args:
        steps: which there are to be; None for none.
    """
    found, whole = [], []
    before = 0
    for name, start, end in messages or [Span("", 0, len(text))]:
        if not messages or name == "assistant":
            own = list(_thoughts(text, before, start, end, sure=bool(messages)))
            found += own
            whole += own or [Span(name, start, end)]
        before = end
    if steps is not None:
        matches = (match for _, start, end in whole for match in _FIND[steps](text, start, end))
        found += [Span(f"{steps[:-1]} {number}", *match.span()) for number, match in enumerate(matches, 1)]
    return found


def steps_of(text: str) -> dict[Steps, list[Span]]:
    """The steps of a plain text by their kinds, as `parts_of` has them; no kind of which it has less than
    two, and none that is another one over again."""
    found: dict[Steps, list[Span]] = {}
    cuts: list[list[tuple[int, int]]] = []
    for kind in get_args(Steps):
        steps = [span for span in parts_of(text, steps=kind) if span.name.startswith(kind[:-1])]
        cut = [(start, end) for _, start, end in steps]
        if len(steps) > 1 and cut not in cuts:
            found[kind] = steps
            cuts.append(cut)
    return found


def _thoughts(text: str, before: int, start: int, end: int, sure: bool) -> Iterator[Span]:
    """Thoughts and answers from `before` to `end`; `sure` that marks there are marks, and not talked about.

    A thought may begin without a mark, at `start`, where the prompt had that, and end without one, where it
    was cut off.
    """
    marks = list(_MARK.finditer(text, before, end))
    last = {match[0]: match.start() for match in marks}
    first = next((match.start() for match in [_LINE.search(text, before, end)] if match), end)
    opened: int | None = None
    close = ""  # what ends the thought that is open
    answer: int | None = None
    thought = False  # whether one that is not empty comes before the answer
    for match in marks:
        mark, after = match[0], match.end()
        if mark in _CLOSES:
            closed = last.get(_CLOSES[mark], -1) >= after
            if opened is None and (sure or match.start() == first or closed):
                if answer is not None and thought:
                    yield from _trimmed("answer", text, answer, match.start())
                opened, close, answer = after, _CLOSES[mark], None
        elif (opened is not None and mark == close) or (
            opened is None
            and answer is None
            and mark != _ENDS_ANYTHING
            and (sure or after == end or text[after] == "\n")
        ):
            own = list(_trimmed("think", text, start if opened is None else opened, match.start()))
            yield from own
            head = _HEAD.match(text, after, end)
            opened, answer, thought = None, head.end() if head else after, bool(own)
    if opened is not None:
        yield from _trimmed("think", text, opened, end)
    elif answer is not None and thought:
        yield from _trimmed("answer", text, answer, end)


def without_thoughts(text: str) -> str:
    """What a text says after its last thought."""
    closes = [match.end() for match in _MARK.finditer(text) if match[0] not in _CLOSES]
    return text[closes[-1] :] if closes else text


def _trimmed(name: str, text: str, start: int, end: int) -> Iterator[Span]:
    """A span without blanks at its ends, and special tokens at its end; none of what is blank."""
    tail = _TAIL.match(text[start:end][::-1])
    inner = text[start : end - (tail.end() if tail else 0)].strip()
    if inner:
        start = text.index(inner, start)
        yield Span(name, start, start + len(inner))
