"""Texts of every script, with markup, signs without width, control characters and lone surrogates."""

import random
from functools import cache

# First and last character of blocks, a few of each kind of writing, and what no writing has.
_BLOCKS = (
    (0x20, 0x7E), (0xA1, 0x17F), (0x370, 0x3FF), (0x400, 0x4FF), (0x530, 0x58F), (0x590, 0x5FF),
    (0x600, 0x6FF), (0x700, 0x74F), (0x900, 0x97F), (0x980, 0x9FF), (0xB80, 0xBFF), (0xE00, 0xE7F),
    (0xF00, 0xFFF), (0x1000, 0x109F), (0x10A0, 0x10FF), (0x1100, 0x11FF), (0x1200, 0x137F),
    (0x13A0, 0x13FF), (0x1780, 0x17FF), (0x1800, 0x18AF), (0x2000, 0x206F), (0x20A0, 0x20CF),
    (0x20D0, 0x20FF), (0x2200, 0x22FF), (0x2500, 0x257F), (0x3040, 0x30FF), (0x4E00, 0x9FFF),
    (0xAC00, 0xD7A3), (0xE000, 0xF8FF), (0xFB1D, 0xFDFF), (0xFE00, 0xFE0F), (0xFE70, 0xFEFF),
    (0xFF00, 0xFFEF), (0xFFF0, 0xFFFF), (0x10330, 0x1034F), (0x12000, 0x123FF), (0x13000, 0x1342F),
    (0x1D400, 0x1D7FF), (0x1F300, 0x1F6FF), (0x1F900, 0x1F9FF), (0x20000, 0x2A6DF), (0xE0000, 0xE007F),
    (0x10FF00, 0x10FFFF),
)  # fmt: skip
MARKUP = (
    "<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "<svg onload=alert(1)>",
    "</style><script>alert(1)", "</title><b>", "</textarea>", "]]>", "<![CDATA[", "<!--", "-->", "<!-->",
    "--!>", '" onmouseover="alert(1)', "' x='", "<iframe src=//example.org>",
    "<link rel=stylesheet href=//example.org/x.css>", "javascript:alert(1)", "&lt;b&gt;", "&amp;",
    "&#x3c;script&#x3e;", "&", "<", ">", '"', "'", "`", "</span></div></figure>",
    "<base href=//example.org>", "<meta http-equiv=refresh content=0;url=//example.org>", "<plaintext>",
    "<math><mi//xlink:href=x>", "</script>", "@import url(//example.org)", "expression(alert(1))",
    "{{7*7}}", "${7*7}", "[bold red]", "[/]", "[link=x]", "$x^2$", "\\", "%s", "%n", "=1+1",
    "<a href='data:text/html,x'>", "<object data=x>", "<style>*{display:none}</style>",
)  # fmt: skip
SIGNS = (
    "\x00", "\x07", "\x08", "\x0b", "\x0c", "\x1a", "\x7f", "\x85", "\x9b31m", "\x1b[31m",
    "\x1b]0;title\x07", "\x1b]8;;http://x\x1b\\", "\x1b[2J", "\x1b", "\r", "\r\n", "\n", "\n\n", "\t", " ",
    "   ", "\u00a0", "\u1680", "\u2028", "\u2029", "\u200b", "\u200c", "\u200d", "\u200e", "\u200f",
    "\u202a", "\u202e", "\u202c", "\u2066", "\u2069", "\ufeff", "\ufffe", "\uffff", "\ufffd", "\u00ad",
    "\u034f", "\u0301" * 40, "e\u0301", "\u0e33", "ﬁ", "İ", "ß", "ǰ", "ΐ", "👩‍👩‍👧‍👦", "🏳️‍🌈", "👍🏽", "🇩🇪🇫🇷",
    "1️⃣", "\U000e0001", "שלום", "مرحبا", "नमस्ते", "한국어", "日本語", "﷽", "\uff28", "①", "²", "⏎",
    "⇥", "␣", "∅",
    "⟨U+200B⟩", "▁", "##", "Ġ", "Ċ", "<unk>", "<s>", "</s>", "<0x0A>", "<|begin|>", "<|end|>", "<|pad|>",
    "[CLS]", "[UNK]", "\x03",
)  # fmt: skip


@cache
def texts(count: int, surrogates: bool = False) -> list[str]:
    """Texts that hypothesis composes of writing, signs and markup; the same in one run of faults."""
    from hypothesis import HealthCheck, Phase, given, seed, settings
    from hypothesis import strategies as st

    writing = st.sampled_from(_BLOCKS).flatmap(
        lambda block: st.text(
            st.characters(min_codepoint=block[0], max_codepoint=block[1], exclude_categories=["Cs"]),
            max_size=8,
        )
    )
    pieces = [
        writing,
        writing,
        st.sampled_from(MARKUP),
        st.sampled_from(SIGNS),
        st.text("ab \n", max_size=12),
    ]
    if surrogates:
        pieces.append(st.characters(categories=["Cs"]))
    long = st.tuples(st.sampled_from(MARKUP + SIGNS), st.integers(1, 60)).map(lambda pair: pair[0] * pair[1])
    made = st.lists(st.one_of(*pieces, long), min_size=1, max_size=8).map("".join)
    found: list[str] = []

    @seed(random.getrandbits(64))
    @settings(
        max_examples=count + count // 10,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(made)
    def collect(text: str) -> None:
        if len(found) < count:
            found.append(text)

    collect()
    found += [found[k % len(found)] for k in range(count - len(found))]
    return found
