"""Macaroons: a signed identifier to which anyone may add restrictions, and nobody remove them.

The binary format v2, and the chain of HMACs as every implementation computes it: the root key is
first hashed under a fixed name, a step that the written L402 specification leaves out. Third-party
caveats, which need somebody else's discharge, are not understood and therefore refused.

    02  [01 len location] 02 len identifier  00      lengths are varints
        (02 len caveat  00) *
    00  06 20 signature                              and nothing after it
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable
from dataclasses import dataclass, field

MAX_BYTES = 4096
MAX_CAVEATS = 32

_VERSION = 2
_END, _LOCATION, _IDENTIFIER, _SIGNATURE = 0, 1, 2, 6
_KEY_NAME = b"macaroons-key-generator"
_SIGNATURE_BYTES = 32


class BadMacaroon(ValueError):
    """The bytes are no macaroon of ours. The text never contains any of them."""


@dataclass(frozen=True, slots=True)
class Macaroon:
    """`location` is a hint that no signature covers: decide nothing by it."""

    location: bytes
    identifier: bytes
    caveats: tuple[bytes, ...]
    signature: bytes = field(repr=False)


def sign(root_key: bytes, identifier: bytes, caveats: Iterable[bytes]) -> bytes:
    """The 32 bytes at the end of the chain: derived key, identifier, then each caveat in order."""
    signature = _hmac(_hmac(_KEY_NAME, root_key), identifier)
    for caveat in caveats:
        signature = _hmac(signature, caveat)
    return signature


def encode(macaroon: Macaroon) -> bytes:
    """The binary form. Raises BadMacaroon above 4 KiB or 32 caveats: we could not read it back."""
    parts = [bytes([_VERSION])]
    if macaroon.location:
        parts.append(_packet(_LOCATION, macaroon.location))
    parts += [_packet(_IDENTIFIER, macaroon.identifier), bytes([_END])]
    for caveat in macaroon.caveats:
        parts += [_packet(_IDENTIFIER, caveat), bytes([_END])]
    parts += [bytes([_END]), _packet(_SIGNATURE, macaroon.signature)]
    data = b"".join(parts)
    if len(data) > MAX_BYTES or len(macaroon.caveats) > MAX_CAVEATS:
        raise BadMacaroon("too large")
    return data


def decode(data: bytes) -> Macaroon:
    """Read the binary form strictly; nothing is verified yet. Raises BadMacaroon."""
    if len(data) > MAX_BYTES:
        raise BadMacaroon("too large")
    reader = _Reader(data)
    if reader.byte() != _VERSION:
        raise BadMacaroon("not version 2")
    head = reader.section()
    location = head.pop(0)[1] if head and head[0][0] == _LOCATION else b""
    identifier = _only_identifier(head)
    caveats: list[bytes] = []
    while section := reader.section():
        if len(caveats) == MAX_CAVEATS:
            raise BadMacaroon("too many caveats")
        caveats.append(_only_identifier(section))
    kind, signature = reader.packet()
    if kind != _SIGNATURE or len(signature) != _SIGNATURE_BYTES or not reader.at_end():
        raise BadMacaroon("no signature at its end")
    return Macaroon(location, identifier, tuple(caveats), signature)


def _only_identifier(section: list[tuple[int, bytes]]) -> bytes:
    if len(section) != 1 or section[0][0] != _IDENTIFIER:
        raise BadMacaroon("a section is not one identifier")
    return section[0][1]


def _hmac(key: bytes, message: bytes) -> bytes:
    return hmac.digest(key, message, hashlib.sha256)


def _packet(kind: int, payload: bytes) -> bytes:
    return bytes([kind]) + _varint(len(payload)) + payload


def _varint(number: int) -> bytes:
    digits = bytearray()
    while number >= 0x80:
        digits.append(number & 0x7F | 0x80)
        number >>= 7
    digits.append(number)
    return bytes(digits)


class _Reader:
    """Takes packets off the front of `data`; running out of bytes is BadMacaroon."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def at_end(self) -> bool:
        return self._at == len(self._data)

    def byte(self) -> int:
        if self.at_end():
            raise BadMacaroon("cut short")
        self._at += 1
        return self._data[self._at - 1]

    def packet(self) -> tuple[int, bytes]:
        kind = self.byte()
        if kind == _END:
            return kind, b""
        length = self._length()
        payload = self._data[self._at : self._at + length]
        if len(payload) != length:
            raise BadMacaroon("cut short")
        self._at += length
        return kind, payload

    def section(self) -> list[tuple[int, bytes]]:
        """Packets up to the end mark. Kinds must rise, so a section is never long."""
        packets: list[tuple[int, bytes]] = []
        while (packet := self.packet())[0] != _END:
            if packets and packet[0] <= packets[-1][0]:
                raise BadMacaroon("fields out of order")
            packets.append(packet)
        return packets

    def _length(self) -> int:
        # Two digits hold 16383, more than a whole macaroon may have.
        low = self.byte()
        if low < 0x80:
            return low
        high = self.byte()
        if high >= 0x80 or high == 0:
            raise BadMacaroon("a length is not written in its shortest form, or is too large")
        return low & 0x7F | high << 7
