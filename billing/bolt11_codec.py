"""BOLT 11 invoices: the one module that signs and decodes them. Pure but for the elliptic curve.

An invoice is bech32 without the 90-character limit: a human-readable part with network and amount,
then, five bits to a character, a timestamp, tagged fields, and a signature over all of it.

    lnbcrt 2500u 1 pvjluez  pp5qqq…      dq5xysx…        …104 characters…  fj9srp
    prefix amount   time    field p, 52   field d, 20      signature         checksum

The `bolt11` package does the same in 2.5 ms to sign and 4.9 ms to decode; every paid prompt needs
both, so this is done here with whole-string operations (translate, base-32 integers) in a tenth of
the time. The tests hold the two against each other and against the vectors of the specification.
"""

from __future__ import annotations

import base64
import re
from dataclasses import dataclass
from datetime import UTC, datetime

from coincurve import PrivateKey, PublicKey
from coincurve.ecdsa import cdata_to_der, deserialize_compact

from billing.errors import BadInvoice

# The most that fits a QR code, and where LND stops reading too.
MAX_LENGTH = 7089
DESCRIPTION_MAX_BYTES = 639
MAX_AMOUNT_MSAT = 21_000_000 * 100_000_000_000
DEFAULT_EXPIRY_S = 3600
DEFAULT_MIN_FINAL_CLTV = 18

NETWORK_OF_PREFIX = {
    "bc": "mainnet",
    "tb": "testnet",
    "tbs": "signet",
    "sb": "simnet",
    "bcrt": "regtest",
}

_CHARSET = b"qpzry9x8gf2tvdw0s3jn54khce6mua7l"
_BASE32_DIGITS = b"0123456789abcdefghijklmnopqrstuv"  # what int(…, 32) reads
_RFC4648 = b"ABCDEFGHIJKLMNOPQRSTUVWXYZ234567"  # what base64.b32encode writes
_GROUPS = bytes(range(32))
_CHAR_TO_GROUP = bytes(_CHARSET.index(char) if char in _CHARSET else 255 for char in range(256))
_GROUP_TO_CHAR = bytes.maketrans(_GROUPS, _CHARSET)
_GROUP_TO_DIGIT = bytes.maketrans(_GROUPS, _BASE32_DIGITS)
_RFC4648_TO_GROUP = bytes.maketrans(_RFC4648, _GROUPS)

_HUMAN_READABLE = re.compile(r"ln(bcrt|bc|tbs|tb|sb)(?:([1-9][0-9]{0,18})([munp]?))?")
_MSAT_OF_MULTIPLIER = {"": 100_000_000_000, "m": 100_000_000, "u": 100_000, "n": 100}

_TIMESTAMP_GROUPS = 7
_SIGNATURE_GROUPS = 104
_CHECKSUM_GROUPS = 6
_HASH_GROUPS = 52  # 256 bits
_PUBKEY_GROUPS = 53  # 264 bits
# Beyond 35 bits no timestamp can be written, and dates stay within what `datetime` knows.
_MAX_EXPIRY_S = 2**35 - 1

_FIELD_P, _FIELD_D, _FIELD_N, _FIELD_H, _FIELD_S = 1, 13, 19, 23, 16
_FIELD_X, _FIELD_C, _FIELD_FEATURES = 6, 24, 5

_VAR_ONION, _PAYMENT_SECRET, _BASIC_MPP_OPTIONAL = 8, 14, 17
# BOLT 9: var_onion, payment_secret, basic_mpp, route_blinding, amp, attribution, payment_metadata.
_KNOWN_REQUIRED_FEATURES = sum(1 << bit for bit in (8, 14, 16, 24, 30, 36, 48))


@dataclass(frozen=True, slots=True)
class DecodedInvoice:
    """What an invoice says, its checksum and signature verified.

    Hashes and the key are lower-case hex. `amount_msat` None: the payer chooses. `payee_pubkey` is
    the field `n`, or recovered from the signature. A description may be anything a stranger wrote.
    """

    prefix: str
    network: str
    payment_hash: str
    amount_msat: int | None
    created_at: datetime
    expiry_s: int
    expires_at: datetime
    description: str | None
    description_hash: str | None
    payee_pubkey: str
    has_payment_secret: bool
    min_final_cltv: int


