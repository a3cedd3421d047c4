"""Bearer tokens of an OpenID Connect issuer, beside keys. The issuer's keys are a file: the service fetches nothing."""

import json
from dataclasses import dataclass

import jwt

from services.settings import OidcSettings
from services.store.roles import ROLES, Role

ALGORITHMS = ("RS256", "RS384", "RS512", "ES256", "ES384", "EdDSA")
"""Signatures only: a token signed with a shared secret, or not at all, is none."""


@dataclass(frozen=True)
class Bearer:
    """Whom a token is for."""

    owner: str
    role: Role


class Tokens:
    """Reads tokens of one issuer."""

    def __init__(self, settings: OidcSettings) -> None:
        """Raises ``ValueError`` where the file holds no keys."""
        self._settings = settings
        try:
            document = json.loads(settings.jwks_file.read_text(encoding="utf-8"))
            self._keys = jwt.PyJWKSet.from_dict(document)
        except (OSError, json.JSONDecodeError, jwt.PyJWTError) as error:
            raise ValueError(f"oidc.jwks_file {settings.jwks_file}: {error}") from error

    def read(self, token: str) -> Bearer | None:
        """Whom the token is for; None where it is not the issuer's, not for us, or has run out."""
        try:
            kid = jwt.get_unverified_header(token).get("kid")
            key = next((key for key in self._keys.keys if kid is None or key.key_id == kid), None)
            if key is None:
                return None
            claims = jwt.decode(
                token,
                key.key,
                algorithms=list(ALGORITHMS),
                audience=self._settings.audience,
                issuer=self._settings.issuer,
                options={"require": ["exp", "iss", "aud", self._settings.owner_claim]},
                leeway=30,
            )
        except jwt.PyJWTError:
            return None
        wanted = str(claims.get(self._settings.role_claim, ROLES[0]))
        role = next((name for name in ROLES if name == wanted), ROLES[0])
        # The issuer's people and the owners of keys are kept apart, whatever they are called.
        return Bearer(f"oidc:{claims[self._settings.owner_claim]}"[:200], role)
