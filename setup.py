"""The compiled parts; everything else is in pyproject.toml.

* cffi modules (API mode): ``images_spec._pagemap``, ``lazypages.engine._uffd``, ``lazypages.net._pageserver``,
  ``dumptool._ptrace``.
* ``lazypages/restore/uffd_restorer``: a static executable made from ``csrc/uffd_restorer.c``.

A part whose sources are not there yet is left out, so that each can be worked on by itself.
"""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_ext import build_ext

HERE = Path(__file__).parent

CFFI_BUILDERS = {
    "images_spec/_pagemap_build.py": "ffibuilder",
    "lazypages/engine/_uffd_build.py": "ffibuilder",
    "lazypages/net/_pageserver_build.py": "ffibuilder",
    "dumptool/_ptrace_build.py": "ffibuilder",
}
RESTORER_SOURCES = ["csrc/uffd_restorer.c", "csrc/restore/restore_task.c", "csrc/common/inject.c"]
RESTORER_TARGET = Path("lazypages/restore/uffd_restorer")


class BuildExt(build_ext):
    """build_ext that also links the restorer, which is a program and not a module."""

    def run(self) -> None:
        super().run()
        sources = [source for source in RESTORER_SOURCES if (HERE / source).exists()]
        if RESTORER_SOURCES[0] not in sources:
            return
        root = HERE if self.inplace else Path(self.build_lib)
        target = root / RESTORER_TARGET
        target.parent.mkdir(parents=True, exist_ok=True)
        objects = self.compiler.compile(
            sources,
            output_dir=self.build_temp,
            include_dirs=["csrc"],
            extra_postargs=["-O2", "-std=gnu11", "-Wall", "-Wextra"],
        )
        self.compiler.link_executable(
            objects, target.name, output_dir=str(target.parent), extra_postargs=["-static"]
        )


setup(
    cffi_modules=[f"{path}:{name}" for path, name in CFFI_BUILDERS.items() if (HERE / path).exists()],
    cmdclass={"build_ext": BuildExt},
)
