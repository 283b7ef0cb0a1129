"""Stands in for an interpreter when scripts/setup.sh is tested: keeps a log, installs nothing.

What it is told to install it remembers under `$STUB_STATE/installed`, and answers from there when
asked for a version. `$STUB_FAIL`: a command that contains this text fails.
"""

import os
import shutil
import sys
from pathlib import Path

state = Path(os.environ["STUB_STATE"])
arguments = sys.argv[1:]
line = " ".join(arguments)
installed = state / "installed"
installed.mkdir(exist_ok=True)
if arguments[0] == "-m":
    with (state / "log").open("a") as log:
        log.write(line + "\n")
failing = os.environ.get("STUB_FAIL", "")
if failing and failing in line:
    sys.exit(1)
if arguments[:2] == ["-m", "venv"]:
    (binaries := Path(arguments[2], "bin")).mkdir(parents=True)
    shutil.copy(sys.argv[0], binaries / "python")
    Path(arguments[2], "pyvenv.cfg").touch()
elif arguments[:3] == ["-m", "pip", "install"]:
    for requirement in (a for a in arguments if "==" in a):
        name, version = requirement.split("==")
        (installed / name).write_text(version)
elif "importlib.metadata" in line and (known := installed / arguments[-1]).exists():
    print(known.read_text())
