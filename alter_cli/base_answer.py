"""Answers as the base model without any expert. Started by `server.base_answers`.

    python -m alter_cli.base_answer

Reads {"model", "token_ids", "max_tokens"} from standard input, writes {"text"} to standard output.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch

from trainer.base_model import load_base_model

NICENESS = 10
"""Serving comes first."""


def main() -> None:
    """See the module. Raises: UnsupportedModelError."""
    os.nice(NICENESS)
    asked = json.load(sys.stdin)
    base = load_base_model(Path(asked["model"]), device="cpu")
    prompt = torch.tensor([asked["token_ids"]])
    found = base.model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        max_new_tokens=asked["max_tokens"],
    )
    text = base.tokenizer.decode(found[0, prompt.shape[1] :], skip_special_tokens=True)
    json.dump({"text": text}, sys.stdout)


if __name__ == "__main__":
    main()
