"""What can go wrong with money. Facts only: front doors turn them into words and statuses.

BillingError
├── InsufficientFunds      a liability account would go below zero
├── UnknownAccount         no such payer
├── BadCredential          a credential that is malformed, forged, revoked or foreign
├── BadLightningAddress    an `ln_url` that cannot be used, with one of a few fixed codes
├── BadInvoice             a BOLT11 invoice that we refuse to pay or to show
├── BadAmount              an amount outside what is allowed
├── OutsideHttpError       a stranger's server gave no usable answer (see `billing.outside_http`)
└── BackendError           the Lightning node (see `billing.lightning`)
"""

from __future__ import annotations


class BillingError(Exception):
    """Base of all errors of this package. `code` is stable and safe to show to anyone."""

    code = "billing_error"


class InsufficientFunds(BillingError):
    """`account` holds `balance_msat`, and `needed_msat` were asked of it. Nothing was moved."""

    code = "insufficient_funds"

    def __init__(self, account: str, needed_msat: int, balance_msat: int) -> None:
        super().__init__(f"{account} holds {balance_msat} msat, {needed_msat} msat were needed")
        self.account = account
        self.needed_msat = needed_msat
        self.balance_msat = balance_msat


class UnknownAccount(BillingError):
    code = "unknown_account"


class BadCredential(BillingError):
    """`reason` is a fixed word: malformed, forged, wrong_preimage, unknown, revoked, expired, unpaid,
    wrong_service, insufficient. `billing.l402` says which of them paying again would cure.
    """

    code = "bad_credential"

    def __init__(self, reason: str) -> None:
        super().__init__(f"credential refused: {reason}")
        self.reason = reason


class BadLightningAddress(BillingError):
    """`code` is one of the fixed codes of `billing.lightning_address`."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class BadInvoice(BillingError):
    code = "bad_invoice"


class BadAmount(BillingError):
    code = "bad_amount"
