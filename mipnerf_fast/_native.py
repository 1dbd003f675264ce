"""Finding and loading the native library `mipnerf_fast/_C*.so`; the package works without it."""

from __future__ import annotations

import functools
import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

_BUILD = "python setup.py build_ext --inplace"


@functools.cache
def _find() -> tuple[ModuleType | None, str]:
    """The library and an empty reason, or None and why there is none; decided once in a process."""
    # The library's symbols are torch's: torch has to be in the process before it.
    import torch  # noqa: F401

    name = f"{__package__}._C"
    try:
        # One shared object is both the Python module and the operators: importing it registers them.
        return importlib.import_module(name), ""
    except ModuleNotFoundError as error:
        if error.name != name:
            return None, f"the native library cannot be loaded: {error}"
        built = sorted(path.name for path in Path(__file__).parent.glob("_C*.so"))
        if built:
            found = ", ".join(built)
            return None, f"the native library was built for another Python ({found}); build it with {_BUILD}"
        return None, f"the native library has not been built; build it with {_BUILD}"
    except ImportError as error:
        # Such as a library with CUDA kernels beside a torch without CUDA.
        return None, f"the native library cannot be loaded ({error}); build it again with {_BUILD}"


def load() -> ModuleType | None:
    """The native module, its operators registered as `torch.ops.mipnerf_fast.*`, or None where there is none.

    The first call decides for the whole process: a library built later is seen by the next one.
    """
    return _find()[0]


def available() -> bool:
    """Whether the native library is there and loads."""
    return load() is not None


def why_missing() -> str:
    """One sentence saying why the library is not there, and what to do; empty where it is."""
    return _find()[1]


def build_info() -> dict[str, Any]:
    """How the library was built, empty without it.

    Keys: reason (what was built and why), torch, cuda (None for the CPU alone), architectures,
    architectures_reason, compilers, flags, sources, revision, vector_units (whose copies of the CPU's loops it has).

    >>> info = build_info()
    >>> not info or "cxx" in info["compilers"]
    True
    """
    module = load()
    return dict(module.build_info()) if module is not None else {}


def vector_unit() -> str:
    """Whose copies of the CPU kernels run in this process: "avx512", "avx2" or "baseline"; empty without the library.

    The best that the processor has, unless ATEN_CPU_CAPABILITY, torch's own variable, says "avx2" or "default".
    """
    module = load()
    return str(module.vector_unit()) if module is not None else ""
