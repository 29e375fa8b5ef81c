"""Collect the wheels that a GPU machine without a network lacks: what fedpeft needs beside torch and transformers.

    python tests/gpu/wheels.py FOLDER [--python 3.12]

bitsandbytes' wheel carries a library for each CUDA and ROCm release, 43 MB in all; those of CUDA 13 are kept, 6 MB.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

PACKAGES = (
    "bitsandbytes",
    "peft",
    "liger-kernel==0.8.5",
    "cryptography",
    "cffi",
    "pycparser",
    "pydantic",
    "pydantic-core",
    "annotated-types",
    "typing-inspection",
    "typing-extensions",
)
PLATFORMS = ("manylinux_2_34_x86_64", "manylinux_2_28_x86_64", "manylinux_2_24_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
DROPPED = re.compile(r"bitsandbytes/libbitsandbytes_(cuda1[012]\d|rocm\d+|xpu\d+)\.so")


def collect(folder: Path, python: str) -> None:
    """Download each package at the version installed here, for ``python`` on Linux x86-64."""
    tags = [part for platform in PLATFORMS for part in ("--platform", platform)]
    abis = [part for abi in (f"cp{python.replace('.', '')}", "abi3", "none") for part in ("--abi", abi)]
    for package in PACKAGES:
        named = package if "==" in package else f"{package}=={version(package)}"
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "--python-version", python]
        subprocess.run([*command, "--implementation", "cp", *abis, *tags, "-d", str(folder), named], check=True)


def slim(wheel: Path) -> None:
    """Rewrite ``wheel`` without the libraries that are not needed, its list of files too."""
    slimmer = wheel.with_suffix(".new")
    with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(slimmer, "w", zipfile.ZIP_DEFLATED) as new:
        for item in old.infolist():
            if DROPPED.fullmatch(item.filename):
                continue
            body = old.read(item)
            if item.filename.endswith(".dist-info/RECORD"):
                body = "".join(row for row in body.decode().splitlines(True) if not DROPPED.fullmatch(row.split(",")[0])).encode()
            new.writestr(item, body)
    slimmer.replace(wheel)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--python", default="3.12")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    collect(arguments.folder, arguments.python)
    for wheel in arguments.folder.glob("bitsandbytes-*.whl"):
        slim(wheel)
    sizes = {wheel.name: wheel.stat().st_size for wheel in sorted(arguments.folder.glob("*.whl"))}
    for name, size in sizes.items():
        print(f"{size / 2**20:7.2f} MiB  {name}")
    print(f"{sum(sizes.values()) / 2**20:7.2f} MiB")


if __name__ == "__main__":
    main()
