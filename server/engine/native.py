"""Compiles and loads the CPU kernels in `csrc/`, once for a machine, its torch and their sources.

Without a compiler the operators stay in torch: slower, the same results.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import platform
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from torch.utils import cpp_extension

_FOLDER = Path(__file__).parent / "csrc"
_FLAGS = ["-O3", "-march=native", "-fopenmp", "-Wno-psabi"]
logger = logging.getLogger(__name__)


def sources() -> list[Path]:
    """The C++ files and their headers."""
    return sorted([*_FOLDER.glob("*.cpp"), *_FOLDER.glob("*.h")])


@functools.cache
def load() -> bool:
    """True once the kernels are loaded into this process. Warns, once, if they cannot be.

    Compiling takes about half a minute, the first time. `ALTER_NATIVE=0` leaves it out.
    """
    if os.environ.get("ALTER_NATIVE", "1") == "0":
        return False
    library = _cache_folder() / "alter_cpu.so"
    try:
        if library.exists():
            torch.ops.load_library(str(library))  # type: ignore[no-untyped-call]
        else:
            _build(library)
    except (OSError, RuntimeError, ImportError) as error:
        logger.warning(
            "The CPU kernels of forget experts could not be compiled; plain torch takes their place, "
            "which costs throughput. Install g++ and ninja to have them. (%s)",
            str(error).strip().splitlines()[-1],
        )
        return False
    return True


def _build(library: Path) -> None:
    """Compiles in a folder of its own and moves the result, so that no lock can be left behind."""
    library.parent.mkdir(parents=True, exist_ok=True)
    # ninja may be installed beside the interpreter alone.
    os.environ["PATH"] = f"{os.environ.get('PATH', '')}{os.pathsep}{Path(sys.executable).parent}"
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        cpp_extension.load(
            "alter_cpu",
            [str(path) for path in sources() if path.suffix == ".cpp"],
            extra_cflags=_FLAGS,
            extra_ldflags=["-fopenmp"],
            build_directory=scratch,
            is_python_module=False,
        )
        (built,) = Path(scratch).glob("*.so")
        shutil.move(built, library)


def _cache_folder() -> Path:
    digest = hashlib.sha256()
    for path in sources():
        digest.update(path.read_bytes())
    digest.update(f"{_FLAGS} {torch.__version__} {platform.machine()} {_cpu_flags()}".encode())
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "alter" / "kernels" / digest.hexdigest()[:16]


def _cpu_flags() -> str:
    """What the processor can do: `-march=native` compiles for that."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor()
    lines = info.read_text().splitlines()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
