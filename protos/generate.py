"""Compile protos/ into platform/fedpeft, or with --check fail when the checked-in code is stale."""

from __future__ import annotations

import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent
TARGET = ROOT.parent / "platform"
PINNED = "1.81.1"


def generate(target: Path) -> list[Path]:
    """Compile every .proto below this folder into ``target``; returns the files written."""
    from grpc_tools import protoc

    sources = sorted(str(path) for path in ROOT.rglob("*.proto"))
    services = [path for path in sources if "\nservice " in Path(path).read_text(encoding="utf-8")]
    status = protoc.main(["protoc", f"-I{ROOT}", f"--python_out={target}", f"--pyi_out={target}", *sources])
    if status or protoc.main(["protoc", f"-I{ROOT}", f"--grpc_python_out={target}", *services]):
        sys.exit(1)
    return generated(target)


def generated(target: Path) -> list[Path]:
    """Files below ``target`` that the compiler wrote."""
    return sorted(path for pattern in ("*_pb2.py*", "*_pb2_grpc.py") for path in target.rglob(pattern) if "__pycache__" not in path.parts)


def stale() -> list[str]:
    """Names of generated files that differ from what the compiler makes of the sources now."""
    with tempfile.TemporaryDirectory() as folder:
        fresh = {path.relative_to(folder): path.read_bytes() for path in generate(Path(folder))}
    kept = {path.relative_to(TARGET): path.read_bytes() for path in generated(TARGET)}
    return sorted(str(name) for name in fresh.keys() | kept.keys() if fresh.get(name) != kept.get(name))


def main() -> None:
    """Entry point."""
    if (seen := version("grpcio-tools")) != PINNED:
        sys.exit(f"grpcio-tools {seen} is installed; generated code is pinned to {PINNED}: pip install grpcio-tools=={PINNED}")
    if "--check" in sys.argv[1:]:
        if names := stale():
            sys.exit(f"stale generated code: {', '.join(names)}; run `make protos`")
        return
    for path in generate(TARGET):
        print(path.relative_to(TARGET.parent))


if __name__ == "__main__":
    main()
