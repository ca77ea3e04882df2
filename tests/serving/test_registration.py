"""Another vLLM than the one that LayAlign is written for: other models are served there as before. No vLLM is needed."""

import logging
import sys
from types import ModuleType, SimpleNamespace

import pytest

from layalign.serving import register
from layalign.serving.registration import ARCHITECTURE, tell_vllm
from layalign.serving.server import serve

MODELS, CONFIGS = "vllm.model_executor.models.config", "vllm.transformers_utils.config"


@pytest.fixture
def vllm(monkeypatch):
    """A vLLM 0.40 with all that LayAlign needs; what it is told is noted."""
    told = []

    def registry():
        return SimpleNamespace(get_supported_archs=list, register=note, register_model=note)

    def note(*given):
        told.append(given[0])

    modules = {
        "vllm": {"__version__": "0.40.1", "ModelRegistry": registry()},
        MODELS: {"MODELS_CONFIG_MAP": {}},
        "vllm.renderers.registry": {"RENDERER_REGISTRY": registry()},
        "vllm.tokenizers.registry": {"TokenizerRegistry": registry()},
        CONFIGS: {"_CONFIG_REGISTRY": {}},
    }
    for parent in ("vllm.model_executor", "vllm.model_executor.models", "vllm.renderers", "vllm.tokenizers"):
        modules[parent] = {}
    modules["vllm.transformers_utils"] = {}
    for name in [name for name in sys.modules if name.partition(".")[0] == "vllm"]:
        monkeypatch.delitem(sys.modules, name)
    for name, content in modules.items():
        module = ModuleType(name)
        module.__path__ = []
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    return SimpleNamespace(told=told, content=lambda name: vars(sys.modules[name]))


MISSING = {
    "a private name": (CONFIGS, "_CONFIG_REGISTRY"),
    "a map": (MODELS, "MODELS_CONFIG_MAP"),
    "a module": ("vllm.renderers.registry", None),
    "a class": ("vllm", "ModelRegistry"),
}


@pytest.mark.parametrize("case", MISSING)
def test_what_another_vllm_lacks(case, vllm, caplog, monkeypatch, tmp_path):
    module, name = MISSING[case]
    if name is None:
        monkeypatch.setitem(sys.modules, module, None)
    else:
        del vllm.content(module)[name]
    said = "LayAlign serves on vLLM 0.32, this is 0.40.1: "
    with caplog.at_level(logging.WARNING, "vllm.layalign"):
        register()
    (line,) = caplog.messages
    assert line.startswith(said) and line.endswith("; not registered")
    # Nothing is half registered.
    assert not vllm.told
    assert not vllm.content(MODELS).get("MODELS_CONFIG_MAP") and not vllm.content(CONFIGS).get("_CONFIG_REGISTRY")
    monkeypatch.setattr("layalign.serving.server.check_model_path", lambda model: None)
    monkeypatch.setattr(
        "layalign.serving.server.LayAlignConfig", SimpleNamespace(from_pretrained=lambda *_, **__: None)
    )
    monkeypatch.setattr("layalign.serving.server.check_served", lambda config: None)
    with pytest.raises(ValueError, match=said):
        serve(str(tmp_path))


def test_a_method_that_another_vllm_lacks_or_calls_otherwise(vllm, caplog):
    registry = vllm.content("vllm.tokenizers.registry")["TokenizerRegistry"]
    with caplog.at_level(logging.WARNING, "vllm.layalign"):
        del registry.register
        register()
        assert not vllm.told
        registry.register = lambda mode: None
        register()
    assert [line.partition(":")[0] for line in caplog.messages] == ["LayAlign serves on vLLM 0.32, this is 0.40.1"] * 2


def test_a_vllm_that_has_it_all(vllm, caplog):
    register()
    assert not caplog.messages
    assert vllm.told == [ARCHITECTURE, "layalign", "layalign"]
    assert list(vllm.content(MODELS)["MODELS_CONFIG_MAP"]) == [ARCHITECTURE]


def test_no_vllm(monkeypatch):
    """Named, so that the command line can say what to install."""
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ModuleNotFoundError):
        tell_vllm()
