"""What can go wrong for a client. Each error carries `code`, `status` and `facts`.

    SatherdError
    ├── Unreachable            no answer from the router, also after trying again
    ├── UnexpectedAnswer       an answer that is not as the contract says
    ├── PaymentRefused         this client declined to pay; no money has moved
    │   ├── FeeOverLimit       the fee or the invoice is above `max_fee_msat`
    │   ├── WrongInvoice       the invoice is not for the amount that was quoted
    │   ├── WrongQuote         the price is above what the public rules make of the request
    │   └── NoWallet           neither a key nor a wallet was given
    ├── WalletFailed           the wallet could not pay, or gave another invoice's preimage
    ├── NotQueued              the payment came too late; it stands on the account of the credential
    ├── JobNotDone             the job ended as failed, cancelled or expired; `facts["job"]` is it
    └── RouterRefused          the router said no; the class follows from the status
        ├── BadRequest         400, 404, 413, 422 and other 4xx
        ├── NotAllowed         401, 403
        ├── PaymentNeeded      402; `facts` may hold balance, fee, invoice
        ├── Conflict           409: an Idempotency-Key with another body, a job that has moved on
        ├── Gone               410: the quote has expired, or the answer was deleted
        ├── TooManyRequests    429; `retry_after_s`
        └── Unavailable        5xx

An error that is raised after a payment has `credential`: keep it, since it opens the job, its
answer, and the account on which change and refunds lie.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from client.credentials import Credential


class SatherdError(Exception):
    """Base of all errors of this package. `code` is stable; `status` is None for local errors."""

    code = "client_error"
    status: int | None = None
    credential: Credential | None = None

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        status: int | None = None,
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code or type(self).code
        self.status = status
        self.facts: dict[str, Any] = dict(facts or {})


class Unreachable(SatherdError):
    code = "unreachable"


class UnexpectedAnswer(SatherdError):
    code = "unexpected_answer"


class PaymentRefused(SatherdError):
    code = "payment_refused"


class FeeOverLimit(PaymentRefused):
    """`facts`: `needed_msat` and `max_fee_msat`."""

    code = "fee_over_limit"


class WrongInvoice(PaymentRefused):
    code = "wrong_invoice"


class WrongQuote(PaymentRefused):
    code = "wrong_quote"


class NoWallet(PaymentRefused):
    code = "no_wallet"


class WalletFailed(SatherdError):
    code = "wallet_failed"


class NotQueued(SatherdError):
    """`facts["credited_msat"]`, where the router says it, is on the account of `credential`."""

    code = "paid_late"


class JobNotDone(SatherdError):
    code = "job_not_done"


class RouterRefused(SatherdError):
    """`retry_after_s` is what the router asks to wait, None when it does not say."""

    code = "refused"
    retry_after_s: float | None = None


class BadRequest(RouterRefused):
    code = "bad_request"


class NotAllowed(RouterRefused):
    code = "not_allowed"


class PaymentNeeded(RouterRefused):
    code = "payment_required"


class Conflict(RouterRefused):
    code = "conflict"


class Gone(RouterRefused):
    code = "gone"


class TooManyRequests(RouterRefused):
    code = "too_many_requests"


class Unavailable(RouterRefused):
    code = "unavailable"


_BY_STATUS: dict[int, type[RouterRefused]] = {
    401: NotAllowed,
    402: PaymentNeeded,
    403: NotAllowed,
    409: Conflict,
    410: Gone,
    429: TooManyRequests,
}


def refusal(status: int, body: object, *, retry_after_s: float | None = None) -> RouterRefused:
    """The error for a status of 400 and above, with the code and facts of its body.

    Reads the shapes of our own doors and of OpenAI's (`{"error": {"code", "message", …}}`); a body
    of any other shape leaves the class's own code.
    """
    kind = _BY_STATUS.get(status, Unavailable if status >= 500 else BadRequest)
    error = body.get("error") if isinstance(body, Mapping) else None
    facts = dict(error) if isinstance(error, Mapping) else {}
    code = facts.pop("code", None)
    message = facts.pop("message", None)
    if isinstance(error, str):
        message = error
    refused = kind(
        message if isinstance(message, str) and message else f"the router answered {status}",
        code=code if isinstance(code, str) else None,
        status=status,
        facts=facts,
    )
    refused.retry_after_s = retry_after_s
    return refused
