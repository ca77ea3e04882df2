"""The command that serves a model."""

from pathlib import Path
from typing import Annotated

import typer

from layalign.commands.options import Model, refuse, require


def serve(
    context: typer.Context,
    model: Model,
    ui: Annotated[
        bool, typer.Option("--ui", help="A web page as well, with the answers of the LLM alone beside the model's.")
    ] = False,
    ui_port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="--ui: the page's port, 7860 by default.")
    ] = None,
    vllm_python: Annotated[
        Path | None, typer.Option(help="--ui: the Python that has vLLM, where it is another than this.")
    ] = None,
) -> None:
    """Serve a model over HTTP, OpenAI-compatible, by vLLM; what follows the model are options of `vllm serve`."""
    if not ui:
        refuse({"--ui-port": ui_port, "--vllm-python": vllm_python}, "--ui")
        require("vllm")
        from layalign.serving.server import serve

        serve(model, context.args)
        return
    require(*(["vllm"] if vllm_python is None else []), "gradio")
    from layalign.serving.page.launch import UI_PORT, serve_with_page
    from layalign.serving.page.processes import ServerEnded

    try:
        python = None if vllm_python is None else str(vllm_python)
        serve_with_page(model, context.args, port=ui_port or UI_PORT, python=python, say=typer.echo)
    except ServerEnded as error:
        typer.echo(f"layalign: {error}", err=True)
        raise typer.Exit(1) from None
