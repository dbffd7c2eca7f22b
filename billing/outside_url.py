"""URLs and addresses given by strangers: which of them we are ready to ask. Pure.

A stranger who can make us fetch a URL of his reaches whatever we reach: the node's API, the
database's neighbours, the cloud's metadata service. So a URL is read strictly, by one reader, into
parts that are then used as they are (two readers that disagree are a hole), and every address that
its host resolves to must be one of the public Internet.

What Python calls global is not enough: `is_global` says yes to multicast, NAT64, 6to4, `::a.b.c.d`
and `fec0::/10`, each of which may lead inside.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from urllib.parse import quote, urlencode, urljoin

import idna

MAX_URL_LENGTH = 2000

Network = IPv4Network | IPv6Network

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://([^/?#]*)([^?#]*)(\?[^#]*)?")
_AUTHORITY = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^:\[\]@]+)(?::([1-9][0-9]{0,4}))?")
_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
# How every reader but ipaddress finds a number where a name should be: 127.1, 0x7f000001, 017.0.1.
_NUMERIC_LABEL = re.compile(r"[0-9]+|0x[0-9a-f]*")
_DEFAULT_PORTS = {"https": 443, "http": 80}

# All unicast assigned so far. This leaves out ::/96, ::ffff:0:0:0/96, 64:ff9b::/96 and
# 64:ff9b:1::/48 (NAT64), fc00::/7, fe80::/10, fec0::/10 and ff00::/8 at one stroke.
_IPV6_UNICAST = IPv6Network("2000::/3")
_NEVER: tuple[Network, ...] = (
    IPv4Network("192.0.0.0/24"),  # protocol assignments
    IPv4Network("192.88.99.0/24"),  # 6to4 relays
    IPv6Network("2001::/23"),  # protocol assignments, Teredo (2001::/32) among them
    IPv6Network("2001:db8::/32"),  # documentation
    IPv6Network("2002::/16"),  # 6to4: an IPv4 address in disguise
    IPv6Network("3fff::/20"),  # documentation
)
# What the development switch opens. Link-local stays shut: 169.254.169.254 hands out cloud keys.
_PRIVATE: tuple[Network, ...] = (
    IPv4Network("127.0.0.0/8"),
    IPv4Network("10.0.0.0/8"),
    IPv4Network("172.16.0.0/12"),
    IPv4Network("192.168.0.0/16"),
    IPv4Network("100.64.0.0/10"),
    IPv6Network("::1/128"),
    IPv6Network("fc00::/7"),
)
# The last 8 bytes of an ISATAP address are 0[02]00:5efe and an IPv4 address.
_ISATAP = (0x00005EFE, 0x02005EFE)


class BadOutsideUrl(ValueError):
    """A URL that we do not ask. The text is a fixed sentence, safe to show."""


@dataclass(frozen=True, slots=True)
class OutsideRules:
    """What is allowed beyond https on port 443 of public hosts, and what is forbidden besides.

    `allow_private` (development only): plain http, loopback and private addresses, IP literals,
    names without a dot, port 80 and those from 1024. `allow_high_ports`: https on ports from 1024.
    `deny`: networks never to be asked, such as the operator's own public addresses.
    """

    allow_private: bool = False
    allow_high_ports: bool = False
    deny: tuple[Network, ...] = ()


@dataclass(frozen=True, slots=True)
class OutsideUrl:
    """A URL that keeps the rules. `host` is lower-case ASCII, an IPv6 one without brackets;
    `target` is path and query, percent-encoded, beginning with a slash."""

    scheme: str
    host: str
    port: int
    target: str

    @property
    def host_header(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _DEFAULT_PORTS[self.scheme] else f"{host}:{self.port}"

    def __str__(self) -> str:
        return f"{self.scheme}://{self.host_header}{self.target}"

    def with_query(self, parameters: Mapping[str, str]) -> OutsideUrl:
        """The same URL with `parameters` added after those it has."""
        joint = "&" if "?" in self.target else "?"
        return replace(self, target=self.target + joint + urlencode(parameters))

    def follow(self, location: str, rules: OutsideRules) -> OutsideUrl:
        """Where a redirect leads. Raises BadOutsideUrl, also when it leaves https."""
        _check_characters(location)
        try:
            joined = urljoin(str(self), location)
        except ValueError:
            raise BadOutsideUrl("the redirect leads to no URL") from None
        url = parse_outside_url(joined, rules)
        if self.scheme == "https" and url.scheme != "https":
            raise BadOutsideUrl("the redirect leads away from https")
        return url


def parse_outside_url(text: str, rules: OutsideRules) -> OutsideUrl:
    """Read a stranger's URL. Raises BadOutsideUrl, and nothing else.

    Refused: anything but https (http in development), user info, fragments, ports and hosts
    that `rules` do not allow, white space, backslashes, and more than 2000 characters.
    """
    _check_characters(text)
    match = _URL.fullmatch(text)
    if match is None:
        raise BadOutsideUrl("a URL with a host, and without a fragment, is needed")
    scheme = match[1].lower()
    if scheme != "https" and not (scheme == "http" and rules.allow_private):
        raise BadOutsideUrl("only https is allowed")
    host, port = read_authority(match[2], rules)
    return OutsideUrl(
        scheme, host, port or _DEFAULT_PORTS[scheme], _read_target(match[3], match[4])
    )


def read_authority(text: str, rules: OutsideRules) -> tuple[str, int | None]:
    """The canonical host, and the port if one is named. Raises BadOutsideUrl."""
    if "@" in text:
        raise BadOutsideUrl("a URL with a user name or password is not allowed")
    match = _AUTHORITY.fullmatch(text)
    if match is None:
        raise BadOutsideUrl("the host or port cannot be read")
    port = None if match[2] is None else int(match[2])
    if port is not None and not _port_allowed(port, rules):
        raise BadOutsideUrl("this port is not allowed")
    return _read_host(match[1], rules), port


def is_local_name(host: str) -> bool:
    """A host that no public name server knows: `localhost`, a name without a dot, a literal."""
    return "." not in host or host.endswith(".localhost") or _parse_address(host) is not None


def address_allowed(text: str, rules: OutsideRules) -> bool:
    """Whether a resolved address may be connected to."""
    address = _parse_address(text)
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    if address is None or _in_any(address, rules.deny):
        return False
    return _is_public(address) or (rules.allow_private and _in_any(address, _PRIVATE))


def _is_public(address: IPv4Address | IPv6Address) -> bool:
    if not address.is_global or address.is_multicast or address.is_reserved:
        return False
    if _in_any(address, _NEVER):
        return False
    if isinstance(address, IPv4Address):
        return True
    return address in _IPV6_UNICAST and int(address) >> 32 & 0xFFFFFFFF not in _ISATAP


def _in_any(address: IPv4Address | IPv6Address, networks: tuple[Network, ...]) -> bool:
    return any(address in network for network in networks)


def _parse_address(text: str) -> IPv4Address | IPv6Address | None:
    try:
        # A scope (`fe80::1%eth0`) is only ever local, and no part of a URL.
        return None if "%" in text else ipaddress.ip_address(text)
    except ValueError:
        return None


def _port_allowed(port: int, rules: OutsideRules) -> bool:
    if port == 443:
        return True
    if port == 80:
        return rules.allow_private
    return 1024 <= port <= 65535 and (rules.allow_private or rules.allow_high_ports)


def _check_characters(text: str) -> None:
    if len(text) > MAX_URL_LENGTH:
        raise BadOutsideUrl("the URL is too long")
    # The backslash is a slash to some readers and not to others.
    if any(character <= " " or character in "\\\x7f" for character in text):
        raise BadOutsideUrl("the URL has a character that is not allowed")


def _read_target(path: str, query: str | None) -> str:
    try:
        # Everything printable is let be; what is not ASCII is encoded as UTF-8.
        return quote((path or "/") + (query or ""), safe="".join(map(chr, range(0x21, 0x7F))))
    except UnicodeEncodeError:
        raise BadOutsideUrl("the URL has a character that is not allowed") from None


def _read_host(text: str, rules: OutsideRules) -> str:
    if text.startswith("["):
        address = _parse_address(text[1:-1])
        if not rules.allow_private or not isinstance(address, IPv6Address):
            raise BadOutsideUrl("a host name is needed, not an address")
        return str(address)
    host = text.lower() if text.isascii() else _to_ascii(text)
    labels = host.split(".")
    # This comes after the IDNA mapping, which turns full-width digits into plain ones.
    if _NUMERIC_LABEL.fullmatch(labels[-1]):
        if not rules.allow_private or _parse_address(host) is None:
            raise BadOutsideUrl("a host name is needed, not an address")
        return host
    if len(host) > 253 or not all(_LABEL.fullmatch(label) for label in labels):
        raise BadOutsideUrl("the host name cannot be read")
    if labels[-1] == "onion":
        raise BadOutsideUrl("onion services cannot be reached from here")
    if is_local_name(host) and not rules.allow_private:
        raise BadOutsideUrl("a public host name is needed")
    return host


def _to_ascii(text: str) -> str:
    try:
        return idna.encode(text, uts46=True).decode("ascii").lower()
    except UnicodeError:
        raise BadOutsideUrl("the host name cannot be read") from None
