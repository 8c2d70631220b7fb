"""The errors of fhe_fx: each says what was wrong, where, the numbers, and what to try."""

from __future__ import annotations

__all__ = [
    "ArtifactError",
    "BackendError",
    "BitWidthError",
    "CalibrationError",
    "CaptureError",
    "FheFxError",
    "InputError",
    "InvariantError",
    "OptionsError",
    "PassError",
    "RemoteError",
    "TargetError",
    "UnsupportedOpError",
    "WireError",
    "did_you_mean",
]


class FheFxError(Exception):
    """Root of every error that fhe_fx raises on purpose."""


class OptionsError(FheFxError, ValueError):
    """An option is outside its domain."""


class TargetError(FheFxError, LookupError):
    """The part of the model to encrypt does not exist, or is ambiguous."""


class CaptureError(FheFxError):
    """The model could not be captured as one graph, or the target is not one region of it."""


class UnsupportedOpError(FheFxError):
    """Operators inside the encrypted region have no lowering; all of them are listed."""


class CalibrationError(FheFxError, ValueError):
    """Calibration inputs are missing, malformed, or not finite."""


class InvariantError(FheFxError):
    """A graph breaks a rule of the dialect it claims to be in."""


class PassError(FheFxError):
    """A pass failed, or a pipeline is ordered so that a pass misses what it requires."""


class BitWidthError(FheFxError):
    """A circuit needs wider look-ups or accumulators than the backend can give."""


class BackendError(FheFxError):
    """A backend refused a program or failed while running it."""


class InputError(FheFxError, ValueError):
    """A call of a compiled part does not fit what was compiled."""


class ArtifactError(FheFxError):
    """A saved circuit is truncated, altered, or of another version."""


class RemoteError(FheFxError):
    """A server cannot be reached, refuses a request, or serves another circuit."""


class WireError(FheFxError):
    """Bytes from the other party are malformed, or do not fit the circuit."""


def did_you_mean(name: str, known: list[str], limit: int = 3) -> str:
    """Return a sentence that names the closest of `known`, or an empty string.

    Args:
        name: what the user wrote.
        known: what would have been accepted.
        limit: at most this many suggestions.
    """
    import difflib

    near = difflib.get_close_matches(name, known, n=limit, cutoff=0.5)
    return f" Did you mean {' or '.join(repr(n) for n in near)}?" if near else ""
