"""Bearer tokens: one line of a private file for each, `TENANT TOKEN`; several may name a tenant."""

from __future__ import annotations

import hashlib
import hmac
import re
import stat
from pathlib import Path

from fhe_fx.errors import OptionsError

__all__ = ["ANYONE", "Tokens"]

ANYONE = "local"
"""The tenant of every request where there are no tokens."""
MIN_LENGTH = 20
_TENANT = re.compile(r"[a-z0-9][a-z0-9_-]{0,31}")


class Tokens:
    """Knows the tenant of a token; keeps hashes only."""

    def __init__(self, tenants: dict[bytes, str] | None) -> None:
        """Take tenants by the sha256 of their tokens; None lets anyone in."""
        self._tenants = tenants

    @staticmethod
    def read(path: Path) -> Tokens:
        """Read a token file.

        Raises:
            OptionsError: names the line that is malformed, or the mode that lets others read it.
        """
        try:
            mode, lines = path.stat().st_mode, path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise OptionsError(f"The token file {path} cannot be read: {error}.") from error
        if stat.S_IMODE(mode) & 0o077:
            raise OptionsError(
                f"{path} holds tokens and others can read it (mode {stat.S_IMODE(mode):04o}). "
                f"Run: chmod 600 {path}"
            )
        found: dict[bytes, str] = {}
        for number, line in enumerate(lines, 1):
            if not (fields := line.split()) or line.startswith("#"):
                continue
            if len(fields) != 2 or not _TENANT.fullmatch(fields[0]):
                raise OptionsError(
                    f"{path}, line {number}: write TENANT TOKEN; a tenant has at most 32 of a-z, "
                    f"0-9, _ and -."
                )
            if len(fields[1]) < MIN_LENGTH:
                raise OptionsError(
                    f"{path}, line {number}: a token has at least {MIN_LENGTH} characters. Make "
                    f"one with: python -c 'import secrets; print(secrets.token_urlsafe(32))'"
                )
            digest = _digest(fields[1])
            if found.get(digest, fields[0]) != fields[0]:
                raise OptionsError(f"{path}, line {number}: this token has two tenants.")
            found[digest] = fields[0]
        if not found:
            raise OptionsError(f"{path} holds no token, so nobody could enter.")
        return Tokens(found)

    def tenant(self, authorization: str) -> str | None:
        """Return the tenant of an Authorization header, or None if it opens nothing."""
        if self._tenants is None:
            return ANYONE
        scheme, _, token = authorization.partition(" ")
        given = _digest(token.strip())
        tenant = None
        for digest, name in self._tenants.items():  # all of them, in the same time
            if hmac.compare_digest(digest, given):
                tenant = name
        return tenant if scheme.lower() == "bearer" else None


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()
