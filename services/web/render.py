"""Templates and inline scripts: everything is escaped, and a policy lets only these very scripts run."""

import base64
import hashlib
import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Page:
    """A page, and the Content-Security-Policy that it is sent with."""

    html: str
    policy: str


def render(template: str, scripts: tuple[str, ...] = (), **values: Any) -> Page:
    """A template of this folder, with scripts of this folder inlined as ``scripts``."""
    sources = [script_source(name) for name in scripts]
    html = _environment().get_template(template).render(scripts=[Markup(source) for source in sources], **values)
    hashes = " ".join(f"'sha256-{_hash(source)}'" for source in sources) or "'none'"
    policy = (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src 'self' data:; "
        "connect-src 'self'; form-action 'none'; frame-ancestors 'none'; base-uri 'none'"
    )
    return Page(html, policy)


@lru_cache
def script_source(name: str) -> str:
    """A script as it stands between its tags."""
    return (FOLDER / "scripts" / name).read_text(encoding="utf-8")


def embedded(document: Any) -> Markup:
    """JSON between script tags: nothing in it can end them."""
    text = json.dumps(document, allow_nan=False)
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return Markup(text)


@lru_cache
def _environment() -> Environment:
    found = Environment(
        loader=FileSystemLoader(FOLDER / "templates"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    found.filters["embedded"] = embedded
    return found


def _hash(source: str) -> str:
    return base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()
