"""MLflow's server with an index page that opens on the runs: `python -m sana_lab.tracking.mlflow_app OPTIONS`.

MLflow's first page for a new browser is that of agents, with its assistant open over a quarter of the screen, and a
run's description is cut at 150 pixels. Options are those of `mlflow server`; where MLflow has changed so that the page
does not fit, its own is served.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SCRIPT = """<script>try {
  for (const [key, value] of Object.entries({
    "mlflow.assistant.fab.autoOpenedOnFirstLoad_v1": true, "mlflow.workflowType_v1": "machine_learning"}))
    if (localStorage.getItem(key) === null) localStorage.setItem(key, JSON.stringify(value));
} catch (error) { console.warn(error); }</script>"""
"""Settings of MLflow's page in a browser that has none yet."""

STYLE = """<style>
div:has(> [data-testid="truncation-gradient"]) { max-height: none !important; overflow: visible !important }
div:has(> [data-testid="truncation-gradient"]) table { display: block; overflow-x: auto }
div:has(> [data-testid="truncation-gradient"]) :is(td, th) { padding: 2px 7px !important; white-space: nowrap }
img[src^="get-artifact"] { max-width: 100% }
[data-testid="truncation-gradient"], [data-testid="show-comment-toggle"] { display: none !important }
</style>"""
"""The whole description of a run, without a click, its table spaced and its pictures as wide as the page at most."""

FACTORY = "sana_lab.tracking.mlflow_app:create"


def main(arguments: Sequence[str]) -> None:
    """Run `mlflow server` with these arguments and the prepared page."""
    from mlflow import cli, server

    build = getattr(server, "_build_uvicorn_command", None)
    if build is not None:
        server._build_uvicorn_command = lambda options, host, port, workers, *_, env_file=None, **__: build(
            options, host, port, workers, FACTORY, env_file, True
        )
    cli.cli(["server", *arguments])


def create() -> Any:
    """The ASGI application of MLflow behind the prepared page."""
    from mlflow.server import app as pages
    from mlflow.server.fastapi_app import app

    index = Path(str(pages.static_folder)) / "index.html"
    page = prepared(index.read_text(encoding="utf-8")) if index.is_file() else None
    return app if page is None else IndexPage(app, page)


def prepared(html: str) -> str | None:
    """The page with settings and style before its own script; None if it has no head."""
    head, tag, rest = html.partition("<head>")
    return f"{head}{tag}{SCRIPT}{STYLE}{rest}" if tag else None


class IndexPage:
    """ASGI middleware that answers `/` with a page and passes everything else on."""

    def __init__(self, app: Any, page: str) -> None:
        self.app, self.page = app, page

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """One request, or the server's start and end."""
        from starlette.responses import HTMLResponse

        is_index = scope["type"] == "http" and scope["path"] == "/" and scope["method"] in ("GET", "HEAD")
        answer = HTMLResponse(self.page, headers={"Cache-Control": "no-cache"}) if is_index else self.app
        await answer(scope, receive, send)


if __name__ == "__main__":
    main(sys.argv[1:])
