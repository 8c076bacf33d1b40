"""`halfweight serve`: an OpenAI-compatible endpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from halfweight.cli import app
from halfweight.cli.output import stderr
from halfweight.cli.ranks import Devices, TensorParallel, as_many_as_needed, rank_options
from halfweight.cli.refusal import Force, require_room
from halfweight.cli.run import (
    Activations,
    BackendName,
    Cache,
    Device,
    Dtype,
    Model,
    open_engine,
)
from halfweight.errors import UsageError

LEAST_CONTEXT = 4096
"""Tokens that there has to be room for, where no number is given, when GPUs are counted."""


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
        str | None, typer.Option(help="The model's name in the API (default: its folder's).")
    ] = None,
    max_requests: Annotated[
        int, typer.Option(min=1, help="Running and waiting; more are answered with 429.")
    ] = 1024,
    max_sequences: Annotated[
        int | None, typer.Option(min=1, help="Run at once (default: by the device).")
    ] = None,
    max_context: Annotated[
        int | None, typer.Option(min=16, help="Tokens of the longest text (default: the model's).")
    ] = None,
    cache_tokens: Annotated[
        int | None, typer.Option(min=64, help="KV cache, of all texts (default: what fits).")
    ] = None,
    kv_cache: Cache = "16bit",
    device: Device = None,
    dtype: Dtype = None,
    backend: BackendName = None,
    activations: Activations = "exact",
    tensor_parallel: TensorParallel = None,
    devices: Devices = None,
    force: Force = False,
) -> None:
    """Serve a model: /v1/chat/completions, /v1/completions, /v1/models, /health, /metrics."""
    try:
        from halfweight.serve.app import build_app, default_sampling
        from halfweight.serve.listen import listen, require_address
    except ImportError as error:
        raise UsageError(
            f"serving needs {error.name}, which is not installed",
            hint="pip install 'halfweight[serve]'",
        ) from error
    if host not in ("127.0.0.1", "localhost", "::1") and api_key is None:
        stderr.print(f"{host} is reachable by others and there is no --api-key: anyone can use it")
    require_address(host, port)
    ranks = rank_options(tensor_parallel, devices, device)
    if tensor_parallel is None:
        ranks = as_many_as_needed(model, ranks, device, max_context or LEAST_CONTEXT, kv_cache)
    if not force:
        require_room(model, device, lambda: cache_tokens or 1, 1, kv_cache, ranks=ranks)
    engine = open_engine(
        model,
        device,
        dtype,
        backend,
        activations,
        max_sequences=max_sequences,
        max_context=max_context,
        cache_tokens=cache_tokens,
        kv_cache=kv_cache,
        **ranks,
    )
    defaults = ", ".join(f"{key} {value}" for key, value in default_sampling(engine).items())
    stderr.print(f"{engine.description}; requests are sampled by {defaults}", highlight=False)
    application = build_app(
        engine,
        engine.tokenizer,
        name or Path(model).name,
        api_key=api_key,
        max_requests=max_requests,
    )
    listen(application, engine, host, port)
