"""Imports that the command line defers: what Lightning and transformers import of other libraries and seldom use.

Lightning imports all of torchmetrics, which imports transformers' models, torchvision, scipy.signal and matplotlib;
transformers imports torchao. `install` lets these libraries get, in place of such a module, a stand-in that imports
the real one when something of it is first used. A library that is already imported is left as it is, and code outside
the deferring modules always imports the real ones. Only `sana-lab` installs it, never `import sana_lab`.
"""

import functools
import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any, Union

DEFERRED: dict[str, tuple[str, ...]] = {
    "torchmetrics": ("transformers", "torchvision", "scipy", "matplotlib"),
    "torch_fidelity": ("torch_fidelity.datasets", "torchvision", "scipy"),
    "lightning.fabric.wrappers": ("torch._dynamo",),
    "lightning.pytorch.trainer.connectors.logger_connector.result": ("torch._dynamo",),
    "lightning.pytorch.utilities.compile": ("torch._dynamo",),
    "torch.utils.flop_counter": ("triton",),
    "transformers.*": (
        *("torchao", "torchvision", "scipy", "scipy.optimize", "sklearn"),
        *("torch._dynamo", "torch.distributed.tensor", "torch.nn.attention.flex_attention"),
    ),
}
"""Module, or `package.*` -> libraries, or packages inside one, that are deferred while it is
imported, if they are not imported yet."""

PACKAGE = f"{__name__.partition('.')[0]}."

OWN: dict[str, tuple[str, ...]] = {
    "intervals": ("scipy",),
    "report.significance": ("scipy",),
    "report.learning": ("scipy",),
    "evaluation.reconstruction": ("torchvision", "skimage"),
    "shapes.debris": ("scipy",),
    "shapes.detector": ("scipy", "skimage"),
    "report.plots": ("matplotlib",),
    "report.grids": ("matplotlib",),
    "report.efficiency_plots": ("matplotlib",),
}
"""The same of modules of this package."""


def install() -> None:
    """Defer what `DEFERRED` says from now on in this process; a second call changes nothing."""
    if not any(isinstance(finder, Deferring) for finder in sys.meta_path):
        sys.meta_path.insert(0, Deferring())


class Attribute:
    """Stands for an attribute of a module, which is imported when the attribute is used after the deferral."""

    def __init__(self, module: str, *names: str) -> None:
        self._module, self._names = module, names

    def _real(self) -> Any:
        with real_imports():
            value: Any = importlib.import_module(self._module)
            for i, name in enumerate(self._names):
                if not hasattr(value, name):  # a submodule
                    importlib.import_module(".".join((self._module, *self._names[: i + 1])))
                value = getattr(value, name)
            return value

    def _is_imported(self) -> bool:
        """Whether anything can be an instance of it."""
        return not isinstance(sys.modules.get(self._module, Stand("")), Stand)

    def __call__(self, *args: Any, **options: Any) -> Any:
        return Decorator(self, args, options) if _is_deferring() else self._real()(*args, **options)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Attribute(self._module, *self._names, name) if _is_deferring() else getattr(self._real(), name)

    def __instancecheck__(self, instance: Any) -> bool:
        return self._is_imported() and isinstance(instance, self._real())

    def __subclasscheck__(self, subclass: type) -> bool:
        return self._is_imported() and issubclass(subclass, self._real())

    def __or__(self, other: Any) -> Any:
        """In annotations, such as `DTensor | None`."""
        return Union[self, other]  # type: ignore[valid-type]  # noqa: UP007

    def __ror__(self, other: Any) -> Any:
        return Union[other, self]  # type: ignore[valid-type]  # noqa: UP007

    def __mro_entries__(self, bases: tuple[Any, ...]) -> tuple[Any, ...]:
        return (self._real(),)


class Decorator:
    """Stands for what a call gives while a module is imported: a decorator of functions."""

    def __init__(self, maker: Attribute, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        self.maker, self.args, self.options = maker, args, options

    def __call__(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def decorated(*args: Any, **options: Any) -> Any:
            return self.maker._real()(*self.args, **self.options)(function)(*args, **options)

        return decorated


class Stand(ModuleType):
    """Stands for a module; its attributes are `Attribute`s."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        attribute = Attribute(self.__name__, name)
        return attribute if _is_deferring() else attribute._real()


def _is_deferring() -> bool:
    return any(isinstance(finder, StandFinder) for finder in sys.meta_path)


class StandLoader(Loader):
    """Makes the stand-in of a module."""

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return Stand(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        module.__path__ = []


class StandFinder(MetaPathFinder):
    """Finds stand-ins for some libraries."""

    def __init__(self, libraries: Sequence[str]) -> None:
        self.libraries = libraries

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        deferred = any(f"{name}.".startswith(f"{library}.") for library in self.libraries)
        return ModuleSpec(name, StandLoader(), is_package=True) if deferred else None


@contextmanager
def deferring(libraries: Sequence[str]) -> Iterator[None]:
    """Within the block an import of these libraries gives stand-ins, which are forgotten at its end."""
    absent = [name for name in libraries if name not in sys.modules]
    finder = StandFinder(absent)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        _forget_stands()


@contextmanager
def real_imports() -> Iterator[None]:
    """Within the block imports are real, also while a module that defers is imported."""
    finders = [finder for finder in sys.meta_path if isinstance(finder, StandFinder)]
    for finder in finders:
        sys.meta_path.remove(finder)
    _forget_stands()
    try:
        yield
    finally:
        sys.meta_path[:0] = finders


def _forget_stands() -> None:
    for name in [name for name, module in sys.modules.items() if isinstance(module, Stand)]:
        del sys.modules[name]
        parent, _, child = name.rpartition(".")
        if isinstance(vars(sys.modules.get(parent, sys)).get(child), Stand):
            delattr(sys.modules[parent], child)


class DeferringLoader(Loader):
    """Runs a module's own loader within `deferring`."""

    def __init__(self, loader: Any, libraries: Sequence[str]) -> None:
        self.loader, self.libraries = loader, libraries

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        with deferring(self.libraries):
            self.loader.exec_module(module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)  # get_source and the like


class Deferring(MetaPathFinder):
    """Wraps the loaders of the modules in `DEFERRED`."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        every = f"{name.partition('.')[0]}.*"
        libraries = DEFERRED.get(name) or DEFERRED.get(every) or OWN.get(name.removeprefix(PACKAGE))
        spec = PathFinder.find_spec(name, path, target) if libraries else None
        if libraries is None or spec is None or spec.loader is None:
            return None
        spec.loader = DeferringLoader(spec.loader, libraries)
        return spec
