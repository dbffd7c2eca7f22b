"""What a worker writes to say where it wants to be paid, read into a URL to ask. Pure.

    worker@example.com           Lightning address (LUD-16)   https://example.com/.well-known/lnurlp/worker
    LNURL1DP68GURN8GHJ7...       bech32 (LUD-01)              the URL inside
    lnurlp://example.com/path    (LUD-17)                     https://example.com/path
    https://example.com/path                                  itself
    DONT_PAY_ME, or nothing      no payout is wanted          None

A `lightning:` before any of them is ignored, in any case. Nothing is asked here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import parse_qsl

from lnurl.exceptions import InvalidLnurl
from lnurl.helpers import url_decode

from billing.errors import BadLightningAddress
from billing.outside_url import (
    BadOutsideUrl,
    OutsideRules,
    OutsideUrl,
    is_local_name,
    parse_outside_url,
    read_authority,
)

UNPAID = "DONT_PAY_ME"  # what QueenBee's workerbee sends unless it is told an address

_MAX_LNURL_LENGTH = 2000
# LUD-16 allows a-z0-9-_. only; tags after a plus are widespread.
_USER = re.compile(r"[a-z0-9_.+-]{1,64}")
_LIGHTNING = re.compile(r"lightning:", re.IGNORECASE)
_SCHEME = re.compile(r"([a-z][a-z0-9+.-]*)://", re.IGNORECASE)
_OTHER_LNURLS = frozenset({"lnurlw", "lnurlc", "keyauth"})
_OTHER_TAGS = frozenset({"login", "withdrawrequest", "channelrequest", "hostedchannelrequest"})


@dataclass(frozen=True, slots=True)
class Payee:
    """Where somebody wants to be paid. `text` is the canonical writing: what to store and compare.

    Two texts that differ may still lead to the same wallet.
    """

    text: str
    url: OutsideUrl


def parse_ln_url(
    text: str, *, allow_private: bool = False, allow_high_ports: bool = False
) -> Payee | None:
    """Read an `ln_url`; None means that no payout is wanted. Raises BadLightningAddress.

    `allow_private` (development only) admits http, local names, addresses and ports, and then a
    Lightning address at a local name or a named port is asked by plain http. `allow_high_ports`
    admits https on ports from 1024 in URLs.
    """
    text = text.strip()
    text = _LIGHTNING.sub("", text, count=1).strip() if _LIGHTNING.match(text) else text
    if not text or text.upper() == UNPAID:
        return None
    rules = OutsideRules(allow_private=allow_private, allow_high_ports=allow_high_ports)
    scheme = _SCHEME.match(text)
    if "@" in text and scheme is None:
        return _read_address(text, rules)
    if text[:6].lower() == "lnurl1":
        text = _decode_lnurl(text)
        scheme = _SCHEME.match(text)
    if scheme is None:
        raise BadLightningAddress(
            "not_understood", "neither a Lightning address, nor an LNURL, nor a URL"
        )
    if scheme[1].lower() in _OTHER_LNURLS:
        raise BadLightningAddress("not_a_payment", "this LNURL is not for receiving payments")
    if scheme[1].lower() == "lnurlp":
        text = f"{_scheme_for(text[scheme.end() :], rules)}://{text[scheme.end() :]}"
    url = _read_url(text, rules)
    return Payee(str(url), url)


def _read_address(text: str, rules: OutsideRules) -> Payee:
    user, _, domain = text.lower().rpartition("@")
    if not _USER.fullmatch(user):
        raise BadLightningAddress("bad_address", "the name before the @ is not allowed")
    try:
        host, port = read_authority(domain, rules)
        url = parse_outside_url(
            f"{_scheme_for(domain, rules)}://{domain}/.well-known/lnurlp/{user}", rules
        )
    except BadOutsideUrl as error:
        raise BadLightningAddress("bad_address", str(error)) from None
    if port is not None and not rules.allow_private:
        raise BadLightningAddress("bad_address", "a port is not allowed here")
    written = f"[{host}]" if ":" in host else host
    return Payee(f"{user}@{written}" + ("" if port is None else f":{port}"), url)


def _scheme_for(rest: str, rules: OutsideRules) -> str:
    """`https`, unless this is development and the host is one that has no certificate."""
    if not rules.allow_private:
        return "https"
    try:
        host, port = read_authority(re.split(r"[/?]", rest, maxsplit=1)[0], rules)
    except BadOutsideUrl:
        return "https"  # it will be refused for what is wrong with it
    return "http" if is_local_name(host) or port not in (None, 443) else "https"


def _decode_lnurl(text: str) -> str:
    """The URL in a bech32 `lnurl1...` string (LUD-01); the usual limit of 90 is lifted."""
    if len(text) > _MAX_LNURL_LENGTH:
        raise BadLightningAddress("bad_lnurl", "the LNURL is too long")
    try:
        return url_decode(text)
    except (InvalidLnurl, AssertionError, TypeError, ValueError):
        raise BadLightningAddress("bad_lnurl", "the LNURL has a typing error") from None


def _read_url(text: str, rules: OutsideRules) -> OutsideUrl:
    try:
        url = parse_outside_url(text, rules)
    except BadOutsideUrl as error:
        raise BadLightningAddress("bad_url", str(error)) from None
    query = url.target.partition("?")[2]
    for name, value in parse_qsl(query, keep_blank_values=True):
        if name.lower() == "tag" and value.lower() in _OTHER_TAGS:
            raise BadLightningAddress("not_a_payment", "this LNURL is not for receiving payments")
    return url
