"""Compiles csrc/ into the package, once per instruction set. If that fails, the package works without its native backend.

All static metadata is in pyproject.toml. The C++ sources are compiled into one shared library for each CPU capability that
torch distinguishes. So an install from one machine of a cluster runs on all of them, and no AVX-512 code can end up in the
library that is loaded on an older CPU. `synpo_fast.ops.native_library` loads the library that fits.

SYNPO_FAST_NATIVE=0 skips the native backend. SYNPO_FAST_NATIVE=1 turns a failed build into an error.
"""

import os
import platform
import sys
from pathlib import Path

from setuptools import setup

SOURCES = sorted(str(path) for path in Path("csrc").glob("*.cpp"))
HEADERS = sorted(str(path) for path in Path("csrc").glob("*.h"))
CAPABILITY_FLAGS = {
    "default": ["-DCPU_CAPABILITY=DEFAULT", "-DCPU_CAPABILITY_DEFAULT"],
    "avx2": ["-DCPU_CAPABILITY=AVX2", "-DCPU_CAPABILITY_AVX2", "-mavx2", "-mfma", "-mf16c"],
    "avx512": [
        "-DCPU_CAPABILITY=AVX512",
        "-DCPU_CAPABILITY_AVX512",
        "-mavx512f",
        "-mavx512bw",
        "-mavx512vl",
        "-mavx512dq",
        "-mfma",
        "-mf16c",
    ],
}


def report_not_built(reason: str) -> None:
    print(
        f"synpo_fast: the native CPU backend is not built: {reason}\n"
        "synpo_fast: everything else is installed; CPU tensors will use the slower backend='chunked'.",
        file=sys.stderr,
    )


def native_build() -> dict:
    """The arguments of setup() that build the native libraries, or {}. If torch is missing, also prints why."""
    requested = os.environ.get("SYNPO_FAST_NATIVE", "auto")
    if requested == "0":
        return {}
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError as error:
        if requested == "1":
            raise
        report_not_built(
            f"torch cannot be imported during the build ({error}); install torch first, then run pip with --no-build-isolation"
        )
        return {}

    capabilities = ["default"]
    if platform.machine() in ("x86_64", "AMD64"):
        capabilities += ["avx2", "avx512"]
    extensions = [
        CppExtension(
            f"synpo_fast._native_{capability}",
            SOURCES,
            extra_compile_args=[
                "-O3",
                "-std=c++20",
                "-fopenmp",
                "-fvisibility=hidden",
                "-Wno-unknown-pragmas",
                *CAPABILITY_FLAGS[capability],
            ],
            extra_link_args=["-fopenmp"],
            depends=HEADERS,
        )
        for capability in capabilities
    ]

    class BuildNative(BuildExtension):
        def build_extensions(self) -> None:
            try:
                super().build_extensions()
            except Exception as error:  # any compiler or linker error: the package must still install
                if requested == "1":
                    raise
                report_not_built(f"{type(error).__name__}: {error}")
                self.extensions = []

    return {"ext_modules": extensions, "cmdclass": {"build_ext": BuildNative.with_options(no_python_abi_suffix=True)}}


setup(**native_build())
