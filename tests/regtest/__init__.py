"""A real Lightning network on this machine, for tests: real invoices, HTLCs, routes and preimages.

    chain      bcoin on regtest, in memory (npm)                        chain.js
    electrumx  an Electrum server before it (PyPI)
    client ── router ── hop ── worker      Debian's Electrum 4.3.4      electrum_node.py
                                 └── a foreign LNURL-pay server (npm)   lnurl_server.js

    programs   installs what is missing, into the ignored folder .cache/regtest
    network    starts, kills and stops it; `LightningNetwork` is what tests talk to
    rpc        one JSON-RPC call

It takes some 5 s to start. One runs in a test session: tests that use it are marked with `regtest`,
which puts them into one group of pytest-xdist. Worth knowing of Electrum 4.3.4:

- It pays an invoice of 1 or 2 msat never, and is deaf from then on.
- As a payee it takes a second payment of an invoice that is paid already: that nothing is paid
  twice is never the payee's doing here.
- After a hop has failed it avoids that channel for an hour: `Node.forgive`.
- It enforces no fee limit, and `lnpay` returns only when the HTLC has ended.
- It writes its whole wallet file several times a payment, and slows down as that grows.
"""

from __future__ import annotations

import pytest

# Installing takes half a minute, the first time.
regtest = [pytest.mark.xdist_group("lightning network"), pytest.mark.timeout(400)]