def decode(text: str) -> DecodedInvoice:
    """Read an invoice from anybody. Raises BadInvoice, and nothing else, on whatever is wrong.

    Expired invoices and those of other networks are decoded: only the caller knows its clock and
    its network. `text` is the bare invoice; a `lightning:` scheme is the caller's to remove.
    """
    human_readable, groups = _read_bech32(text)
    prefix, amount_msat = _read_human_readable(human_readable)
    if len(groups) < _TIMESTAMP_GROUPS + _SIGNATURE_GROUPS:
        raise BadInvoice("the invoice is too short")
    signed, signature = groups[:-_SIGNATURE_GROUPS], _to_bytes(groups[-_SIGNATURE_GROUPS:])
    fields = _read_fields(signed)
    if _FIELD_P not in fields:
        raise BadInvoice("the invoice has no payment hash")
    features = _to_int(fields.get(_FIELD_FEATURES, b""))
    _refuse_unknown_features(features)
    created_at_s = _to_int(signed[:_TIMESTAMP_GROUPS])
    expiry_s = _to_int(fields[_FIELD_X]) if _FIELD_X in fields else DEFAULT_EXPIRY_S
    min_final_cltv = _to_int(fields[_FIELD_C]) if _FIELD_C in fields else DEFAULT_MIN_FINAL_CLTV
    if expiry_s > _MAX_EXPIRY_S or min_final_cltv > _MAX_EXPIRY_S:
        raise BadInvoice("the invoice's expiry or final CLTV is absurd")
    payee_pubkey = _payee_pubkey(
        human_readable.encode("ascii") + _to_padded_bytes(signed), signature, fields.get(_FIELD_N)
    )
    return DecodedInvoice(
        prefix=prefix,
        network=NETWORK_OF_PREFIX[prefix],
        payment_hash=_to_bytes(fields[_FIELD_P]).hex(),
        amount_msat=amount_msat,
        created_at=datetime.fromtimestamp(created_at_s, UTC),
        expiry_s=expiry_s,
        expires_at=datetime.fromtimestamp(created_at_s + expiry_s, UTC),
        description=_to_text(fields[_FIELD_D]) if _FIELD_D in fields else None,
        description_hash=_to_bytes(fields[_FIELD_H]).hex() if _FIELD_H in fields else None,
        payee_pubkey=payee_pubkey,
        has_payment_secret=_FIELD_S in fields,
        min_final_cltv=min_final_cltv,
    )


def sign(
    private_key: PrivateKey,
    *,
    prefix: str,
    amount_msat: int | None,
    payment_hash: bytes,
    payment_secret: bytes,
    created_at_s: int,
    expiry_s: int,
    description: str | None = None,
    description_hash: bytes | None = None,
    min_final_cltv: int = 80,
) -> str:
    """A signed invoice, lower case, with the features var_onion, payment_secret and basic_mpp.

    Exactly one of `description` (at most 639 bytes of UTF-8) and `description_hash` (32 bytes).
    Raises BadInvoice on terms that no invoice can hold.
    """
    if prefix not in NETWORK_OF_PREFIX:
        raise BadInvoice(f"no such network prefix: {prefix}")
    if len(payment_hash) != 32 or len(payment_secret) != 32:
        raise BadInvoice("payment hash and payment secret have 32 bytes")
    if not 0 <= created_at_s <= _MAX_EXPIRY_S or not 0 < expiry_s <= _MAX_EXPIRY_S:
        raise BadInvoice("an invoice's times have at most 35 bits")
    human_readable = f"ln{prefix}{_write_amount(amount_msat)}"
    features = 1 << _VAR_ONION | 1 << _PAYMENT_SECRET | 1 << _BASIC_MPP_OPTIONAL
    signed = b"".join(
        (
            _from_int(created_at_s).rjust(_TIMESTAMP_GROUPS, b"\0"),
            _field(_FIELD_P, _from_bytes(payment_hash)),
            _field(_FIELD_S, _from_bytes(payment_secret)),
            _description_field(description, description_hash),
            _field(_FIELD_X, _from_int(expiry_s)),
            _field(_FIELD_C, _from_int(min_final_cltv)),
            _field(_FIELD_FEATURES, _from_int(features)),
        )
    )
    message = human_readable.encode("ascii") + _to_padded_bytes(signed)
    groups = signed + _from_bytes(private_key.sign_recoverable(message))
    checksum = _polymod(_expand(human_readable) + groups + bytes(_CHECKSUM_GROUPS)) ^ 1
    tail = bytes((checksum >> 5 * (5 - place)) & 31 for place in range(_CHECKSUM_GROUPS))
    return f"{human_readable}1{(groups + tail).translate(_GROUP_TO_CHAR).decode('ascii')}"


