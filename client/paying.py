"""Paying an invoice: what is checked before the wallet is asked, and what comes of it. Once, ever.

A limit on the fee is compared with the fee; an invoice may exceed it by what rounding to whole
satoshis adds, which stays on the payer's account.
"""

from __future__ import annotations

from client.answers import Invoice
from client.challenge import invoice_amount_msat, is_preimage_of, parse_challenge
from client.credentials import L402, ClaimToken, Credential
from client.errors import FeeOverLimit, SatherdError, WalletFailed, WrongInvoice
from client.exchange import Answer, Flow, Patience, Pay, Request, Wait, send
from client.pricing import invoice_amount_msat as whole_satoshis_msat


def check_invoice(
    invoice: str, *, amount_msat: int, quoted_msat: int | None, max_fee_msat: int | None
) -> None:
    """Refuse an invoice whose amount is not the one named, quoted (in whole satoshis) and allowed.

    `quoted_msat` None: nothing was quoted, as for a top-up. Raises WrongInvoice, FeeOverLimit.
    """
    try:
        written_msat = invoice_amount_msat(invoice)
    except ValueError as error:
        raise WrongInvoice(str(error)) from error
    if written_msat != amount_msat:
        raise WrongInvoice(
            f"the invoice is over {written_msat} msat, the router named {amount_msat} msat",
            facts={"invoice_msat": written_msat, "named_msat": amount_msat},
        )
    if quoted_msat is not None and amount_msat > whole_satoshis_msat(quoted_msat):
        raise WrongInvoice(
            f"the invoice is over {amount_msat} msat, the quote {quoted_msat} msat",
            facts={"invoice_msat": amount_msat, "quoted_msat": quoted_msat},
        )
    if max_fee_msat is not None and amount_msat > whole_satoshis_msat(max_fee_msat):
        raise FeeOverLimit(
            f"the invoice is over {amount_msat} msat, the limit {max_fee_msat} msat",
            facts={"needed_msat": amount_msat, "max_fee_msat": max_fee_msat},
        )


def pay_invoice(invoice: Invoice) -> Flow[Credential]:
    """Have the wallet pay, once, and make the credential of the payment.

    Raises WalletFailed for a preimage that is not the invoice's, and when the wallet hides the
    preimage and the router gave no claim token.
    """
    preimage = yield Pay(invoice.invoice, invoice.amount_msat)
    if preimage:
        if not is_preimage_of(preimage, invoice.payment_hash):
            raise WalletFailed("the wallet's preimage does not belong to the invoice")
        return L402(invoice.l402_token, preimage.lower())
    if invoice.claim_token is None:
        raise WalletFailed("the wallet gave no preimage, and the router no claim token")
    return ClaimToken(invoice.claim_token)


def paid_request(
    request: Request,
    *,
    max_fee_msat: int | None,
    credential: Credential | None,
    has_wallet: bool,
    patience: Patience,
) -> Flow[tuple[Answer, Credential | None]]:
    """Any request to a paid endpoint: on a 402 pay its invoice, then repeat with the credential.

    Returns the answer, never one of status 400 and above, and the credential that paid.
    """
    own = credential.headers() if credential else {}
    sent = Request(request.method, request.path, request.body, {**request.headers, **own})
    answer = yield from send(sent, patience=patience, repeatable="Idempotency-Key" in sent.headers)
    if answer.status < 400:
        return answer, credential
    refused = answer.refusal()
    challenge = parse_challenge(answer.challenges, refused.facts)
    if answer.status != 402 or challenge is None or not has_wallet:
        raise refused
    amount_msat = _written_amount_msat(challenge.invoice)
    check_invoice(
        challenge.invoice, amount_msat=amount_msat, quoted_msat=None, max_fee_msat=max_fee_msat
    )
    preimage = yield Pay(challenge.invoice, amount_msat)
    if not preimage and not challenge.claim_token:
        raise WalletFailed("the wallet gave no preimage, and the router no claim token")
    paid: Credential = (
        L402(challenge.token, preimage) if preimage else ClaimToken(challenge.claim_token or "")
    )
    repeated = Request(
        request.method, request.path, request.body, {**request.headers, **paid.headers()}
    )
    try:
        answer = yield from _repeat_paid(repeated, patience)
    except SatherdError as error:
        error.credential = paid
        raise
    return answer, paid


def _repeat_paid(request: Request, patience: Patience) -> Flow[Answer]:
    """The paid request, again while the router has not yet seen the settlement (402).

    The same credential and request are the same job, however often, so repeating costs nothing.
    """
    failures = 0
    while True:
        answer = yield from send(request, patience=patience, repeatable=True)
        failures += 1
        if answer.status < 400:
            return answer
        if answer.status != 402 or failures >= patience.attempts:
            raise answer.refusal()
        yield Wait(patience.delay_s(failures))


def _written_amount_msat(invoice: str) -> int:
    try:
        amount_msat = invoice_amount_msat(invoice)
    except ValueError as error:
        raise WrongInvoice(str(error)) from error
    if amount_msat is None:
        raise WrongInvoice("the invoice names no amount")
    return amount_msat
