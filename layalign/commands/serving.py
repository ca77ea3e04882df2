"""The command that serves a model."""

import typer

from layalign.commands.options import Model, require


def serve(context: typer.Context, model: Model) -> None:
    """Serve a model over HTTP, OpenAI-compatible, by vLLM; what follows the model are options of `vllm serve`."""
    require("vllm")
    from layalign.serving.server import serve

    serve(model, context.args)
