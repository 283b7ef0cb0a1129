"""ALTER's method: entropy, router, experts, and the bundles that carry them.

`alter_core.attach` is imported by name, since it alone needs transformers.
"""

from .bundle import Bundle, DataDigest, Manifest, Provenance, SiteInfo, read_bundle, read_manifest
from .config import AlterConfig
from .delta import multi_expert_delta
from .entropy import EntropyEstimator, max_tsallis_entropy, shannon_entropy, tsallis_entropy
from .errors import AlterError
from .evidence import EvidenceHead, windowed_max
from .fingerprint import BaseModelInfo
from .router import expert_weights, scalar_logits
from .sites import SUPPORTED_ARCHITECTURES, default_tap_layer
from .substrate import ForgetExpert, Substrate

__all__ = [
    "SUPPORTED_ARCHITECTURES",
    "AlterConfig",
    "AlterError",
    "BaseModelInfo",
    "Bundle",
    "DataDigest",
    "EntropyEstimator",
    "EvidenceHead",
    "ForgetExpert",
    "Manifest",
    "Provenance",
    "SiteInfo",
    "Substrate",
    "default_tap_layer",
    "expert_weights",
    "max_tsallis_entropy",
    "multi_expert_delta",
    "read_bundle",
    "read_manifest",
    "scalar_logits",
    "shannon_entropy",
    "tsallis_entropy",
    "windowed_max",
]
