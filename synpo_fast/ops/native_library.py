"""Finds and loads the C++ library of csrc/: the build that fits this CPU, once, when first needed.

There is one build for each CPU capability that torch distinguishes (see setup.py). A library built against another torch fails
to load. The reason is kept and becomes the error message when the user requests the native backend by name.
"""

import functools
from pathlib import Path

import torch

_PACKAGE = Path(__file__).resolve().parent.parent


@functools.cache
def reason_unavailable() -> str | None:
    """Loads the library. Returns None on success, otherwise the reason it cannot be loaded."""
    capability = torch.backends.cpu.get_cpu_capability()
    names = {"AVX512": ("avx512", "avx2", "default"), "AVX2": ("avx2", "default")}.get(capability, ("default",))
    found = [path for name in names if (path := _PACKAGE / f"_native_{name}.so").is_file()]
    if not found:
        return (
            f"no compiled library for CPU capability {capability} in {_PACKAGE}; it is built during installation if g++ "
            "is available: `pip install --no-build-isolation synpo-fast`, or in a checkout `python setup.py build_ext --inplace`"
        )
    try:
        torch.ops.load_library(str(found[0]))
    except OSError as error:
        return f"{found[0].name} does not load with torch {torch.__version__}; rebuild it. Loader error: {error}"
    return None


def is_available() -> bool:
    return reason_unavailable() is None
