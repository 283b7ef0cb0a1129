"""Where benchmark data lies."""

from __future__ import annotations

import os
from pathlib import Path


def default_data_dir() -> Path:
    """`ALTER_DATA_DIR`, or the folder beside the project that development machines have."""
    return Path(os.environ.get("ALTER_DATA_DIR", Path.cwd().parent / "shared" / "data"))
