"""`python -m bench.first_light`: the stages one after the other, each within its time, from where the last run ended."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType

from bench.first_light import supervise
from bench.first_light.record import Record, summary
from bench.first_light.stages import Stage, Step, stages
from bench.first_light.supervise import Outcome, Run, attempts_of

LEAST = 8.0  # seconds in which a step is still begun
SAVED = 5.0  # seconds between two writings of what a step has come to
REHEARSAL = ["-p", "bench.first_light.rehearsal"]


def parsed(words: list[str]) -> argparse.Namespace:
    """The options. Stages in the wrong order, and a step that is none of theirs, end the program: else nothing would run, and well."""
    everything = stages(1, 1)
    names = [stage.name for stage in everything]
    parser = argparse.ArgumentParser(prog="python -m bench.first_light", description=__doc__)
    parser.add_argument("--from", dest="first", default=names[0], choices=names, help="stage to begin with")
    parser.add_argument("--to", dest="last", default=names[-1], choices=names, help="stage to end with")
    parser.add_argument("--only", default="", help="names of steps, with commas between; all by default")
    parser.add_argument("--results", type=Path, default=Path("bench/results"), help="folder of rows and of the record")
    parser.add_argument("--before", type=Path, help="folder of an earlier run's record, where --results is a fresh one")
    parser.add_argument("--fresh", action="store_true", help="forget earlier runs of the steps asked for")
    parser.add_argument("--jobs", type=int, default=16, help="compilations at a time")
    parser.add_argument("--workers", type=int, default=8, help="processes that share the GPU for tests")
    parser.add_argument("--limit", type=float, help="seconds of one attempt at most, for all steps")
    parser.add_argument("--rehearse", metavar="FAULTS", help="on a pretended GPU: see bench/first_light/rehearsal.py")
    for stage in everything:
        option = f"--{stage.name.lower()}-seconds"
        parser.add_argument(option, type=float, default=stage.seconds, help=f"of stage {stage.name}")
    options = parser.parse_args(words)
    between = everything[names.index(options.first) : names.index(options.last) + 1]
    if not between:
        parser.error(f"stage {options.last} comes before stage {options.first}")
    steps = [step.name for stage in between for step in stage.steps]
    options.only = [name.strip() for name in options.only.split(",") if name.strip()]
    if unknown := [name for name in options.only if name not in steps]:
        parser.error(f"--only: {', '.join(unknown)} is no step of these stages, which have {', '.join(steps)}")
    return options


class FirstLight:
    """One run."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        everything = stages(options.jobs, options.workers)
        names = [stage.name for stage in everything]
        self.stages = everything[names.index(options.first) : names.index(options.last) + 1]
        gpu = "pretended GPU" if options.rehearse is not None else present_gpu()
        asked = [step.name for stage in self.stages for step in stage.steps if self._asked(step)]
        self.record = Record(options.results, gpu, options.before, asked if options.fresh else ())
        self.work = Path(tempfile.mkdtemp(prefix="first-light-"))

    def run(self) -> int:
        """All stages, then the report. -> exit status: whether every step is done and every test passed."""
        if self.record.forgot:
            say(self.record.forgot)
        try:
            for stage in self.stages:
                self._run_stage(stage)
        finally:
            supervise.end_all()
            print(self.record.report(self.stages), flush=True)
        steps = [
            self.record.outcomes.get(step.name) for stage in self.stages for step in stage.steps if self._asked(step)
        ]
        well = all(
            outcome is not None
            and outcome.status == "done"
            and all(test["outcome"] != "failed" for test in outcome.tests)
            for outcome in steps
        )
        return 0 if well else 1

    def _run_stage(self, stage: Stage) -> None:
        seconds = getattr(self.options, f"{stage.name.lower()}_seconds")
        end_by = time.monotonic() + seconds
        say(f"stage {stage.name}, {stage.what}: {seconds:.0f} s at most")
        for step in filter(self._asked, stage.steps):
            before = self.record.outcomes.get(step.name)
            if before is not None and before.status == "done":
                say(f"{step.name}: done before")
                continue
            left = end_by - time.monotonic()
            if left < LEAST:
                say(f"{step.name}: no time left")
                self.record.keep(step.name, before or Outcome("cut", note="no time left"))
                continue
            say(f"{step.name}: {step.what}")
            outcome = self._run_step(step, min(left, step.seconds), before or Outcome("cut"))
            self.record.keep(step.name, outcome)
            say(f"{step.name}: {summary(outcome)}")

    def _asked(self, step: Step) -> bool:
        return not self.options.only or step.name in self.options.only

    def _run_step(self, step: Step, seconds: float, before: Outcome) -> Outcome:
        start = time.monotonic()
        if step.command:
            status, note, figures = self._run_command(step, seconds)
            return Outcome(status, time.monotonic() - start, note=note, figures=figures)
        others = {name: one for name, one in self.record.outcomes.items() if name != step.name}
        done = others[step.goes_on_from].tests if step.goes_on_from in others else []
        broken = [line for one in others.values() for line in one.broken]  # what hung in one step hangs in the next
        runs = self._runs(step, [*done, *before.tests], [*broken, *before.broken])

        def outcome(status, note):
            tests, ended = attempts_of(run.folder for run in runs)
            mine = {line["test"]: line for line in tests if line not in done}
            seconds = before.seconds + time.monotonic() - start
            unique = [line for place, line in enumerate(ended) if line not in broken and line not in ended[:place]]
            return Outcome(status, seconds, list(mine.values()), unique, note)

        saved = told = 0.0

        def each_second():
            nonlocal saved, told
            so_far = outcome("cut", "broken off")
            if time.monotonic() - saved > SAVED:
                saved = time.monotonic()
                self.record.keep(step.name, so_far)
            failed = [line for line in so_far.tests if line["outcome"] == "failed"]
            for line in failed[int(told) :]:
                say(f"  {line['test']}: {line['message']}")
            told = len(failed)

        told = len([line for line in before.tests if line["outcome"] == "failed"])
        return outcome(*supervise.supervise(runs, seconds, each_second))

    def _runs(self, step: Step, done: list, broken: list) -> list[Run]:
        """A run for each process; done, broken: what they find in their folders."""
        more = []
        if self.options.rehearse is not None:
            os.environ["LAYALIGN_REHEARSAL"] = self.options.rehearse
            on_bench = step.tests[0].startswith("bench/")
            more = [*REHEARSAL, "--small"] if on_bench else ["--collect-only"] if step.name == "operators" else []
        runs = []
        for index in range(step.processes):
            shared = ["--share", f"{index}/{step.processes}"] if step.processes > 1 else []
            folder = self.work / step.name.replace(" ", "-") / str(index)
            folder.mkdir(parents=True, exist_ok=True)
            for name, lines in (("done", done), ("broken", broken)):
                (folder / f"{name}.jsonl").write_text(
                    "".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8"
                )
            command = step.pytest(str(self.options.results), [*more, *shared])
            limit = self.options.limit or step.limit
            runs.append(Run(command, folder, limit, self.work / f"{folder.parent.name}-{index}.log"))
        return runs

    def _run_command(self, step: Step, seconds: float) -> tuple[str, str | None, dict[str, int]]:
        if self.options.rehearse is not None:
            return "done", "left out of a rehearsal", {}
        log, errors = self.work / f"{step.name}.log", self.work / f"{step.name}-errors.log"
        process = supervise.start(step.command, log, errors)  # apart: a bar's text has no end of line before a result
        try:
            status = "done" if process.wait(seconds) == 0 else "failed"
        except subprocess.TimeoutExpired:
            status = "cut"
        supervise.end(process)
        said, figures = compiled(log.read_text(errors="replace"))
        if status == "failed" and not figures["failing"]:
            said = f"{said}; {supervise.last_line(errors)}"
        return status, f"out of time; {said}" if status == "cut" else said, figures


