"""What this machine computes well."""

from __future__ import annotations

import torch


def fast_dtype() -> torch.dtype:
    """bfloat16, or float32 on processors that would emulate it, many times slower: those without AVX-512."""
    has_bfloat16 = torch.cuda.is_available() or torch.backends.cpu.get_cpu_capability() == "AVX512"
    return torch.bfloat16 if has_bfloat16 else torch.float32
