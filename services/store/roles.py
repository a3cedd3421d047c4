"""What the holder of a key may do. Imports nothing heavy."""

from typing import Literal, get_args

Role = Literal["reader", "submitter", "admin"]
ROLES: tuple[Role, ...] = get_args(Role)
