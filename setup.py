"""The packages of the wheel, among them `harness.conf`: the folder conf/; and the native kernels.

pyproject.toml can describe neither. The kernels are built where torch and a C++17 compiler are; without them,
those of torch run. PTQBENCH_NATIVE=0 leaves them out.
"""

import os
import runpy
import shutil
import warnings
from pathlib import Path

from setuptools import find_packages, setup

NATIVE = Path("harness/kernels/native")
SOURCES = "_native.sources"
FLAGS = ["-std=c++17", "-O2", "-g0", "-fopenmp", "-Wall", "-Wno-maybe-uninitialized", "-Wno-uninitialized"]


def extension():
    """Arguments of `setup` that build the native kernels; none without torch."""
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError:
        return {}

    class Build(BuildExtension):
        def build_extensions(self):
            try:
                super().build_extensions()
            except Exception as reason:  # no compiler, or one that lacks an option: the package works without
                native.optional = True  # only now: setuptools reports errors of optional extensions as success
                warnings.warn(f"the native kernels were not built, torch's kernels will run: {reason}", stacklevel=1)
            else:
                digest = runpy.run_path(str(NATIVE / "library.py"))["sources_digest"]()
                Path(self.build_lib, NATIVE, SOURCES).write_text(digest)

        def copy_extensions_to_source(self):
            super().copy_extensions_to_source()
            built = Path(self.build_lib, NATIVE, SOURCES)  # that of the library which was copied, not of the sources
            if built.exists():
                shutil.copy(built, NATIVE / SOURCES)

    # Threads come from torch's OpenMP, which the linker must not add a second time: no -fopenmp for it.
    sources = sorted(str(path) for path in NATIVE.glob("*.cpp"))
    headers = sorted(str(path) for path in NATIVE.glob("*.h"))
    native = CppExtension("harness.kernels.native._native", sources, extra_compile_args=FLAGS, depends=headers)
    build = Build.with_options(no_python_abi_suffix=True)
    return {"ext_modules": [native], "cmdclass": {"build_ext": build}}


setup(
    packages=[*find_packages(include=["harness*", "methods*"]), "hydra_plugins", "harness.conf"],
    package_dir={"harness.conf": "conf"},
    **({} if os.environ.get("PTQBENCH_NATIVE") == "0" else extension()),
)