def _read_bech32(text: str) -> tuple[str, bytes]:
    if len(text) > MAX_LENGTH:
        raise BadInvoice(f"the invoice is longer than {MAX_LENGTH} characters")
    if not text.isascii() or (text != text.lower() and text != text.upper()):
        raise BadInvoice("the invoice is not bech32")
    human_readable, separator, data = text.lower().rpartition("1")
    groups = data.encode("ascii").translate(_CHAR_TO_GROUP)
    if not separator or len(groups) < _CHECKSUM_GROUPS or 255 in groups:
        raise BadInvoice("the invoice is not bech32")
    if _polymod(_expand(human_readable) + groups) != 1:
        raise BadInvoice("the invoice's checksum is wrong")
    return human_readable, groups[:-_CHECKSUM_GROUPS]


def _read_human_readable(human_readable: str) -> tuple[str, int | None]:
    match = _HUMAN_READABLE.fullmatch(human_readable)
    if match is None:
        raise BadInvoice("the invoice's network or amount cannot be read")
    prefix, number, multiplier = match.groups()
    if number is None:
        return prefix, None
    if multiplier == "p":
        amount_msat, below_msat = divmod(int(number), 10)
        if below_msat:
            raise BadInvoice("the invoice asks for a fraction of a millisatoshi")
    else:
        amount_msat = int(number) * _MSAT_OF_MULTIPLIER[multiplier]
    if not 0 < amount_msat <= MAX_AMOUNT_MSAT:
        raise BadInvoice("the invoice asks for more than there is")
    return prefix, amount_msat


def _write_amount(amount_msat: int | None) -> str:
    if amount_msat is None:
        return ""
    if not 0 < amount_msat <= MAX_AMOUNT_MSAT:
        raise BadInvoice(f"an invoice cannot ask for {amount_msat} msat")
    for multiplier, unit_msat in _MSAT_OF_MULTIPLIER.items():
        if amount_msat % unit_msat == 0:
            return f"{amount_msat // unit_msat}{multiplier}"
    return f"{amount_msat * 10}p"


def _read_fields(signed: bytes) -> dict[int, bytes]:
    """The first of each kind of field, as groups. Fields of a wrong length are skipped, as the
    specification asks; one that runs past the end is an error."""
    fields: dict[int, bytes] = {}
    at = _TIMESTAMP_GROUPS
    while at < len(signed):
        if at + 3 > len(signed):
            raise BadInvoice("the invoice's fields are cut short")
        kind, length = signed[at], signed[at + 1] * 32 + signed[at + 2]
        at += 3
        if at + length > len(signed):
            raise BadInvoice("the invoice's fields are cut short")
        if kind in (_FIELD_P, _FIELD_H, _FIELD_S):
            usable = length == _HASH_GROUPS
        elif kind == _FIELD_N:
            usable = length == _PUBKEY_GROUPS
        else:
            usable = True
        if usable:
            fields.setdefault(kind, signed[at : at + length])
        at += length
    return fields


