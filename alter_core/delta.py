"""The multi-expert delta of Eq. 6 and 9, in plain torch: the reference that every kernel is held against.

Legend: T tokens, R rank, E experts, I input features, O output features.
"""

from __future__ import annotations

import torch
from torch import Tensor


def multi_expert_delta(
    x_TI: Tensor, lora_a_RI: Tensor, lora_b_EOR: Tensor, weights_TE: Tensor, scaling: float
) -> Tensor:
    """scaling * sum_e w_e B_e A x for every token.

    Shapes: x (T, I), lora_a (R, I), lora_b (E, O, R), weights (T, E) -> (T, O) in x.dtype.
    """
    shrunk_TR = x_TI @ lora_a_RI.T
    gated_TER = (weights_TE.unsqueeze(-1) * scaling * shrunk_TR.unsqueeze(1)).to(x_TI.dtype)
    return torch.einsum("ter,eor->to", gated_TER, lora_b_EOR)
