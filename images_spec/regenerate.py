"""Generates ``*_pb2.py`` and ``*_pb2.pyi`` from the ``.proto`` files.

``python -m images_spec.regenerate [DIR]``; needs ``grpcio-tools`` (the ``dev`` extra). The generated files
are checked in and not edited; a test compares them with the output of this script.
"""

import sys
from pathlib import Path

from grpc_tools import protoc  # type: ignore[import-untyped]

PACKAGE = Path(__file__).parent

STUB_HEADER = '# mypy: disable-error-code="type-arg"\n'
"""protoc writes ``Mapping`` without type parameters, which strict mypy rejects."""


def regenerate(target: Path) -> None:
    """Writes ``target/images_spec/*_pb2.py`` and ``.pyi``. Raises ``RuntimeError`` if a .proto file is invalid."""
    sources = sorted(f"{PACKAGE.name}/{path.name}" for path in PACKAGE.glob("*.proto"))
    arguments = ["protoc", f"-I{PACKAGE.parent}", f"--python_out={target}", f"--pyi_out={target}", *sources]
    if protoc.main(arguments) != 0:
        raise RuntimeError("protoc failed, see above")
    for stub in (target / PACKAGE.name).glob("*_pb2.pyi"):
        stub.write_text(STUB_HEADER + stub.read_text())


if __name__ == "__main__":
    regenerate(Path(sys.argv[1]) if len(sys.argv) > 1 else PACKAGE.parent)