def _refuse_unknown_features(features: int) -> None:
    unknown = features & ~_KNOWN_REQUIRED_FEATURES
    while unknown:
        bit = (unknown & -unknown).bit_length() - 1
        if bit % 2 == 0:
            raise BadInvoice(f"the invoice requires the unknown feature {bit}")
        unknown &= unknown - 1


def _payee_pubkey(message: bytes, signature: bytes, named: bytes | None) -> str:
    try:
        if named is None:
            # Raises where there is no such key; the recovery id is the last byte.
            return PublicKey.from_signature_and_message(signature, message).format().hex()
        payee = PublicKey(_to_bytes(named))
        valid = payee.verify(cdata_to_der(deserialize_compact(signature[:64])), message)
    except ValueError:
        raise BadInvoice("the invoice's signature is wrong") from None
    if not valid:
        raise BadInvoice("the invoice's signature is wrong")
    return payee.format().hex()


def _description_field(description: str | None, description_hash: bytes | None) -> bytes:
    if description_hash is not None and description is None:
        if len(description_hash) != 32:
            raise BadInvoice("a description hash has 32 bytes")
        return _field(_FIELD_H, _from_bytes(description_hash))
    if description is None or description_hash is not None:
        raise BadInvoice("an invoice has a description or the hash of one")
    try:
        encoded = description.encode()
    except UnicodeEncodeError:
        raise BadInvoice("a description is text, not half a surrogate pair") from None
    if len(encoded) > DESCRIPTION_MAX_BYTES:
        raise BadInvoice(f"a description has at most {DESCRIPTION_MAX_BYTES} bytes")
    return _field(_FIELD_D, _from_bytes(encoded))


def _field(kind: int, groups: bytes) -> bytes:
    return bytes((kind, len(groups) >> 5, len(groups) & 31)) + groups


def _to_int(groups: bytes) -> int:
    # Bases that are powers of two are read in linear time, without the limit on decimal digits.
    return int(groups.translate(_GROUP_TO_DIGIT), 32) if groups else 0


def _to_bytes(groups: bytes) -> bytes:
    """Whole bytes only: the padding at the end is dropped."""
    bits = len(groups) * 5
    return (_to_int(groups) >> bits % 8).to_bytes(bits // 8, "big")


def _to_padded_bytes(groups: bytes) -> bytes:
    """The bytes that are signed: zero bits fill the last one."""
    bits = len(groups) * 5
    return (_to_int(groups) << -bits % 8).to_bytes((bits + 7) // 8, "big")


def _to_text(groups: bytes) -> str:
    try:
        text = _to_bytes(groups).decode("utf-8")
    except UnicodeDecodeError:
        raise BadInvoice("the invoice's description is not UTF-8") from None
    # No honest description has one, and PostgreSQL cannot store it.
    if "\0" in text:
        raise BadInvoice("the invoice's description holds a zero byte")
    return text


def _from_int(value: int) -> bytes:
    """The shortest groups of a number, most significant first; zero has one."""
    groups = bytearray()
    while True:
        groups.append(value & 31)
        value >>= 5
        if not value:
            return bytes(reversed(groups))


def _from_bytes(data: bytes) -> bytes:
    return base64.b32encode(data).rstrip(b"=").translate(_RFC4648_TO_GROUP)


def _expand(human_readable: str) -> bytes:
    chars = human_readable.encode("ascii")
    return bytes(char >> 5 for char in chars) + b"\0" + bytes(char & 31 for char in chars)


def _polymod_table() -> tuple[int, ...]:
    generator = (0x3B6A57B2, 0x26508E6D, 0x1EA119FA, 0x3D4233DD, 0x2A1462B3)
    table = []
    for top in range(32):
        value = 0
        for bit, term in enumerate(generator):
            value ^= term if top >> bit & 1 else 0
        table.append(value)
    return tuple(table)


_POLYMOD = _polymod_table()


def _polymod(groups: bytes) -> int:
    """The checksum of BIP 173, one step per character."""
    table = _POLYMOD
    checksum = 1
    for group in groups:
        checksum = (checksum & 0x1FFFFFF) << 5 ^ group ^ table[checksum >> 25]
    return checksum
