"""transformers' auto classes and pipelines know LayAlign after `import layalign`, which loads neither torch nor transformers.

Whatever is imported first: as soon as one of transformers' modules with a register is there, stand-ins are put into it, and these load
what they stand for when they are first used. `import layalign` runs this file, so it imports nothing but sys.
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False  # as in __init__.py
if TYPE_CHECKING:
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any


class StandIn(type):
    """The type of stand-ins: classes that know the name and module of what they stand for, and pass on calls and attributes."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        """An object of the class stood for."""
        return cls.load()(*args, **kwargs)

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):  # asked for by those who look what kind of object this is
            raise AttributeError(name)
        return getattr(cls.load(), name)

    def load(cls) -> Any:
        """The class stood for, registered itself from now on, with all that belongs to it."""
        for home in ("layalign.model", "layalign.processor"):
            __import__(home)
        return _named(cls.__module__, cls.__name__)


def _named(module: str, name: str) -> Any:
    __import__(module)
    return getattr(sys.modules[module], name)


def _stand_in(module: str, name: str) -> Any:
    return StandIn(name, (), {"__module__": module, "__doc__": f"Stands for {module}.{name} until it is first used."})


CONFIG = _stand_in("layalign.configuration", "LayAlignConfig")
MODEL = _stand_in("layalign.model", "LayAlignForConditionalGeneration")
PROCESSOR = _stand_in("layalign.processor", "LayAlignProcessor")
PIPELINE = _stand_in("layalign.generation.pipeline", "LayAlignPipeline")
TASK = "layalign-generation"


def _configuration(module: Any) -> None:
    # Pickled registers hold what is stood for.
    import copyreg

    copyreg.pickle(StandIn, lambda cls: (_named, (cls.__module__, cls.__name__)))
    if "layalign" not in module.CONFIG_MAPPING:
        module.CONFIG_MAPPING.register("layalign", CONFIG)


def _processors(module: Any) -> None:
    # By a key of its own: LayAlignConfig itself would have to be loaded.
    module.PROCESSOR_MAPPING.register(CONFIG, PROCESSOR, exist_ok=True)


def _pipelines(module: Any) -> None:
    if TASK not in module.PIPELINE_REGISTRY.supported_tasks:
        module.PIPELINE_REGISTRY.supported_tasks[TASK] = {"impl": PIPELINE, "pt": (MODEL,), "type": "text"}


REGISTERS = {
    "transformers.models.auto.configuration_auto": _configuration,
    "transformers.models.auto.processing_auto": _processors,
    "transformers.pipelines": _pipelines,
}


class Watcher:
    """Finds the modules of REGISTERS as the other finders do, and sees to it that they are filled once they have run."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        """The spec of a module of REGISTERS, its loader wrapped; None for all others."""
        if name not in REGISTERS:
            return None
        for finder in sys.meta_path:
            find = None if finder is Watcher else getattr(finder, "find_spec", None)
            spec = None if find is None else find(name, path, target)
            if spec is not None:
                if hasattr(spec.loader, "exec_module"):
                    spec.loader = Filling(spec.loader)
                return spec
        return None


class Filling:
    """A loader that fills the register of the module that it has run, and then leaves the module to the loader it wraps."""

    def __init__(self, loader: Any):
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """As the loader wrapped does."""
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """As the loader wrapped does, and then the register."""
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        module.__loader__ = self.loader
        self.loader.exec_module(module)
        REGISTERS[module.__name__](module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)


def watch() -> None:
    """Fill the registers that are there, and those of modules that are imported later. Calls after the first change nothing."""
    if Watcher not in sys.meta_path:
        sys.meta_path.insert(0, Watcher)
    for name, fill in REGISTERS.items():
        module = sys.modules.get(name)
        # One that is being imported by another thread, or imports us, is filled by the loader or by our own modules.
        if module is not None and not getattr(module.__spec__, "_initializing", False):
            fill(module)
