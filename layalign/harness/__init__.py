"""LayAlign in EleutherAI's lm-evaluation-harness: importing this registers the model "layalign" there.

    layalign-lm-eval --model layalign --model_args pretrained=runs/model --tasks layalign_mgsm --metadata data=data/mgsm

is `lm_eval` with that model and the tasks in tasks/: version 0.4.13 of the harness has no way to find either by itself. Other commands
and options are the harness's own. In Python, `import layalign.harness` before `lm_eval.simple_evaluate(model="layalign", ...)`.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

TASKS = Path(__file__).parent / "tasks"


def register() -> None:
    """Tell the harness of the model, which it loads when it is asked for."""
    # Its own models: the harness lists them by itself only where there is no other.
    import lm_eval.models  # noqa: F401
    from lm_eval.api.registry import model_registry

    model_registry.register("layalign", target="layalign.harness.model:LayAlignHarnessModel")


def main() -> None:
    """The command layalign-lm-eval; an --include_path of one's own takes the place of the tasks here."""
    if find_spec("lm_eval") is None:
        print("error: lm-evaluation-harness is not installed: pip install 'layalign[lm-eval]'", file=sys.stderr)
        sys.exit(2)
    from lm_eval.__main__ import cli_evaluate

    options = {argument.partition("=")[0] for argument in sys.argv}
    if len(sys.argv) > 2 and not options & {"--include_path", "--help", "-h"}:
        sys.argv += ["--include_path", str(TASKS)]
    try:
        cli_evaluate()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if find_spec("lm_eval") is not None:
    register()
