"""What a misspelt name was probably meant to be. Torch-free."""

from collections.abc import Iterable
from difflib import get_close_matches


def remedy(name: object, known: Iterable[str]) -> str:
    """A hint that names the nearest of ``known``, or all of them where none is near.

    >>> remedy("lyaers", ["layers", "hidden"])
    "did you mean 'layers'?"
    """
    names = sorted(known)
    near = get_close_matches(str(name), names, n=1, cutoff=0.6)
    return f"did you mean {near[0]!r}?" if near else f"available: {', '.join(names)}"
