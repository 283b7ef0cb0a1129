"""Evidence of an unlearning request: what was asked, what was measured, what applies, and who did it.

document     the facts, in an envelope that may be signed
certificate  the same as a page for people, with the envelope inside
"""

from .certificate import read_certificate, render_certificate
from .document import PAYLOAD_TYPE, evidence_of, read_envelope, signed, verified

__all__ = [
    "PAYLOAD_TYPE",
    "evidence_of",
    "read_certificate",
    "read_envelope",
    "render_certificate",
    "signed",
    "verified",
]
