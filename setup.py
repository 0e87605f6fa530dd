"""The compiled parts; everything else is in pyproject.toml.

* The cffi modules of csrc/modules.py.
* ``lazypages/restore/uffd_restorer`` and ``dumptool/tracker_holder``: static executables, each made from the file of
  its name in ``csrc``.
"""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_ext import build_ext

CFFI_MODULES = ("pagemap", "engine", "pageserver", "ptrace")
PROGRAMS = {
    Path("lazypages/restore/uffd_restorer"): [
        "csrc/uffd_restorer.c",
        "csrc/restore/restore_task.c",
        "csrc/restore/check_plan.c",
        "csrc/common/inject.c",
    ],
    Path("dumptool/tracker_holder"): ["csrc/tracker_holder.c"],
}


class BuildExt(build_ext):
    """build_ext that also links the programs, which are no modules."""

    def run(self) -> None:
        super().run()
        root = Path(__file__).parent if self.inplace else Path(self.build_lib)
        for program, sources in PROGRAMS.items():
            target = root / program
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
    cffi_modules=[f"csrc/modules.py:{name}" for name in CFFI_MODULES],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},  # cffi restricts itself to the stable ABI
    cmdclass={"build_ext": BuildExt},
)
