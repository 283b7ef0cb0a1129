"""Training: a substrate for a base model, and forget experts on it. `train(TrainSettings(...))`."""

from .progress import Reporter, RichReporter, SilentReporter
from .router import EvidenceSettings
from .run import TrainResult, train
from .settings import ExpertSettings, SubstrateSettings, TrainSettings

__all__ = [
    "EvidenceSettings",
    "ExpertSettings",
    "Reporter",
    "RichReporter",
    "SilentReporter",
    "SubstrateSettings",
    "TrainResult",
    "TrainSettings",
    "train",
]
