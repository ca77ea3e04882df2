"""A stage's log on disk, line by line as it is made: what `layalign report` shows of a run, under way or ended."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from layalign.kernels.files import append_line, write_text
from layalign.versions import CORE, versions

if TYPE_CHECKING:
    from layalign.train.watching import Watch

LOG = "log.jsonl"
_PACKAGES = (*CORE, "accelerate", "triton", "safetensors", "tokenizers", "peft", "deepspeed")


class StageLog(TrainerCallback):
    """Writes a JSON object for each log and warning, with step and time (seconds since 1970), and for each start of a process.

    Not flushed to disk for each line: the checkpoints' history is what a run goes on from, this is for looking at.

    Args:
        folder: the stage's.
        watch: whose warnings are written too.
    """

    def __init__(self, folder: Path, watch: Watch):
        self.file, self.watch = Path(folder) / LOG, watch
        self._written = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Forget what an earlier attempt logged after the step at which this one goes on."""
        if not state.is_world_process_zero:
            return
        kept = [line for line in read_log(self.file) if line["step"] <= state.global_step and state.global_step]
        device = (
            torch.cuda.get_device_name() if args.device.type == "cuda" else platform.processor() or args.device.type
        )
        start = {"device": device, "processes": args.world_size, "versions": versions(_PACKAGES)}
        lines = [*kept, self._line(state, {"start": start, "max_steps": state.max_steps})]
        with suppress(OSError):
            self.file.parent.mkdir(parents=True, exist_ok=True)
            write_text(self.file, "".join(json.dumps(line) + "\n" for line in lines))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Its figures."""
        if logs and ("loss" in logs or "eval_loss" in logs):
            self.add(state, logs)

    def write_warnings(self, state: TrainerState) -> None:
        """Those that have come since."""
        for step, text in self.watch.warnings[self._written :]:
            self.add(state, {"step": step, "warning": text})
        self._written = len(self.watch.warnings)

    def add(self, state: TrainerState, values: dict[str, Any]) -> None:
        """One line, of the first process. A log that cannot be written ends no training."""
        if not state.is_world_process_zero:
            return
        with suppress(OSError):
            append_line(self.file, json.dumps(self._line(state, values)))

    def _line(self, state, values):
        return {"step": state.global_step, "time": round(time.time(), 3), **values}


def read_log(file: Path) -> Iterator[dict[str, Any]]:
    """The lines of a log; one that is broken, as a killed process may leave the last, is passed over.

    Args:
        file: may be missing.
    """
    try:
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines() if file.is_file() else []
    except OSError:
        return
    for text in lines:
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            yield line
