"""Finds and loads the C++ library of csrc/: the build that fits this CPU, once, when first needed.

There is one build for each CPU capability torch distinguishes (see setup.py). A library built against another torch fails to
load; the reason is kept and given to whoever asks for the native backend by name.
"""

import functools
from pathlib import Path

import torch

_PACKAGE = Path(__file__).resolve().parent.parent


@functools.cache
def why_unavailable() -> str | None:
    """Loads the library; returns None when it is there, else the reason it is not."""
    capability = torch.backends.cpu.get_cpu_capability()
    names = {"AVX512": ("avx512", "avx2", "default"), "AVX2": ("avx2", "default")}.get(capability, ("default",))
    found = [path for name in names if (path := _PACKAGE / f"_native_{name}.so").is_file()]
    if not found:
        return (
            f"no compiled library for CPU capability {capability} in {_PACKAGE}; it is built on installation when g++ is "
            "there: `pip install --no-build-isolation synpo-fast`, or in a checkout `python setup.py build_ext --inplace`"
        )
    try:
        torch.ops.load_library(str(found[0]))
    except OSError as error:
        return f"{found[0].name} does not load with torch {torch.__version__}; build it again. The loader says: {error}"
    return None


def is_available() -> bool:
    return why_unavailable() is None
