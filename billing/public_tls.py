"""TLS that trusts the public authorities, read once for the whole process.

A certificate store takes some 30 ms of CPU to read, in which a router's event loop stands still.
"""

from __future__ import annotations

import functools
import ssl

import httpx


@functools.cache
def public_tls() -> ssl.SSLContext:
    """One context for all who connect to names of others; whoever wants to change it makes his own."""
    return httpx.create_ssl_context(trust_env=False)
