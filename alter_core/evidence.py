"""Evidence that the text at hand belongs to a forget domain.

A head scores every token from the input embeddings of the last `ngram` tokens; the router logit of a
domain is the maximum over the last `window` tokens. Both are pure functions of token ids, so they are
exact under chunked prefill, prefix caching and preemption, and need no state.

Legend: T tokens, D embedding size, G n-gram length, H units, N domains.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

NO_EVIDENCE = -1e4
"""Logit of a token that offers no evidence (padding, or an empty slot). Finite, so products stay finite."""


def ngram_features(embeddings_TD: Tensor, ngram: int) -> Tensor:
    """Concatenates each token's embedding with those of its `ngram - 1` predecessors; zeros before the start.

    Shapes: (..., T, D) -> (..., T, G * D), oldest token first.
    """
    num_tokens = embeddings_TD.shape[-2]
    shifted = [
        nn.functional.pad(embeddings_TD, (0, 0, back, 0))[..., :num_tokens, :]
        for back in range(ngram - 1, -1, -1)
    ]
    return torch.cat(shifted, dim=-1)


class EvidenceHead(nn.Module):
    """One domain's evidence score: w2 . relu(W1 f + b1) + b2 over n-gram features f.

    Positive means that the domain beats retain, whose logit is 0.
    """

    def __init__(self, embedding_size: int, *, ngram: int, num_units: int) -> None:
        super().__init__()
        self.ngram = ngram
        self.fc1 = nn.Linear(ngram * embedding_size, num_units)
        self.fc2 = nn.Linear(num_units, 1)

    def forward(self, embeddings: Tensor) -> Tensor:
        """Shapes: normalised embeddings (..., T, D) -> (..., T), float32."""
        features = ngram_features(embeddings.float(), self.ngram)
        scores: Tensor = self.fc2(torch.relu(self.fc1(features)))
        return scores.squeeze(-1)


def windowed_max(evidence: Tensor, window: int) -> Tensor:
    """Maximum over the last `window` positions, including the position itself.

    Shapes: (..., T, N) -> (..., T, N).
    """
    num_tokens = evidence.shape[-2]
    reach = 1
    result = evidence
    while reach < min(window, num_tokens):
        step = min(reach, window - reach)
        shifted = nn.functional.pad(result, (0, 0, step, 0), value=NO_EVIDENCE)[..., :num_tokens, :]
        result = torch.maximum(result, shifted)
        reach += step
    return result
