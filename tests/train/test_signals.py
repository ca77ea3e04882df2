"""SIGTERM and Ctrl-C, at any place: what has been reached is saved, and the run goes on as if there had been none."""

import os
import random
import re
import signal
import subprocess
import threading
from pathlib import Path

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import TrainerCallback

from layalign.folders import damage
from layalign.train import interruption
from layalign.train.interruption import Interruption
from layalign.train.recipe import load_recipe
from layalign.train.run_folder import has_work
from layalign.train.stages import train


@pytest.fixture
def plain_recipe(recipe_file):
    """Several epochs a stage, logs and evaluations between steps, and no word about checkpoints."""
    settings = yaml.safe_load(recipe_file.read_text())
    for stage in settings["stages"].values():
        stage |= {"steps": 9, "batch_size": 2, "gradient_accumulation": 2, "log_steps": 4}
    settings["stages"]["task"] |= {"hold_out": 3, "eval_steps": 3, "eval_batch_size": 1, "keep": "best"}
    recipe_file.write_text(yaml.safe_dump(settings))
    return recipe_file


def weights(output):
    return (Path(output) / "model" / "model.safetensors").read_bytes()


# Where the signal comes, and what is then saved: stages of 9 steps of two forward calls each (every third of the translation stage:
# one, its epochs have five); the task stage evaluates in three more after steps 3, 6 and 9.
PLACES = [
    ("TERM@batch:1", "translation is saved at step 1 of 9"),
    ("INT@batch:6", "translation is saved at step 5 of 9"),
    ("TERM@step:3", "translation is saved at step 8 of 9"),
    ("INT@batch:1", "translation is saved at step 9 of 9"),
    ("TERM@batch:8", "task is saved at step 3 of 9"),  # in an evaluation
    ("TERM@batch:1", "task is saved at step 3 of 9"),  # in the same, made up for
    ("INT@step:3", "task is saved at step 6 of 9"),  # before one
    ("TERM@batch:11", "task is saved at step 9 of 9"),  # in the last one
    ("INT@batch:2", "task is saved at step 9 of 9"),
]


@pytest.mark.slow
def test_signalled_anywhere_the_run_ends_bit_identical(plain_recipe, program, tmp_path):
    whole = program("signalled_runs.py", plain_recipe, tmp_path / "whole")
    broken = program("signalled_runs.py", plain_recipe, tmp_path / "broken", *(place for place, _ in PLACES))
    for (place, saved), (status, line) in zip(PLACES, broken["ended"], strict=True):
        number, name = (143, "SIGTERM") if place.startswith("TERM") else (130, "Ctrl-C")
        assert (status, line) == (
            number,
            f"layalign: stopped by {name}; {saved}, and the same command goes on from there",
        ), place
    assert broken["history"] == whole["history"]
    assert weights(tmp_path / "broken") == weights(tmp_path / "whole")
    assert not list((tmp_path / "broken").rglob(".*"))


