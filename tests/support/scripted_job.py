"""Stands in for `alter_cli.unlearning_job` where training would take minutes: what it does is told by a plan.

The plan is JSON in ALTER_TEST_JOB, or in the file `plan` of the job: `bundle` to hand over, `figures`,
`outcome`, `error`; `deaths`, how often it kills itself first; `waits`, a file that it waits for; `pause_s`,
how long it measures. It notes its starts in the file `starts` of its folder. It imports nothing of the
project: torch alone takes seconds.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path


def main() -> None:
    folder = Path(sys.argv[1])
    with (folder / "lock").open("r+b") as lock:
        lock.write(f"{os.getpid():<20}".encode())
    spec = json.loads((folder / "job.json").read_bytes())
    given = Path(spec["plan"]).read_text() if "plan" in spec else os.environ["ALTER_TEST_JOB"]
    plan = json.loads(given)
    for path in (spec["forget"], *spec["retain"]):
        assert Path(path).read_bytes()
    with (folder / "starts").open("a") as starts:
        starts.write(f"{os.getpid()} {spec['allow_unknown']}\n")
    num_starts = len((folder / "starts").read_text().splitlines())
    progress = {"phase": "training", "stage": "expert", "done": 1, "total": 2}
    (folder / "progress.json").write_text(json.dumps(progress))
    if num_starts <= plan.get("deaths", 0):
        os.kill(os.getpid(), signal.SIGKILL)
    while "waits" in plan and not Path(plan["waits"]).exists():
        time.sleep(0.01)
    (folder / "progress.json").write_text(json.dumps(progress | {"phase": "evaluating"}))
    time.sleep(plan.get("pause_s", 0))
    outcome = plan.get("outcome", "trained")
    if outcome == "nothing-to-forget" and spec["allow_unknown"]:
        outcome = "trained"
    result = {"outcome": outcome, "error": plan.get("error"), "figures": plan["figures"]}
    if outcome == "trained":
        result["bundle"] = f"out/{spec['domain']}"
        shutil.rmtree(folder / "out", ignore_errors=True)
        shutil.copytree(plan["bundle"], folder / result["bundle"])
    (folder / "result.part").write_text(json.dumps(result))
    (folder / "result.part").rename(folder / "result.json")


if __name__ == "__main__":
    main()