def compiled(output: str) -> tuple[str, dict[str, int]]:
    """What `layalign kernels --json` wrote, in words and in numbers; a last line that was cut is left out."""
    lines = []
    for line in output.splitlines():
        with suppress(ValueError):
            lines += [json.loads(line)] if line.startswith('{"') else []
    failing = [
        f"{line['kernel']} {line['variant']}: {'; '.join(line['failures'])}" for line in lines if line["failures"]
    ]
    spilled = [line["spill_bytes"] for line in lines if line["spill_bytes"] is not None]
    figures = {"kernels": len(spilled), "without_figures": len(lines) - len(spilled)}
    figures |= {"failing": len(failing), "spill_bytes": sum(spilled)}
    words = f"{len(lines)} kernels, {len(failing)} that fail a gate" + "".join(f"; {words}" for words in failing)
    return words, figures


def present_gpu() -> str:
    """Its name, without starting anything on it."""
    query = ["nvidia-smi", "--id=0", "--query-gpu=name", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "no GPU"


def say(line: str) -> None:
    """With the time of day, at once."""
    print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)


def interrupted(number: int, frame: FrameType | None) -> None:
    """SIGTERM ends the run as Ctrl-C does: with what was measured."""
    raise KeyboardInterrupt


def main() -> int:
    """Entry point."""
    signal.signal(signal.SIGTERM, interrupted)
    try:
        return FirstLight(parsed(sys.argv[1:])).run()
    except KeyboardInterrupt:
        say("interrupted")
        return 130


if __name__ == "__main__":
    sys.exit(main())
