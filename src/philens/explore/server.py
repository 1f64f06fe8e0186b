"""How the page is served: on one address, with files to keep, and with nothing from elsewhere."""

import contextlib
import ipaddress
import logging
import os
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from philens.explore.record import Record
from philens.explore.session import EXPORTS, Sessions
from philens.explore.view import style
from philens.lens.config import MetricOptions
from philens.support.errors import ConfigError, PhilensError
from philens.support.extras import require
from philens.tasks.rendering import AS_IS, Rendering
from philens.training.source import ModelSource

logger = logging.getLogger(__name__)

# Gradio needs scripts in the page; nothing else may be loaded, and nothing sent elsewhere.
_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; object-src 'none'; "
    "base-uri 'self'; form-action 'self'; frame-ancestors 'self'"
)


def explore(
    source: ModelSource | None,
    adapters: Sequence[str],
    host: str,
    port: int,
    most: int,
    say: Callable[[str], None],
    record: Path | None = None,
    rendering: Rendering = AS_IS,
    options: MetricOptions | None = None,
) -> None:
    """Load models, `say` where the page is, and serve it until the user stops it, as `philens explore` does.

    Raises:
        PhilensError: Gradio is missing, or models or address cannot be had.
    """
    if most < 1:
        raise ConfigError(f"--max-characters must be at least 1, not {most}.")
    require("gradio", "explore", "philens explore")
    kept = None if record is None else Record(record)
    listening = listen(host, port)
    with listening:
        from philens.explore.app import build
        from philens.explore.models import open_all

        models = open_all(source, adapters, rendering, options)
        sessions = Sessions(most, kept)
        app = application(build(models, sessions), sessions)
        if not ipaddress.ip_address(listening.getsockname()[0]).is_loopback:
            logger.warning("Whoever reaches %s can use this model; nothing asks who they are.", host)
        shown = f"[{host}]" if ":" in host else host
        say(f"Open http://{shown}:{listening.getsockname()[1]} in a browser; Ctrl+C stops it.")
        serve(app, listening, sessions.end_all)
    if kept is not None and kept.views:
        say(f"Wrote {record}: {len(kept.views):,} view{'s' * (len(kept.views) > 1)}.")


class _Headers:
    """Adds headers to every answer."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def answer(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [
                    *message["headers"],
                    (b"content-security-policy", _POLICY.encode()),
                    (b"referrer-policy", b"no-referrer"),
                    (b"x-content-type-options", b"nosniff"),
                ]
            await send(message)

        await self.app(scope, receive, answer)


def application(page: Any, sessions: Sessions) -> Any:
    """The web application: the page, and below `export/` what its readers keep."""
    import fastapi
    import gradio as gr

    from philens.explore.app import theme

    app = fastapi.FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    @app.get("/export/{key}/{file}")
    def export(key: str, file: str) -> fastapi.Response:
        session = sessions.keyed(key)
        if session is None:
            return fastapi.Response("This page is closed; read the text again.", 404)
        try:
            content = session.export(file)
        except PhilensError as error:
            return fastapi.Response(str(error), 404)
        headers = {"Content-Disposition": f'attachment; filename="philens-{file}"'}
        return fastapi.Response(content, media_type=EXPORTS[file], headers=headers)

    app = gr.mount_gradio_app(
        app,
        page.queue(default_concurrency_limit=None),
        "/",
        footer_links=[],
        run_history=False,
        show_error=False,
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        theme=theme(),
        head=f"<style>{style()}</style>",
    )
    app.add_middleware(_Headers)
    return app


def listen(host: str, port: int) -> socket.socket:
    """A socket that takes connections.

    Raises:
        ConfigError: the port is taken, or the address is none of this machine.
    """
    if not 0 <= port < 65_536:
        raise ConfigError(f"--port must lie between 0 (any that is free) and 65535, not {port}.")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        # Of a name that nobody knows, the number is not the system's, and Python adds the address.
        number, said = error.errno or 0, str(error.strerror or error)
        reason = os.strerror(number) if number > 0 else said.partition(" (while")[0]
        raise ConfigError(
            f"Cannot listen on {host} port {port} ({reason}); choose another --port, or stop what uses it."
        ) from error


def serve(app: Any, listening: socket.socket, leave: Callable[[], None]) -> None:
    """Serve until the user stops it, then `leave`."""
    import uvicorn
    from gradio.routes import App

    class Server(uvicorn.Server):
        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            # Open tabs hold on to streams, which end by themselves once their jobs and Gradio say so; each
            # that is cut off leaves a traceback.
            leave()
            for route in app.routes:
                if isinstance(mounted := getattr(route, "app", None), App):
                    mounted.stop_event.set()
            await super().shutdown(sockets)

    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=30)
    with contextlib.suppress(KeyboardInterrupt):
        Server(config).run(sockets=[listening])