@pytest.mark.slow
def test_signalled_at_random_moments_the_run_ends_bit_identical(plain_recipe, program, tmp_path):
    whole = program("signalled_runs.py", plain_recipe, tmp_path / "whole")
    generator = random.Random(2)
    # Of a whole run's time here: what has been trained is not trained again, so later attempts are shorter.
    longest = 0.7 * whole["seconds"]
    times = [f"{generator.choice(['TERM', 'INT'])}@time:{generator.uniform(0, longest):.3f}" for _ in range(8)]
    broken = program("signalled_runs.py", plain_recipe, tmp_path / "broken", *times)
    for place, (status, _) in zip(times, broken["ended"], strict=True):
        # 0: the run had come to its end before.
        assert status in (143 if place.startswith("TERM") else 130, 0)
    assert sum(status != 0 for status, _ in broken["ended"]) >= 3
    assert broken["history"] == whole["history"]
    assert weights(tmp_path / "broken") == weights(tmp_path / "whole")
    assert not list((tmp_path / "broken").rglob(".*"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "status", "name"), [(signal.SIGTERM, 143, "SIGTERM"), (signal.SIGINT, 130, "Ctrl-C")]
)
@pytest.mark.parametrize("progress", ["true", "false"])
def test_the_command_ends_with_the_status_of_its_signal(plain_recipe, forks, tmp_path, number, status, name, progress):
    """One line tells what is saved; no bar stands in it, no traceback follows."""
    settings = [f"output={tmp_path / 'run'}", "stages.translation.steps=100000", f"progress={progress}"]
    command = ["-m", "layalign", "train", plain_recipe, *settings]
    process = forks.start(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    # Some step has been made, as a bar or a line tells.
    shown = ""
    while not re.search(r"translation:?[^\r\n]* [1-9]\d*/100000", shown[-200:]):
        character = process.stderr.read(1)
        assert character, shown
        shown += character
    process.send_signal(number)
    rest = process.stderr.read()
    assert process.wait() == status, rest
    (saved,) = (tmp_path / "run" / "translation").glob("checkpoint-*")
    step = saved.name.partition("-")[2]
    lines = re.split(r"[\r\n]", rest.rstrip())
    (line,) = [line for line in lines if "layalign:" in line]
    assert line == (
        f"layalign: stopped by {name}; translation is saved at step {step} of 100000, and the same command goes on from there"
    )
    assert "Traceback" not in rest and "Aborted" not in rest


class Send(TrainerCallback):
    """Sends SIGTERM to this process at an event of the translation stage, and counts the ends of stages."""

    def __init__(self, event, step=None):
        self.ends, self.send = (
            0,
            lambda state: step in (None, state.global_step) and os.kill(os.getpid(), signal.SIGTERM),
        )
        setattr(self, event, self._at(getattr(self, event)))

    def _at(self, before):
        def then(args, state, control, **kwargs):
            before(args, state, control, **kwargs)
            self.send(state)

        return then

    def on_train_end(self, args, state, control, **kwargs):
        self.ends += 1


def test_reporters_end_before_the_process(plain_recipe):
    send, overrides = Send("on_step_begin", 3), ["report_to=tensorboard", "stages.translation.log_steps=1"]
    recipe = load_recipe(plain_recipe, overrides)
    with pytest.raises(SystemExit) as left:
        train(recipe, callbacks=[send])
    assert (left.value.code, send.ends) == (143, 1)
    (events,) = Path(recipe.output).rglob("events.out.tfevents*")
    found = EventAccumulator(str(events)).Reload().Scalars("train/loss")
    assert [event.step for event in found] == [1, 2, 3, 4]


def test_told_after_its_last_step_a_stage_is_saved_as_ended(plain_recipe, capsys):
    recipe = load_recipe(plain_recipe)
    with pytest.raises(SystemExit) as left:
        train(recipe, callbacks=[Send("on_train_end")])
    assert left.value.code == 143
    said = "stopped by SIGTERM; translation has ended, and the same command goes on with what follows"
    assert f"layalign: {said}\n" in capsys.readouterr().err
    assert damage(Path(recipe.output) / "translation" / "final") is None
    assert not has_work(Path(recipe.output) / "task")
    assert set(train(recipe).history) == {"translation", "task"}


def test_a_signal_before_the_first_step_ends_the_command_at_once(plain_recipe, monkeypatch):
    stop = Interruption()
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with stop.installed(), pytest.raises(SystemExit) as left:
        assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] != before
        os.kill(os.getpid(), signal.SIGTERM)
    assert left.value.code == 143
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def test_a_second_ctrl_c_does_not_wait(monkeypatch, capsys):
    stop, now = Interruption(), [0.0]
    monkeypatch.setattr(interruption.time, "monotonic", lambda: now[0])
    with stop.installed():
        stop.deferring = True
        os.kill(os.getpid(), signal.SIGINT)
        # torchrun hands on what the terminal has sent already.
        now[0] = 0.5
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.agree().signal_number == signal.SIGINT
        now[0] = 2.0
        with pytest.raises(SystemExit) as left:
            os.kill(os.getpid(), signal.SIGINT)
    assert left.value.code == 130
    said = "stopped by Ctrl-C; the same command goes on from the last checkpoint, if there is one"
    assert capsys.readouterr().err == f"layalign: {said}\n"


def test_a_second_sigterm_changes_nothing():
    stop = Interruption()
    with stop.installed():
        stop.deferring = True
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
        assert stop.agree().signal_number == signal.SIGTERM


def test_in_another_thread_signals_stay_as_they_are():
    seen = []

    def work():
        with Interruption().installed():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [signal.getsignal(signal.SIGTERM)]
