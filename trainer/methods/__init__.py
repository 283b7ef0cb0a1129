"""Unlearning methods to compare ALTER with: `unlearn(UnlearnSettings(method=make_method("npo_gd"), ...))`."""

from .adapter import ADAPTERS, LoraAdapter
from .base import Method, Retaining, Task, TokenMethod
from .registry import METHODS, make_method
from .run import METHOD_FILE, unlearn
from .settings import UnlearnSettings
from .weighting import (
    WEIGHTINGS,
    AtwuWeighting,
    EntropyWeighting,
    KnowledgeSpanWeighting,
    UniformWeighting,
    Weighting,
)

__all__ = [
    "ADAPTERS",
    "METHODS",
    "METHOD_FILE",
    "WEIGHTINGS",
    "AtwuWeighting",
    "EntropyWeighting",
    "KnowledgeSpanWeighting",
    "LoraAdapter",
    "Method",
    "Retaining",
    "Task",
    "TokenMethod",
    "UniformWeighting",
    "UnlearnSettings",
    "Weighting",
    "make_method",
    "unlearn",
]
