"""Disks that are full, folders that may not be written to or read, a clock that goes back: one line, and nothing is lost. That a
folder was moved goes without saying: every damaged one of tests/attacks is a copy elsewhere; see also test_resume.py and test_run.py."""

import ctypes
import os
import resource
import shutil
import stat
import time

import pytest

from tests.attacks.damages import copied
from tests.attacks.trying import forked, outcome

WRITING = ("training", "evaluation", "answers", "published")


def limited(run, size):
    """The same, with files of no more than `size` bytes, as on a disk that has no more room."""

    def work(folder):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
        run(folder)

    return work


def without_privileges(run):
    """The same, by a user whom permissions bind: root without the two capabilities that pass over them."""

    def work(folder):
        if os.geteuid() == 0:
            header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3, this process
            sets = (ctypes.c_uint32 * 6)()
            libc = ctypes.CDLL(None, use_errno=True)
            assert libc.capget(header, sets) == 0
            for number in range(3):
                sets[number] &= ~0b110  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
            assert libc.capset(header, sets) == 0
        run(folder)

    return work


def with_a_clock_that_goes_back(run):
    """The same, every look at the clock an hour earlier."""

    def work(folder):
        now = [time.time()]

        def earlier():
            now[0] -= 3600
            return now[0]

        time.time = earlier
        run(folder)

    return work


@pytest.fixture
def whole(targets, tmp_path):
    """A function: kind -> its target, and what its work ends in."""

    def make(kind):
        target = targets[kind]
        folder = copied(target.pristine, tmp_path / "whole")
        assert outcome(target, folder, "", b"").word == "unnoticed"
        return target, target.result(folder)

    return make


@pytest.mark.parametrize("size", [10, 3000, 40_000])
@pytest.mark.parametrize("kind", WRITING)
def test_a_full_disk(kind, size, whole, tmp_path):
    target, expected = whole(kind)
    folder = copied(target.pristine, tmp_path / "full")
    word, said = outcome(target._replace(run=limited(target.run, size)), folder, "", expected)
    assert word in ("identical", "refused", "changed"), said
    shutil.rmtree(folder.with_name("full.out"), ignore_errors=True)  # a conversion may have come to its end
    assert outcome(target, folder, "", expected).word == "identical"


@pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "capset") and os.geteuid() == 0, reason="root, whom permissions do not bind"
)
@pytest.mark.parametrize("mode", [0o555, 0o000], ids=["read-only", "no permission"])
@pytest.mark.parametrize("kind", WRITING)
def test_a_folder_without_permission(kind, mode, whole, tmp_path):
    target, expected = whole(kind)
    folder = copied(target.pristine, tmp_path / "closed")
    inner = next((path for path in (folder / "run",) if path.is_dir()), folder)
    held = [path for path in inner.rglob("*") if path.is_dir()] + [inner]
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in held}
    for path in held:
        path.chmod(mode)
    try:
        status, said = forked(lambda: without_privileges(target.run)(folder))
    finally:
        for path, before in modes.items():
            path.chmod(before)
    assert status == 0 or (status == 2 and "Traceback" not in said), said
    unreadable = "is not readable" in " ".join(said.replace("│", " ").split())  # in a box, which breaks lines
    assert status == 0 or unreadable or said.strip().splitlines()[-1].startswith("layalign: "), said
    shutil.rmtree(folder.with_name("closed.out"), ignore_errors=True)
    assert outcome(target, folder, "", expected).word == "identical"


@pytest.mark.parametrize("kind", ["training", "evaluation"])
def test_a_clock_that_goes_back(kind, whole, tmp_path):
    target, expected = whole(kind)
    folder = copied(target.pristine, tmp_path / "back")
    run = target._replace(run=with_a_clock_that_goes_back(target.run))
    assert outcome(run, folder, "", expected).word == "identical"
