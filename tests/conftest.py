"""One thread a test process, Triton's interpreter where there is no GPU, and the options of the random tests."""

import os

import pytest
import torch

torch.set_num_threads(1)  # the models are tiny, and the processes share the cores
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton reads it once, when it is first imported


def pytest_addoption(parser):
    group = parser.getgroup("random calls")
    group.addoption(
        "--fuzz", type=int, metavar="N", help="random calls of each operator (300; 40 with compiled kernels)"
    )
    group.addoption("--fuzz-seed", type=int, metavar="S", help="only the random call of seed S")


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device and compiled Triton kernels"))
