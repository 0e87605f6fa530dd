"""The generated code is what the .proto files give, and all of it is re-exported."""

from __future__ import annotations

import ast
import importlib
import sys
from pathlib import Path

import pytest
from google.protobuf import descriptor_pb2
from grpc_tools import protoc  # type: ignore[import-untyped]

import images_spec
from images_spec import messages, regenerate

PACKAGE = Path(images_spec.__file__).parent
STEMS = sorted(path.stem for path in PACKAGE.glob("*.proto"))


def modules() -> list[str]:
    return [f"images_spec.{stem}_pb2" for stem in STEMS]


def test_generated_code_is_that_of_the_proto_files(tmp_path: Path) -> None:
    """By meaning, not by text: another release of the compiler writes other boilerplate."""
    target = tmp_path / "all.binpb"
    sources = [f"images_spec/{stem}.proto" for stem in STEMS]
    assert protoc.main(["protoc", f"-I{PACKAGE.parent}", f"--descriptor_set_out={target}", *sources]) == 0
    fresh = descriptor_pb2.FileDescriptorSet.FromString(target.read_bytes())
    assert len(fresh.file) == len(STEMS)
    for file in fresh.file:
        for_json_only(file.message_type)
        checked_in = descriptor_pb2.FileDescriptorProto()
        module = importlib.import_module(file.name.removesuffix(".proto").replace("/", ".") + "_pb2")
        module.DESCRIPTOR.CopyToProto(checked_in)
        assert checked_in == file, f"{file.name} changed: python -m images_spec.regenerate"


def for_json_only(parts: object) -> None:
    """Leaves out the names that JSON would use: the compiler adds them, generated code lacks them."""
    for message in parts:  # type: ignore[attr-defined]
        for field in message.field:
            field.ClearField("json_name")


def declared(stub: Path) -> dict[str, set[str]]:
    """The attributes of each class that a stub declares; "" stands for the module."""
    found: dict[str, set[str]] = {}
    scopes = [("", ast.parse(stub.read_text()).body)]
    for name, body in scopes:
        targets = [node.target for node in body if isinstance(node, ast.AnnAssign)]
        found[name] = {target.id for target in targets if isinstance(target, ast.Name)}
        scopes += [(node.name, node.body) for node in body if isinstance(node, ast.ClassDef)]
    return found


def test_stubs_are_those_of_the_proto_files(tmp_path: Path) -> None:
    (tmp_path / "images_spec").mkdir()
    regenerate.regenerate(tmp_path)
    for stem in STEMS:
        fresh = declared(tmp_path / "images_spec" / f"{stem}_pb2.pyi")
        assert len(fresh) > 1
        checked_in = declared(PACKAGE / f"{stem}_pb2.pyi")
        assert fresh == checked_in, f"{stem}.proto changed: python -m images_spec.regenerate"


def test_a_broken_proto_file_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "broken"
    package.mkdir()
    (package / "wrong.proto").write_text("message {")
    monkeypatch.setattr(regenerate, "PACKAGE", package)
    with pytest.raises(RuntimeError, match="protoc failed"):
        regenerate.regenerate(tmp_path)


def test_all_is_re_exported() -> None:
    names = set()
    for module in modules():
        descriptor = importlib.import_module(module).DESCRIPTOR
        names |= {*descriptor.message_types_by_name, *descriptor.enum_types_by_name}
    assert names == set(messages.__all__)
    assert all(hasattr(messages, name) for name in names)


def test_enumerations_only_name_values() -> None:
    """No field has the type of an enumeration: a value from a newer release must decode."""
    for module in modules():
        for message in sys.modules[module].DESCRIPTOR.message_types_by_name.values():
            assert all(field.enum_type is None for field in message.fields)
