"""The packages that extras install, and what to say where one is missing."""

# What an installation of the core alone lacks, by the extra that installs it and the command whose work it is.
TRAIN = ("accelerate", "datasets", "pydantic")
EVAL = ("matplotlib", "rich", "datasets", "sacrebleu")
EXTRAS = {
    "train": TRAIN,
    "eval": EVAL,
    "demo": (*TRAIN, *EVAL, "num2words2", "gguf"),
    "vllm": ("vllm",),
    "ui": ("gradio",),
}
EXTRA_OF = {
    "train": "train",
    "report": "train",
    "table": "train",
    "evaluate": "eval",
    "compare": "eval",
    "analyze": "eval",
    "bench": "eval",
    "demo": "demo",
}


def missing_extra(error: ModuleNotFoundError, command: str) -> str | None:
    """What to install where a package is missing that an extra installs, or Triton, which comes with the core where there is one to
    install; None: neither is it.

    Args:
        error: of the import.
        command: of the command line that needed it.
    """
    package = (error.name or "").partition(".")[0]
    if package == "triton":
        return f"{command} needs triton, which is not installed: pip install triton, on Linux on x86-64 or 64-bit Arm"
    having = [extra for extra, packages in EXTRAS.items() if package in packages]
    if not having:
        return None
    extra = EXTRA_OF[command] if EXTRA_OF.get(command) in having else having[0]
    return f'{command} needs {package}, which is not installed: pip install "layalign[{extra}]"'
