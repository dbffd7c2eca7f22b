"""The simulated Lightning network: no real money, on any account.

    store       SQLite behind one thread, many acts to a commit
    wallets     the nodes `router` and `payer`, and a wallet per Lightning address
    invoices    signed BOLT 11 on regtest, and their settlement
    payments    from an HTLC's departure to its end
    faults      what is to go wrong, for whom, how often
    network   ★ all of it as one object, in process
    lnurl_pay   the Lightning addresses of its wallets (LUD-06, LUD-16)
    server      the network over HTTP, for several processes
    arguments   what strangers may ask of it, checked
    serving     runs the server in an event loop
    transport   in process or HTTP, the one seam between the two
    backend   ★ SimulatedBackend: a wallet of it as a `LightningBackend`

`python -m billing.lightning.simulated` serves one.
"""
