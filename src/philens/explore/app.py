"""The controls of the page, on Gradio, and what happens when they are used."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import gradio as gr
from gradio.themes import Base
from gradio.themes.utils.fonts import Font

from philens.explore import view
from philens.explore.examples import Example, examples
from philens.explore.link import START, Shown
from philens.explore.models import FORMAL, TEXT, Explored
from philens.explore.session import NAMES, Sessions, Update
from philens.explore.view import PALETTES, RANGES, Look
from philens.show.colours import plain_label
from philens.support.errors import PhilensError

_HEAD = """<div class="ph-head"><h1>Where does the model think?</h1>
<p>Each token is coloured by <b>phi</b>, the information in nats that its hidden state adds to what the
model's earlier hidden states already say, beside its <b>surprisal</b>. Point at a token, or walk through
the text with the arrow keys, to read its values; click it, or press Enter, to put another in its place or
write on from there; drag, or hold Shift, to mark a span.</p></div>"""
_COUNT = """(text) => {{
  const line = document.querySelector('#ph-count'), count = [...text].length;
  line.textContent = `${{count.toLocaleString('en')}} of {most:,} characters`;
  line.classList.toggle('over', count > {most});
}}"""
# Lists whose options depend on the model. A click may come before the options of the one before it did, which
# Gradio would take for an error; whether a model has what was chosen is asked where the answer is a sentence.
_ANY: dict[str, Any] = {"allow_custom_value": True}
# The part of the address after `#`, which comes with no request; then what the page loads with.
_FRAGMENT = "(_, ...others) => [location.hash.slice(1), ...others]"
# The time at which the page asks, so that its last word is the session's, too.
_WHEN = "(_, ...others) => [performance.now(), ...others]"
_HIGHLIGHT = """(text, first, last) => window.philens?.highlight(
  text === 'Text B' ? 1 : 0, Math.min(first, last), Math.max(first, last))"""


def build(models: Mapping[str, Explored], sessions: Sessions) -> gr.Blocks:
    """The page.

    Args:
        models: models to choose from, by name; the first is chosen.
        sessions: what each tab is doing.
    """
    # With a model of the user's own, texts are for it; formal languages are for the shipped model alone.
    first = next(iter(models.values()))
    offered = {name: one for name, one in examples().items() if not one.formal or FORMAL in models}
    start = offered["prose" if TEXT in models or FORMAL not in models else "in context language"]
    options: dict[str, Any] = {
        "api_visibility": "private",
        "show_progress": "hidden",
        "trigger_mode": "multiple",
    }

    buttons: dict[str, gr.Button] = {}
    with gr.Blocks(title="philens explore", analytics_enabled=False) as page:
        _markup(_HEAD)
        status = _markup(view.status(""), elem_id="status")
        with gr.Row():
            with gr.Column(scale=2, min_width=320):
                # Of one height: what stands below must not move from under a pointer when an answer comes.
                text = gr.Textbox(
                    label=NAMES[0], lines=10, max_lines=10, placeholder="Paste a text …", elem_id="text-a"
                )
                _markup(f'<p class="ph-count" id="ph-count">0 of {sessions.most:,} characters</p>')
                with gr.Row():
                    size: dict[str, Any] = {"size": "md", "min_width": 80}
                    read = gr.Button("Read", variant="primary", elem_id="read", **size)
                    write = gr.Button("Write on", elem_id="write", **size)
                    cancel = gr.Button("Cancel", variant="stop", interactive=False, elem_id="cancel", **size)
                for group, formal in (("Kinds of text", False), ("Formal languages", True)):
                    chosen = [one for one in offered.values() if one.formal == formal]
                    if chosen:
                        _markup(f'<p class="ph-label">{group}</p>')
                        with gr.Row(elem_classes="ph-examples"):
                            for one in chosen:
                                buttons[one.name] = gr.Button(one.name, size="sm")
                model = gr.Radio(list(models), value=first.name, label="Model", visible=len(models) > 1)
                point = gr.Dropdown(
                    list(first.points), value=next(iter(first.points)), label="Insertion point", **_ANY
                )
                with gr.Accordion("Compare with a second text", open=False) as second:
                    other = gr.Textbox(label=NAMES[1], lines=4, max_lines=14, elem_id="text-b")
                with gr.Accordion("How the model writes on", open=False):
                    count = gr.Number(60, label="Tokens at most", precision=0)
                    sample = gr.Checkbox(False, label="Draw tokens, instead of the likeliest")
                    temperature = gr.Number(1.0, label="Temperature of drawing", step=0.1)
            with gr.Column(scale=5, min_width=480):
                with gr.Row():
                    left = _metric(first, 0, "Left")
                    right = _metric(first, 1, "Right")
                    spread = gr.Dropdown(
                        list(RANGES), value=next(iter(RANGES)), label="Colour scale", min_width=150
                    )
                    low = gr.Number(0.0, label="from", visible=False, min_width=80)
                    high = gr.Number(10.0, label="to", visible=False, min_width=80)
                    palette = gr.Dropdown(list(PALETTES), value="colour", label="Palette", min_width=110)
                lacking = _markup(view.lacking(first.lacking(next(iter(first.points)))))
                result = _markup("", elem_id="result", js_on_load=view.asset("page.js"))
                marked = _markup("", elem_id="marked")
                with gr.Row():
                    which = gr.Radio(list(NAMES), value=NAMES[0], label="Mark a span in", min_width=160)
                    begin = gr.Number(0, label="from token", precision=0, min_width=100, elem_id="mark-from")
                    end = gr.Number(0, label="to token", precision=0, min_width=100, elem_id="mark-to")

        look = [left, right, spread, low, high, palette]
        fragment, when = gr.Textbox(visible=False), gr.Number(visible=False)
        shown = [status, result, text, other, second, cancel, left, right]

        def session(request: gr.Request) -> Any:
            return sessions.of(request.session_hash or "")

        def changes(
            updates: Iterable[Update], look: Look, fields: Mapping[Any, Any] | None = None
        ) -> Iterator[dict[Any, Any]]:
            """What the session says, as changes of components, and with the first of them other fields.

            The choice of metrics is left alone but where it could not be had: the reader may have gone on.
            """
            for one in updates:
                change: dict[Any, Any] = {**(fields or {}), cancel: gr.update(interactive=one.busy)}
                fields = None
                if one.status is not None:
                    change[status] = one.status
                change |= {
                    box: own for box, own in zip((text, other), one.texts, strict=True) if own is not None
                }
                if one.texts[1] is not None:
                    change[second] = gr.update(open=True)
                if one.result is not None:
                    change[result] = one.result
                if one.metrics not in ((), look.metrics):
                    change |= dict(zip((left, right), one.metrics, strict=True))
                yield change
            # When a generator ends, Gradio sends its last changes again, over what others did meanwhile; of
            # one that gave nothing, it empties the outputs.
            yield {status: gr.skip()}

        def looked(left: str, right: str, spread: str, low: Any, high: Any, palette: str) -> Look:
            return Look((left, right), RANGES[spread], float(low or 0), float(high or 0), palette)

        def read_texts(
            request: gr.Request, when: float, name: str, at: str, one: str, two: str, *look: Any
        ) -> Any:
            texts = {NAMES[0]: one or ""} | ({NAMES[1]: two} if two else {})
            chosen = looked(*look)
            updates = session(request).read(models[name], at, texts, chosen, when=when)
            yield from changes(updates, chosen)

        def read_again(request: gr.Request, when: float, name: str, at: str, *look: Any) -> Any:
            chosen = looked(*look)
            updates = session(request).read(models[name], at, None, chosen, when=when)
            yield from changes(updates, chosen)

        def write_on(
            request: gr.Request,
            when: float,
            name: str,
            at: str,
            one: str,
            count: Any,
            sample: bool,
            heat: Any,
            *look: Any,
        ) -> Any:
            chosen = looked(*look)
            options = written(count, sample, heat) | {"when": when}
            updates = session(request).write(models[name], at, one or "", chosen, **options)
            yield from changes(updates, chosen)

        def written(count: Any, sample: bool, heat: Any) -> dict[str, Any]:
            return {"count": int(count or 0), "sample": sample, "temperature": float(heat or 0)}

        def branch(
            request: gr.Request,
            event: gr.EventData,
            when: float,
            name: str,
            at: str,
            count: Any,
            sample: bool,
            heat: Any,
            *look: Any,
        ) -> Any:
            """Go on from a token otherwise, in the place of the second text."""
            data, chosen = event._data or {}, looked(*look)
            number, token = (int(data.get(key, 0)) for key in ("text", "token"))
            instead = data.get("alternative")
            instead = None if instead is None else int(instead)
            options = written(count, sample, heat) | {"when": when}
            updates = session(request).branch(models[name], at, number, token, instead, chosen, **options)
            yield from changes(updates, chosen)

        def turned(to: str, name: str, at: str, look: Look) -> tuple[str, Look, dict[Any, Any]]:
            """Insertion point and look for a model, which are its first ones unless it was chosen before; and
            all controls that depend on it, so that they fit each other whatever came before.
            """
            chosen = models[to]
            if to != name or at not in chosen.points:
                at, (first, second) = next(iter(chosen.points)), chosen.first_metrics[:2]
                look = replace(look, metrics=(first, second))
            sides = zip((left, right), look.metrics, strict=True)
            fields = {side: gr.update(choices=_labelled(chosen), value=value) for side, value in sides}
            fields[point] = gr.update(choices=list(chosen.points), value=at)
            return at, look, fields | {model: to}

        def turn(request: gr.Request, when: float, name: str, *look: Any) -> Any:
            """Read what was read with another model."""
            at, chosen, fields = turned(name, "", "", looked(*look))
            updates = session(request).read(models[name], at, None, chosen, when=when)
            yield from changes(updates, chosen, fields)

        def choose(example: Example, request: Any, when: float, name: str, at: str, *look: Any) -> Any:
            """Take an example, and the shipped model for it, and read it."""
            to = FORMAL if example.formal else TEXT if TEXT in models else name
            at, chosen, fields = turned(to, name, at, looked(*look))
            fields |= {text: example.text, other: ""}
            texts = {NAMES[0]: example.text}
            updates = session(request).read(models[to], at, texts, chosen, example.about, when)
            yield from changes(updates, chosen, fields)

        def chooser(example: Example) -> Any:
            # Gradio finds its request by the annotation, and not in a partial.
            def chosen(request: gr.Request, *fields: Any) -> Any:
                yield from choose(example, request, *fields)

            return chosen

        def begin_with(request: gr.Request, fragment: str, name: str, at: str, *look: Any) -> Any:
            """What a link brings back, else the first example."""
            if fragment.startswith(START):
                yield from bring_back(request, fragment, looked(*look))
            elif FORMAL in models:
                yield from choose(start, request, 0.0, name, at, *look)
            else:
                yield {status: gr.skip()}

        def bring_back(request: gr.Request, fragment: str, look: Look) -> Iterator[dict[Any, Any]]:
            try:
                wanted = Shown.from_fragment(fragment)
            except PhilensError as error:
                yield {status: view.status(str(error), kind="error")}
                return
            texts = [wanted.texts.get(name, "") for name in NAMES]
            fields: dict[Any, Any] = {text: texts[0], other: texts[1]}
            fields |= {second: gr.update(open=True)} if texts[1] else {}
            if wanted.model not in models or wanted.point not in models[wanted.model].points:
                said = (
                    f"This link is for {wanted.model}, {wanted.point}, which is not open here; start philens "
                    "explore with that model, or press Read to have its text read by this one."
                )
                yield fields | {status: view.status(said, kind="error")}
                return
            at, look, controls = turned(wanted.model, wanted.model, wanted.point, wanted.look)
            named = next(label for label, own in RANGES.items() if own == look.range)
            fixed = look.range == "fixed"
            fields |= controls | {
                spread: named,
                low: gr.update(value=look.low, visible=fixed),
                high: gr.update(value=look.high, visible=fixed),
                palette: look.palette,
            }
            read = {name: own for name, own in zip(NAMES, texts, strict=True) if own}
            updates = session(request).read(models[wanted.model], at, read or {NAMES[0]: ""}, look)
            yield from changes(updates, look, fields)

        def named_lacking(name: str, at: str) -> str:
            # A point of another model is one that is about to be left.
            return view.lacking(models[name].lacking(at)) if at in models[name].points else ""

        def mark(request: gr.Request, event: gr.EventData, when: float) -> Any:
            if not session(request).marks(when):
                return [gr.skip()] * 4
            data = event._data or {}
            number, first, last = (int(data.get(key, 0)) for key in ("text", "first", "last"))
            return NAMES[min(number, 1)], first, last, session(request).marked(number, first, last)

        def mark_numbers(request: gr.Request, which: str, begin: Any, end: Any) -> str:
            return session(request).marked(NAMES.index(which), int(begin or 0), int(end or 0))

        def stop(request: gr.Request) -> Any:
            session(request).stop()

        def leave(request: gr.Request) -> None:
            sessions.end(request.session_hash or "")

        where = [model, point]
        ordered: dict[str, Any] = options | {"js": _WHEN}
        # These events have no data but the fields', which are read when it is sent.
        last: dict[str, Any] = options | {"trigger_mode": "always_last"}
        read.click(read_texts, [when, *where, text, other, *look], shown, **ordered)
        write.click(write_on, [when, *where, text, count, sample, temperature, *look], shown, **ordered)
        cancel.click(stop, None, None, queue=False, **options)
        for name, button in buttons.items():
            button.click(chooser(offered[name]), [when, *where, *look], [*shown, *where], **ordered)
        model.input(turn, [when, model, *look], [*shown, *where], **ordered)
        spread.select(
            lambda chosen: [gr.update(visible=RANGES[chosen] == "fixed")] * 2, spread, [low, high], **last
        )
        gr.on([model.change, point.change], named_lacking, where, lacking, **last)
        lists = [point, left, right, spread, palette]
        changed = [*(one.select for one in lists), low.input, high.input]
        gr.on(changed, read_again, [when, *where, *look], shown, **ordered)
        # With "always_last", Gradio 6.31 sends the data of an earlier event.
        result.mark(mark, when, [which, begin, end, marked], **ordered)
        gr.on([which.input, begin.input, end.input], mark_numbers, [which, begin, end], marked, **last).then(
            None, [which, begin, end], None, js=_HIGHLIGHT
        )
        text.change(None, text, None, js=_COUNT.format(most=sessions.most))
        page.unload(leave)
        writing = [count, sample, temperature]
        result.branch(branch, [when, *where, *writing, *look], shown, **ordered)
        everything = [*shown, *where, spread, low, high, palette]
        page.load(begin_with, [fragment, *where, *look], everything, js=_FRAGMENT, **options)
        # Gradio 6.31 closes its stream of answers when none is due. Until the page hears of it, answers to
        # what it asks go nowhere; they come with the next stream, so something is asked every two seconds.
        gr.Timer(2.0).tick(lambda: None, None, None, **options)
    return page


def _markup(markup: str, **options: Any) -> gr.HTML:
    return gr.HTML(markup, apply_default_css=False, **options)


def _metric(model: Explored, place: int, side: str) -> gr.Dropdown:
    chosen = model.first_metrics[place]
    return gr.Dropdown(_labelled(model), value=chosen, label=f"{side} pane", min_width=150, **_ANY)


def _labelled(model: Explored) -> list[tuple[str, str]]:
    """The metrics of a model, at any of its points, with their names in words."""
    names = dict.fromkeys(name for point in model.points for name in model.metrics(point))
    return [(plain_label(name), name) for name in names]


def theme() -> Any:
    """Gradio's plain theme with the fonts of the reader's system, so that none is fetched."""
    return Base(
        primary_hue="blue",
        neutral_hue="slate",
        radius_size="md",
        font=[Font("system-ui"), Font("sans-serif")],
        font_mono=[Font("ui-monospace"), Font("monospace")],
    )
