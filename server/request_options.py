"""Flags of `alter serve` for unlearning requests."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from server.requests.gate import Gate
from server.requests.settings import DEFAULT_MAX_UPLOAD_MIB

_GATE = Gate()

WorkspacePath = Annotated[
    Path | None,
    typer.Option(
        "--alter-workspace",
        metavar="DIR",
        help="Where the text of unlearning requests lies until they have ended. Default: `unlearning` beside "
        "the audit log. Environment: ALTER_WORKSPACE.",
    ),
]
Retain = Annotated[
    list[Path] | None,
    typer.Option(
        "--alter-retain",
        metavar="FILE.jsonl",
        help="Sample of what the model is to keep, for unlearning requests that bring none; may be repeated. "
        "Environment: ALTER_RETAIN.",
    ),
]
General = Annotated[
    list[Path] | None,
    typer.Option(
        "--alter-general",
        metavar="FILE.jsonl",
        help="Ordinary text, on which no expert that a request makes may act; may be repeated. Environment: "
        "ALTER_GENERAL.",
    ),
]
TrainingDevice = Annotated[
    str | None,
    typer.Option(
        "--alter-training-device",
        help="Where experts of requests are trained: auto, cpu or cuda. Environment: ALTER_TRAINING_DEVICE.",
    ),
]
SigningKey = Annotated[
    Path | None,
    typer.Option(
        "--alter-signing-key",
        metavar="PEM",
        help="Private key that signs the experts that requests make, and their evidence. Environment: "
        "ALTER_SIGNING_KEY.",
    ),
]
MaxUpload = Annotated[
    int | None,
    typer.Option(
        "--alter-max-upload-mib",
        help=f"Largest unlearning request, by default {DEFAULT_MAX_UPLOAD_MIB} MiB. Environment: "
        "ALTER_MAX_UPLOAD_MIB.",
    ),
]
MaxForgetRatio = Annotated[
    float | None,
    typer.Option(
        "--alter-gate-max-forget-ratio",
        help="A person is asked if forgotten answers keep more of their probability, by default "
        f"{_GATE.max_forget_ratio}. Environment: ALTER_GATE_MAX_FORGET_RATIO.",
    ),
]
MinUtilityRatio = Annotated[
    float | None,
    typer.Option(
        "--alter-gate-min-utility-ratio",
        help="A person is asked if the retain sample keeps less, by default "
        f"{_GATE.min_utility_ratio}. Environment: ALTER_GATE_MIN_UTILITY_RATIO.",
    ),
]
MaxParaphraseLeak = Annotated[
    float | None,
    typer.Option(
        "--alter-gate-max-paraphrase-leak",
        help="A person is asked if rephrased questions bring so much more probability back, by default "
        f"{_GATE.max_paraphrase_leak}. Environment: ALTER_GATE_MAX_PARAPHRASE_LEAK.",
    ),
]
