"""`halfweight serve`: an OpenAI-compatible endpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from halfweight.cli import app
from halfweight.cli.output import stderr
from halfweight.cli.refusal import Force, require_room
from halfweight.cli.run import Activations, BackendName, Device, Dtype, Model
from halfweight.errors import UsageError


@app.command()
def serve(
    model: Model,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(envvar="HALFWEIGHT_API_KEY", help="Clients must send it as bearer token."),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="The model's name in the API [default: its folder's].")
    ] = None,
    max_requests: Annotated[
        int, typer.Option(min=1, help="Requests at once; more are answered with 429.")
    ] = 64,
    cache_tokens: Annotated[
        int | None, typer.Option(min=64, help="KV cache, of all requests [default: what fits].")
    ] = None,
    device: Device = None,
    dtype: Dtype = None,
    backend: BackendName = None,
    activations: Activations = "exact",
    force: Force = False,
) -> None:
    """Serve a model: /v1/chat/completions, /v1/completions, /v1/models, /health."""
    try:
        import uvicorn

        from halfweight.serve.app import build_app
    except ImportError as error:
        raise UsageError(
            f"serving needs {error.name}, which is not installed",
            hint="pip install 'halfweight[serve]'",
        ) from error
    from halfweight.cli.run import open_model
    from halfweight.engine.continuous import Engine

    if host not in ("127.0.0.1", "localhost", "::1") and api_key is None:
        stderr.print(f"{host} is reachable by others and there is no --api-key: anyone can use it")
    if not force:
        require_room(model, device, lambda: cache_tokens or 1, 1)
    loaded, tokenizer = open_model(model, device, dtype, backend, activations)
    engine = Engine(loaded, max_requests=max_requests, cache_tokens=cache_tokens)
    application = build_app(engine, tokenizer, name or Path(model).name, api_key=api_key)
    uvicorn.run(application, host=host, port=port)
