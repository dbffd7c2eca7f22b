"""From an `ln_url` to an invoice for an amount: LNURL-pay, behind the filter of `outside_http`.

    parse_ln_url(text) ─> Payee ─> resolve() ─> PayTerms ─> request_invoice() ─> RequestedInvoice
       pure, ln_url.py              one GET, redirects         one GET, none

All of it is repeatable as long as nothing was paid: an invoice that is not used costs nothing.
Everything that goes wrong is a BadLightningAddress with one of these codes and a fixed sentence:

    not_understood        none of the forms we accept                      parse
    bad_address           the user or domain of a Lightning address        parse
    bad_lnurl             a mistyped `lnurl1...`                           parse
    bad_url               user info, fragment, port, literal, no https     parse; redirect, callback
    not_a_payment         an LNURL to log in, withdraw, open a channel     parse, resolve
    unreachable           unknown name, forbidden address, no connection,  resolve, request
                          time-out, TLS, a 5xx without JSON: one code
    busy                  too many requests to that host at once           resolve, request
    too_many_lookups      this stranger has asked often enough             resolve
    bad_answer            not JSON, too long, or not as LUD-06 says        resolve, request
    payee_error           the server says ERROR (PayeeError, `.reason`)    resolve, request
    payer_data_required   it insists on knowing who pays                   resolve
    amount_out_of_range   not a payable amount: see `payable_msat`         request
    invoice_unreadable    no valid BOLT 11 invoice                         request
    invoice_network       for another network                              request
    invoice_amount        for another amount, or any                       request
    invoice_expiry        less than 60 seconds left                        request
    invoice_unpayable     no payment secret, or locks money for a week     request
    invoice_ours          made by our own node                             request
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

from billing.errors import BadLightningAddress
from billing.ln_url import Payee, parse_ln_url
from billing.lnurl_pay import (
    PayeeError,
    PayTerms,
    RequestedInvoice,
    payable_msat,
    read_invoice,
    read_json,
    read_terms,
)
from billing.lookup_memory import RecentCalls, RecentFailures
from billing.outside_http import OutsideHttp, OutsideHttpError
from billing.outside_url import OutsideUrl

__all__ = [
    "LightningAddresses",
    "PayTerms",
    "Payee",
    "PayeeError",
    "RequestedInvoice",
    "parse_ln_url",
    "payable_msat",
]

_log = logging.getLogger(__name__)

REDIRECTS_MAX = 2  # apex to www is common; more is somebody playing
LOOKUPS_PER_MINUTE = 30
FAILURE_KEPT_S = 300.0
UNREACHABLE_KEPT_S = 10.0  # it may be starting
_TEST_NETWORKS = frozenset({"testnet", "signet", "simnet", "regtest"})
_NOT_THE_PAYEES_FAULT = frozenset({"busy", "too_many_lookups"})


class LightningAddresses:
    """Asks payees for their terms and for invoices. One per process: it counts and remembers.

    `network` is our node's, `own_pubkey` its key if its own invoices are to be refused.
    ValueError: private addresses are allowed, and the network is not one of those for tests.
    """

    def __init__(
        self,
        http: OutsideHttp,
        *,
        network: str,
        own_pubkey: str | None = None,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if http.rules.allow_private and network not in _TEST_NETWORKS:
            raise ValueError("private addresses may not be allowed on a network with real money")
        self._http = http
        self._network = network
        self._own_pubkey = own_pubkey
        self._now = now
        self._lookups = RecentCalls(most=LOOKUPS_PER_MINUTE, window_s=60.0, clock=clock)
        self._failures: RecentFailures[BadLightningAddress] = RecentFailures(clock=clock)

    def parse(self, text: str) -> Payee | None:
        """`parse_ln_url` by this router's rules."""
        rules = self._http.rules
        return parse_ln_url(
            text, allow_private=rules.allow_private, allow_high_ports=rules.allow_high_ports
        )

    async def resolve(self, payee: Payee, *, on_behalf_of: str | None = None) -> PayTerms:
        """Ask the payee's server for its terms. Raises BadLightningAddress.

        `on_behalf_of` names the stranger who wants to know (a worker key's id, a client's address):
        he gets 30 look-ups a minute, and for 5 minutes the same failure again without a request,
        for 10 seconds if the server could not be reached.
        None is the router on its own account, whose retries have a schedule of their own.
        """
        key = str(payee.url)
        if on_behalf_of is not None:
            if not self._lookups.admit(on_behalf_of):
                raise BadLightningAddress("too_many_lookups", "too many look-ups, try again later")
            failure = self._failures.get(key)
            if failure is not None:
                raise _again(failure)
        try:
            found = await self._get(payee.url, redirects=REDIRECTS_MAX)
            terms = read_terms(payee, found, self._http.rules)
        except BadLightningAddress as error:
            if error.code not in _NOT_THE_PAYEES_FAULT:
                passing = error.code == "unreachable"
                keep_s = UNREACHABLE_KEPT_S if passing else FAILURE_KEPT_S
                self._failures.remember(key, _again(error), keep_s=keep_s)
            raise
        self._failures.forget(key)
        if terms.callback.host != payee.url.host:
            _log.info("payee at %s has its callback at %s", payee.url.host, terms.callback.host)
        return terms

    async def request_invoice(
        self, terms: PayTerms, amount_msat: int, *, comment: str = ""
    ) -> RequestedInvoice:
        """Have an invoice made for exactly `amount_msat`, a whole number of satoshis.

        `comment`, if the payee takes one of that length, is shown to him by his wallet: an id of
        ours, never a user's text. Raises BadLightningAddress. The caller must still refuse a
        payment hash that any earlier attempt had.
        """
        if amount_msat <= 0 or payable_msat(terms, amount_msat) != amount_msat:
            raise BadLightningAddress("amount_out_of_range", "the payee does not take this amount")
        parameters = {"amount": str(amount_msat)}
        if comment and len(comment) <= terms.comment_max_length:
            parameters["comment"] = comment
        found = await self._get(terms.callback, parameters)
        return read_invoice(
            terms,
            found,
            amount_msat=amount_msat,
            network=self._network,
            now=self._now(),
            own_pubkey=self._own_pubkey,
        )

    async def _get(
        self, url: OutsideUrl, parameters: Mapping[str, str] | None = None, *, redirects: int = 0
    ) -> dict[str, Any]:
        asked = url.with_query(parameters) if parameters else url
        try:
            answer = await self._http.fetch(asked, redirects=redirects)
        except OutsideHttpError as error:
            raise BadLightningAddress(error.code, str(error)) from None
        return read_json(answer)


def _again(error: BadLightningAddress) -> BadLightningAddress:
    """The same failure to be raised anew: an exception raised twice would gather tracebacks."""
    if isinstance(error, PayeeError):
        return PayeeError(error.reason)
    return BadLightningAddress(error.code, str(error))
