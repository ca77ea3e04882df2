import importlib.util
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def miniature():
    """The module of writers beside this file; pytest's importlib mode puts no test folder on the path."""
    spec = importlib.util.spec_from_file_location("miniature", Path(__file__).with_name("miniature.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
