"""L402: tokens that name an invoice, and are worth something once its preimage is shown.

    mint() ──> token ──> challenge()            what a 402 carries
    parse_authorization() ──> [Credential] ──> verify() ──> VerifiedToken ──> .admit() ──> Admission

`verify` proves that we made the token and that its holder knows the preimage. That is not yet
payment: several Lightning nodes show the preimage of an unpaid invoice, and every node on a route
learns it. So the caller looks up its own record of the settlement and calls `admit` with it; only
an `Admission` may be given anything. What a token has used up is the caller's record too.

A token is a macaroon v2 whose 66-byte identifier is: version 0, payment hash, token id. Its root
key is derived from a master secret and the identifier, so nothing secret is stored per token; to
revoke one, mark its record.

BadCredential reasons. A caller that has no record of a `forged` token's id says `unknown` instead:
its key may have been rotated away, and buying again helps.

    malformed, forged, wrong_preimage      a retry cannot help: 401, no challenge
    no credential at all (an empty list),
    unknown, revoked, expired, unpaid,
    wrong_service, insufficient            paying helps: 402, a fresh challenge (BUY_AGAIN)

Sources: L402 protocol-specification and macaroons documents, revision of March 2026, and what
aperture, lnget and Alby's client accept where those differ from the documents.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from billing import macaroon
from billing.errors import BadCredential
from billing.l402_caveats import RequestFacts, check_caveats

BUY_AGAIN = frozenset({"unknown", "revoked", "expired", "unpaid", "wrong_service", "insufficient"})

MAX_TOKENS = 4  # in one credential
MAX_CREDENTIALS = 4  # in all Authorization headers together
_LOCATION = b"l402"
_IDENTIFIER_VERSION = b"\x00\x00"
_IDENTIFIER_BYTES = 66
_MASTER_BYTES_MIN = 32
_TOKEN_TEXT_MAX = (macaroon.MAX_BYTES + 2) // 3 * 4

_HASH = re.compile(r"[0-9a-f]{64}")
_PREIMAGE = re.compile(r"[0-9a-fA-F]{64}")
_INVOICE = re.compile(r"[A-Za-z0-9]{1,8192}")
_BASE64 = re.compile(r"[A-Za-z0-9+/_-]+={0,2}")
_SCHEME = re.compile(r"\s*([!#$%&'*+.^_`|~A-Za-z0-9-]+)(?:\s+(.*))?", re.DOTALL)
# How far a failed attempt came: the error of the most promising token is the one to report.
_STAGES = ("malformed", "wrong_preimage", "forged")


@dataclass(frozen=True, slots=True)
class MasterSecrets:
    """The secret that new tokens are made with, and the one before it, still honoured."""

    current: bytes = field(repr=False)
    previous: bytes | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        for secret in (self.current, self.previous):
            if secret is not None and len(secret) < _MASTER_BYTES_MIN:
                raise ValueError(f"a master secret has at least {_MASTER_BYTES_MIN} bytes")


@dataclass(frozen=True, slots=True)
class Token:
    """A readable token. Its payment hash and token id (lower-case hex) are claims, not facts."""

    payment_hash: str
    token_id: str
    macaroon: macaroon.Macaroon = field(repr=False)


@dataclass(frozen=True, slots=True)
class Credential:
    """What one `L402 token[,token...]:preimage` holds; nothing in it is verified."""

    tokens: tuple[Token, ...]
    preimage: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Admission:
    """A paid token that this request keeps within. Made by `VerifiedToken.admit` alone."""

    payment_hash: str
    token_id: str


@dataclass(frozen=True, slots=True)
class VerifiedToken:
    """A token of ours, shown with its preimage. Not proof of payment: see `admit`."""

    payment_hash: str
    token_id: str
    caveats: tuple[bytes, ...] = field(repr=False)

    def admit(self, facts: RequestFacts, *, settled: bool) -> Admission:
        """`settled`: our own record says that the invoice with this payment hash was paid.

        Raises BadCredential: what `check_caveats` raises, or `unpaid`. With `unpaid` the caller
        looks the invoice up at the node once before it refuses.
        """
        check_caveats(self.caveats, facts)
        if not settled:
            raise BadCredential("unpaid")
        return Admission(self.payment_hash, self.token_id)


def mint(
    secrets: MasterSecrets, *, payment_hash: str, token_id: str, caveats: Iterable[str]
) -> str:
    """A new token in standard base64 with padding, the same one for the same arguments.

    `payment_hash` and `token_id` are 64 lower-case hex digits, the id random; `caveats` come from
    `write_caveats`. Raises ValueError for anything `parse_authorization` would not read back.
    """
    if not _HASH.fullmatch(payment_hash) or not _HASH.fullmatch(token_id):
        raise ValueError("payment hash and token id are 64 lower-case hex digits")
    identifier = _IDENTIFIER_VERSION + bytes.fromhex(payment_hash) + bytes.fromhex(token_id)
    conditions = tuple(caveat.encode() for caveat in caveats)
    signature = macaroon.sign(_root_key(secrets.current, identifier), identifier, conditions)
    token = macaroon.Macaroon(_LOCATION, identifier, conditions, signature)
    return base64.b64encode(macaroon.encode(token)).decode()


def challenge(token: str, invoice: str) -> str:
    """The value of the first WWW-Authenticate header of a 402; other schemes go in later headers.

    Exactly this order and spacing, and the token under its old and its new name: the one form
    that the specification allows and that aperture, lnget and Alby's client all read.
    """
    # A quote or a line break in either would let it write headers of its own.
    if not _BASE64.fullmatch(token) or not _INVOICE.fullmatch(invoice):
        raise ValueError("a token is base64 and an invoice is letters and digits")
    return f'L402 macaroon="{token}", invoice="{invoice}", version="0", token="{token}"'


def parse_authorization(values: Sequence[str]) -> list[Credential]:
    """The L402 credentials in all Authorization headers of a request, in order, without repeats.

    Schemes L402 and LSAT in any case; base64 standard or URL-safe, padded or not; other schemes
    may stand before or after, in headers of their own or joined by commas. An empty list: there
    is none. Raises BadCredential("malformed") when there are some and none can be read.
    """
    found: list[Credential] = []
    broken = False
    for text in _l402_texts(values):
        credential = _read_credential(text)
        if credential is None:
            broken = True
        elif credential not in found:
            found.append(credential)
        if len(found) == MAX_CREDENTIALS:
            break
    if broken and not found:
        raise BadCredential("malformed")
    return found


def verify(secrets: MasterSecrets, credentials: Iterable[Credential]) -> VerifiedToken:
    """The first token that is ours and whose payment hash the preimage opens.

    Raises BadCredential: `wrong_preimage`, or `forged` when we did not sign the token as it
    stands. Caveats and settlement come after this, in `VerifiedToken.admit`.
    """
    worst = 0
    for credential in credentials:
        payment_hash = hashlib.sha256(credential.preimage).digest()
        for token in credential.tokens:
            if not hmac.compare_digest(payment_hash, bytes.fromhex(token.payment_hash)):
                worst = max(worst, _STAGES.index("wrong_preimage"))
            elif not _signed_by_us(secrets, token.macaroon):
                worst = max(worst, _STAGES.index("forged"))
            else:
                return VerifiedToken(token.payment_hash, token.token_id, token.macaroon.caveats)
    raise BadCredential(_STAGES[worst])


def read_token(text: str) -> Token | None:
    """The token in `text`, base64 of either alphabet, padded or not; None if unreadable."""
    if len(text) > _TOKEN_TEXT_MAX or not _BASE64.fullmatch(text):
        return None
    digits = text.rstrip("=").replace("-", "+").replace("_", "/")
    try:
        read = macaroon.decode(base64.b64decode(digits + "=" * (-len(digits) % 4), validate=True))
    except (binascii.Error, macaroon.BadMacaroon):
        return None
    identifier = read.identifier
    if len(identifier) != _IDENTIFIER_BYTES or not identifier.startswith(_IDENTIFIER_VERSION):
        return None
    return Token(identifier[2:34].hex(), identifier[34:].hex(), read)


def _root_key(master: bytes, identifier: bytes) -> bytes:
    return hmac.digest(master, b"l402-root" + identifier, hashlib.sha256)


def _signed_by_us(secrets: MasterSecrets, shown: macaroon.Macaroon) -> bool:
    for master in (secrets.current, secrets.previous):
        if master is None:
            continue
        root_key = _root_key(master, shown.identifier)
        expected = macaroon.sign(root_key, shown.identifier, shown.caveats)
        if hmac.compare_digest(expected, shown.signature):
            return True
    return False


def _read_credential(text: str) -> Credential | None:
    """A `token[,token...]:preimage`. Tokens of other makers beside a readable one are let be."""
    names, colon, preimage = text.rpartition(":")
    texts = [name.strip() for name in names.split(",")]
    if not colon or len(texts) > MAX_TOKENS or not _PREIMAGE.fullmatch(preimage.strip()):
        return None
    tokens = tuple(token for token in map(read_token, texts) if token is not None)
    return Credential(tokens, bytes.fromhex(preimage.strip())) if tokens else None


def _l402_texts(values: Iterable[str]) -> Iterator[str]:
    """What follows each L402 or LSAT scheme name.

    The commas between tokens and those between schemes look alike: a piece belongs to the
    credential before it until that has its colon, or until the piece names a scheme itself.
    """
    for value in values:
        open_text: str | None = None
        for piece in _pieces(value):
            match = _SCHEME.fullmatch(piece)
            names_scheme = match is not None and match[2] is not None and bool(match[2].strip())
            if match is not None and match[1].upper() in ("L402", "LSAT"):
                if open_text is not None:
                    yield open_text
                open_text = match[2] or ""
            elif open_text is not None and not names_scheme:
                open_text += "," + piece
            elif open_text is not None:
                yield open_text
                open_text = None
            if open_text is not None and ":" in open_text:
                yield open_text
                open_text = None
        if open_text is not None:
            yield open_text


def _pieces(value: str) -> Iterator[str]:
    """Split at commas, except those inside the quoted strings of other schemes."""
    start, quoted, escaped = 0, False, False
    for at, character in enumerate(value):
        if escaped:
            escaped = False
        elif quoted and character == "\\":
            escaped = True
        elif character == '"':
            quoted = not quoted
        elif character == "," and not quoted:
            yield value[start:at]
            start = at + 1
    yield value[start:]
