"""Published methods for graph learning, inverse problems, kernels and language models.

Each domain is a subpackage, loaded on first use::

    import sciml

    sciml.kernels.KernelMachineClassifier(kernel=sciml.kernels.NTK(depth=2))

`sciml.methods` lists every method with its paper, its place and what is proved of it.
"""

from importlib import import_module
from types import ModuleType

__version__ = "0.1.0"

_SUBPACKAGES = ("graphs", "inverse", "kernels", "layerwise", "lm", "methods")

__all__ = ["__version__", *_SUBPACKAGES]


def __getattr__(name: str) -> ModuleType:
    # Domains pull in torch, numba or deepinv; `import sciml` must not.
    if name in _SUBPACKAGES:
        return import_module(f"sciml.{name}")
    raise AttributeError(f"module 'sciml' has no attribute {name!r}")


def __dir__() -> list[str]:
    return list(__all__)
