"""Who asks, and what they may: keys, tokens, and this machine alone where there are no keys."""

import base64
import binascii
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import urlsplit

from fastapi import Request

from services.api.context import Service, service_of
from services.api.problems import Refusal
from services.settings import LOOPBACK
from services.store.jobs import Account, account_of
from services.store.roles import ROLES, Role

LOCAL_OWNER = "local"
PRIORITIES = range(-10, 11)


@dataclass(frozen=True)
class Principal:
    """Somebody who was let in."""

    account: Account
    role: Role
    highest_priority: int
    local: bool = False
    """Nobody needs a key here: whoever asks is on this machine."""

    @property
    def sees(self) -> str | None:
        """Whose jobs this one may see; None: everybody's."""
        return None if self.role == "admin" else self.account.owner


def allowed(role: Role) -> Callable[[Request], Principal]:
    """A dependency that lets in whoever has at least this role."""

    def dependency(request: Request) -> Principal:
        principal = identify(request)
        if ROLES.index(principal.role) < ROLES.index(role):
            raise Refusal(403, f"this needs the role {role}, and the key has {principal.role}")
        return principal

    return dependency


def identify(request: Request, page: bool = False) -> Principal:
    """Who asks. ``page``: a browser is to ask its user for the key. Raises :class:`Refusal`.

    A browser sends a key as a password, and does so by itself, also for what another site makes it ask for. So that
    opens what can be read, and never what changes something.
    """
    service = service_of(request)
    scheme, _, credentials = request.headers.get("authorization", "").partition(" ")
    token = credentials.strip() if scheme.lower() == "bearer" else None
    if scheme.lower() == "basic" and request.method in ("GET", "HEAD"):
        token = _password(credentials)
    if token is not None:
        return _known(service, token, page)
    if scheme or service.keys.any() or service.settings.oidc:
        raise _unauthorized("a key is needed: Authorization: Bearer KEY", page)
    _refuse_strangers(request, service)
    limits = service.settings.limits
    account = Account(LOCAL_OWNER, None, limits.running_jobs, limits.queued_jobs, limits.device_hours_per_month)
    return Principal(account, "admin", PRIORITIES[-1], local=True)


def _known(service: Service, token: str, page: bool) -> Principal:
    row = service.keys.find(token)
    if row is not None:
        role = next((name for name in ROLES if name == row.role), ROLES[0])
        return Principal(_limited(account_of(row), service), role, row.highest_priority)
    bearer = service.tokens.read(token) if service.tokens else None
    if bearer is not None:
        return Principal(_limited(Account(bearer.owner), service), bearer.role, 0)
    raise _unauthorized("the key is unknown, has expired or was revoked", page)


def _limited(account: Account, service: Service) -> Account:
    """The service's limits where the key sets none of its own."""
    limits = service.settings.limits
    return Account(
        account.owner,
        account.key_id,
        account.running_jobs or limits.running_jobs,
        account.queued_jobs or limits.queued_jobs,
        account.device_hours_per_month or limits.device_hours_per_month,
    )


def _unauthorized(detail: str, page: bool) -> Refusal:
    challenge = 'Basic realm="espalier, the key as the password"' if page else 'Bearer realm="espalier"'
    return Refusal(401, detail, headers={"WWW-Authenticate": challenge})


def _password(credentials: str) -> str:
    try:
        return base64.b64decode(credentials, validate=True).decode("utf-8").partition(":")[2]
    except (binascii.Error, UnicodeDecodeError):
        return ""


def _refuse_strangers(request: Request, service: Service) -> None:
    """Without keys only this machine is served, and no page of another site through a browser on it.

    A name that an attacker lets point to this machine shows in ``Host``, another site's page in ``Origin``, and a proxy
    in front of the service, which would make the whole world local, in what it adds.
    """
    host = urlsplit(f"//{request.headers.get('host', '')}").hostname or ""
    names = {*LOOPBACK, *service.settings.allowed_hosts}
    origin = request.headers.get("origin")
    foreign = origin is not None and (urlsplit(origin).hostname or "") not in names
    forwarded = any(name in request.headers for name in ("forwarded", "x-forwarded-for", "x-forwarded-host"))
    if not service.settings.loopback or host not in names or foreign or forwarded:
        raise Refusal(403, "without keys only this machine is served: create one with espalier keys create")
