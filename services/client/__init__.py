"""The Python client of the REST API, in two forms that do the same.

>>> from services.client import Client
>>> with Client("http://127.0.0.1:8700") as client:
...     job = client.submit(spec)
...     client.wait(job.id).state
"""

from services.client.asynchronous import AsyncClient
from services.client.calls import ServiceError, ServiceUnreachable
from services.client.synchronous import Client

__all__ = ["AsyncClient", "Client", "ServiceError", "ServiceUnreachable"]
