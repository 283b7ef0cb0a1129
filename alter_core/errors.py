"""Every error that ALTER raises on purpose.

AlterError
├── ConfigError                  a setting is impossible or contradicts another
├── UnsupportedModelError        the base model has no place to attach to
├── UnsupportedEngineError       an engine option that would bypass the gate
├── TrainingDataError            a training file is malformed, or its sets overlap
├── TrainingError                training cannot go on (NaN loss, unusable checkpoint)
│   └── NothingToForgetError     the base model does not seem to know the domain
├── EvaluationError              a benchmark's rows or logs do not fit together
│   └── JudgeError               the judge of answers cannot be asked, or gives no score
├── BundleError
│   ├── BundleNotFoundError      nothing there, or not a bundle
│   ├── BundleFormatError        a manifest of another kind, format or shape
│   ├── BundleTamperedError      a file is missing, torn, changed or unlisted
│   ├── BundleTensorError        a tensor is missing, misshapen or not finite
│   ├── BaseModelMismatchError   made for another base model
│   ├── SubstrateMismatchError   made for another substrate
│   ├── BundleSourceError        at a place that bundles may not come from
│   └── BundleSignatureError     not signed with a trusted key, or changed since
├── DomainError
│   ├── DomainNameError          not `[a-z0-9-]{1,63}`
│   ├── DomainNotFoundError      no such active domain
│   ├── DomainConflictError      the name, or the bundle, is taken
│   └── NoFreeSlotError          every slot holds an expert
├── PromptError                  a text to trace that the model cannot read
├── AuditError                   the audit log cannot be written or read
│   └── AuditTamperedError       its chain is broken, or ends too early
├── RegistryError
│   ├── RegistryUnavailableError the registry or its store does not answer
│   ├── RegistrySchemaError      the database is of a newer version, or of something else
│   ├── RegistryMismatchError    it belongs to another base model, or has lost changes
│   ├── ChangeRequestError       a change that cannot be recorded as it was asked for
│   ├── EpochConflictError       the registry has moved on from the expected epoch
│   ├── IdempotencyConflictError the key came with another request before
│   └── OperationNotFoundError   no such operation
├── UnlearningRequestError
│   ├── RequestNotFoundError     no such unlearning request
│   ├── RequestConflictError     another one is in the way, or its state does not allow it
│   └── RequestsClosedError      this server takes none, or lacks what one needs
├── EvidenceError                evidence that is none, was changed, or is not signed
└── EngineError
    ├── CanaryError              a planted expert did not change the logits, or stayed
    └── SwitchError              a switch failed; the message says what is active now
"""

from __future__ import annotations

import re


class AlterError(Exception):
    """What went wrong, what was expected, what came, and what to do next."""

    def __init__(
        self,
        what: str,
        *,
        expected: str | None = None,
        got: str | None = None,
        fix: str | None = None,
    ) -> None:
        super().__init__(what)
        self.what = what
        self.expected = expected
        self.got = got
        self.fix = fix

    def __str__(self) -> str:
        parts = [self.what.rstrip(".")]
        if self.expected is not None:
            parts.append(f"expected {self.expected}")
        if self.got is not None:
            parts.append(f"got {self.got}")
        message = "; ".join(parts) + "."
        return message if self.fix is None else f"{message} {self.fix}"


class ConfigError(AlterError):
    """A setting is impossible, or contradicts another."""


class UnsupportedModelError(AlterError):
    """The base model has no place that ALTER knows how to attach to."""


class UnsupportedEngineError(AlterError):
    """An engine option would let tokens bypass the gate, or is not proven with it."""


class TrainingDataError(AlterError):
    """A training file is malformed, or forget and retain sets overlap."""


class TrainingError(AlterError):
    """Training cannot go on from here."""


class NothingToForgetError(TrainingError):
    """The base model does not seem to know the domain."""


class EvaluationError(AlterError):
    """A benchmark's rows or logs do not fit together."""


class JudgeError(EvaluationError):
    """The judge of answers cannot be asked, or gives no score."""


class BundleError(AlterError):
    """A bundle cannot be used."""


class BundleNotFoundError(BundleError):
    """There is no bundle at that place."""


class BundleFormatError(BundleError):
    """The manifest is of another kind, format or shape."""


class BundleTamperedError(BundleError):
    """A file of the bundle is missing, torn, changed or not listed."""


class BundleTensorError(BundleError):
    """A tensor is missing, misshapen, of the wrong dtype or not finite."""


class BaseModelMismatchError(BundleError):
    """The bundle was made for another base model."""


class SubstrateMismatchError(BundleError):
    """The expert was trained on another substrate."""


class BundleSourceError(BundleError):
    """Bundles may not come from that place."""


class BundleSignatureError(BundleError):
    """No trusted key has signed the bundle as it is."""


class DomainError(AlterError):
    """A forget domain cannot be changed as asked."""


class DomainNameError(DomainError):
    """The name does not match `[a-z0-9-]{1,63}`."""


class DomainNotFoundError(DomainError):
    """No active domain has that name."""


class DomainConflictError(DomainError):
    """The name, or the bundle, is already in use."""


class NoFreeSlotError(DomainError):
    """Every slot already holds an expert."""


class AuditError(AlterError):
    """The audit log cannot be written, or cannot be read."""


class AuditTamperedError(AuditError):
    """The audit log is not what was written: its chain is broken, or ends too early."""


class RegistryError(AlterError):
    """The registry cannot do what was asked of it."""


class RegistryUnavailableError(RegistryError):
    """The registry, or its bundle store, does not answer."""


class RegistrySchemaError(RegistryError):
    """The database is of a newer version of ALTER, or of something else."""


class RegistryMismatchError(RegistryError):
    """The registry belongs to another base model or substrate, or has lost changes."""


class ChangeRequestError(RegistryError):
    """A change cannot be recorded as it was asked for."""


class EpochConflictError(RegistryError):
    """The registry has moved on from the epoch that was expected."""


class IdempotencyConflictError(RegistryError):
    """The idempotency key came with another request before."""


class OperationNotFoundError(RegistryError):
    """No change has that operation id."""


class PromptError(AlterError):
    """A text or chat that the model cannot be given."""


class UnlearningRequestError(AlterError):
    """An unlearning request cannot be taken, or not go on."""


class RequestNotFoundError(UnlearningRequestError):
    """There is no such unlearning request."""


class RequestConflictError(UnlearningRequestError):
    """Another unlearning request is in the way, or this one's state does not allow what is asked."""


class RequestsClosedError(UnlearningRequestError):
    """This server takes no unlearning requests, or lacks what one needs."""


class EvidenceError(AlterError):
    """Evidence that is none of ALTER, was changed, or is not signed with a key that was given."""


class EngineError(AlterError):
    """The engine cannot do, or cannot prove, what was asked of it."""


class CanaryError(EngineError):
    """The planted expert did not change the logits, or did not go away."""


class SwitchError(EngineError):
    """A switch of experts failed. The message says what is active now."""


def problem_kind(error_class: type[AlterError]) -> str:
    """The name of an error outside of Python: `BundleTamperedError` -> `bundle-tampered`."""
    name = error_class.__name__.removesuffix("Error")
    return re.sub(r"(?<!^)(?=[A-Z])", "-", name).lower()
