"""From settings to a Lightning node: `connect(name="simulated", url=...)`.

A back end is imported only when it is asked for, so that its dependencies are needed only by those
who use it.
"""

from __future__ import annotations

from importlib import import_module

from billing.errors import BillingError
from billing.lightning import LightningBackend

# Each module has `from_settings(**settings) -> LightningBackend`.
BACKENDS = {
    "simulated": "billing.lightning.simulated.backend",
    "lnd": "billing.lightning.lnd",
    "cln": "billing.lightning.cln",
    "phoenixd": "billing.lightning.phoenixd",
    "lnbits": "billing.lightning.lnbits",
    "nwc": "billing.lightning.nwc",
    "electrum": "billing.lightning.electrum",
}


class UnknownBackend(BillingError):
    """The settings name a back end that there is not."""

    code = "unknown_lightning_backend"

    def __init__(self, name: str) -> None:
        super().__init__(
            f"there is no Lightning back end {name!r}; there is: {', '.join(sorted(BACKENDS))}"
        )


def connect(name: str, **settings: str | None) -> LightningBackend:
    """The back end of that name. Nothing is sent yet: `node_info` is the first question to ask.

    `settings` are the back end's own (`url` for all of them). Raises UnknownBackend, and ValueError
    in words for the operator when a setting is missing or contradicts the back end.
    """
    module_name = BACKENDS.get(name)
    if module_name is None:
        raise UnknownBackend(name)
    backend: LightningBackend = import_module(module_name).from_settings(**settings)
    return backend
