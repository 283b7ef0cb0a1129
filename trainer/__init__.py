"""Training: a substrate for a base model, and forget experts on it. `train(TrainSettings(...))`.

`refresh_experts(RefreshSettings(...))` takes back what trained experts do to text that is to be kept.
"""

from .progress import Reporter, RichReporter, SilentReporter
from .refresh import RefreshResult, refresh_experts
from .router import EvidenceSettings
from .run import TrainResult, train
from .settings import ExpertSettings, RefreshSettings, SubstrateSettings, TrainSettings

__all__ = [
    "EvidenceSettings",
    "ExpertSettings",
    "RefreshResult",
    "RefreshSettings",
    "Reporter",
    "RichReporter",
    "SilentReporter",
    "SubstrateSettings",
    "TrainResult",
    "TrainSettings",
    "refresh_experts",
    "train",
]
