"""Encryption between two Nostr keys: NIP-44 version 2, and NIP-04 for wallets that know no better.

    payload of NIP-44 = base64(2 ‖ nonce ‖ ChaCha20(padded text) ‖ HMAC-SHA256(nonce ‖ ciphertext))

The three keys of a message come from the conversation's key and the nonce by HKDF. Neither scheme
says who wrote a message: the signature of the event around it does, and is checked first.

NIP-04 is AES-CBC without any authentication. It is here because some wallets offer nothing else.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import secrets

from coincurve import PrivateKey, PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.padding import PKCS7

MAX_TEXT_BYTES = 65_535

_VERSION = 2
_SALT = b"nip44-v2"
_NONCE_BYTES = 32
_MAC_BYTES = 32
# Version, nonce, the shortest padded text with its length, code; and the longest.
_MIN_PAYLOAD_BYTES = 1 + _NONCE_BYTES + 2 + 32 + _MAC_BYTES
_MAX_PAYLOAD_BYTES = 1 + _NONCE_BYTES + 2 + 65_536 + _MAC_BYTES
_AES_BLOCK_BYTES = 16


class BadMessage(ValueError):
    """A message that was not made for this conversation, or was changed on its way."""


def shared_x(secret: bytes, their_pubkey: str) -> bytes:
    """The 32-byte x coordinate of the shared point; `their_pubkey` is x-only hex (BIP 340).

    Raises ValueError when either is no key of the curve.
    """
    # Validates the secret: zero and numbers beyond the curve's order are refused.
    key = PrivateKey(secret)
    point = PublicKey(b"\x02" + bytes.fromhex(their_pubkey))
    return point.multiply(key.secret).format()[1:]


def conversation_key(secret: bytes, their_pubkey: str) -> bytes:
    """The same for both ends. Raises ValueError as `shared_x` does."""
    return hmac.digest(_SALT, shared_x(secret, their_pubkey), "sha256")


def encrypt(conversation: bytes, text: str, *, nonce: bytes | None = None) -> str:
    """`nonce` (32 bytes) is only for test vectors: one that is used twice gives the text away.

    Raises ValueError for text that is empty or longer than MAX_TEXT_BYTES.
    """
    nonce = secrets.token_bytes(_NONCE_BYTES) if nonce is None else nonce
    cipher_key, cipher_nonce, mac_key = message_keys(conversation, nonce)
    ciphertext = _chacha20(cipher_key, cipher_nonce, _pad(text.encode()))
    mac = hmac.digest(mac_key, nonce + ciphertext, "sha256")
    return base64.b64encode(bytes((_VERSION,)) + nonce + ciphertext + mac).decode()


def decrypt(conversation: bytes, payload: str) -> str:
    """Raises BadMessage on whatever is wrong with it, and nothing else."""
    try:
        data = base64.b64decode(payload, validate=True)
    except (binascii.Error, ValueError):
        raise BadMessage("the message is not base64") from None
    if not _MIN_PAYLOAD_BYTES <= len(data) <= _MAX_PAYLOAD_BYTES:
        raise BadMessage("the message has an impossible length")
    if data[0] != _VERSION:
        raise BadMessage("the message is of another version")
    nonce = data[1 : 1 + _NONCE_BYTES]
    ciphertext, mac = data[1 + _NONCE_BYTES : -_MAC_BYTES], data[-_MAC_BYTES:]
    cipher_key, cipher_nonce, mac_key = message_keys(conversation, nonce)
    if not hmac.compare_digest(hmac.digest(mac_key, nonce + ciphertext, "sha256"), mac):
        raise BadMessage("the message was changed, or is for somebody else")
    return _text(_unpad(_chacha20(cipher_key, cipher_nonce, ciphertext)))


def message_keys(conversation: bytes, nonce: bytes) -> tuple[bytes, bytes, bytes]:
    """(ChaCha20's key, its 12-byte nonce, the key of the HMAC), by HKDF-Expand of RFC 5869."""
    if len(conversation) != 32 or len(nonce) != _NONCE_BYTES:
        raise ValueError("a conversation's key and a nonce have 32 bytes")
    keys = block = b""
    for counter in (1, 2, 3):
        block = hmac.digest(conversation, block + nonce + bytes((counter,)), "sha256")
        keys += block
    return keys[:32], keys[32:44], keys[44:76]


def padded_length(length: int) -> int:
    """How long a text of `length` bytes becomes: powers of two, and eighths between them."""
    if length <= 32:
        return 32
    next_power = 1 << (length - 1).bit_length()
    chunk = 32 if next_power <= 256 else next_power // 8
    return chunk * ((length - 1) // chunk + 1)


def encrypt_nip04(secret: bytes, their_pubkey: str, text: str) -> str:
    """AES-256-CBC with the bare x coordinate as the key: `ciphertext?iv=…`, both in base64."""
    iv = secrets.token_bytes(_AES_BLOCK_BYTES)
    padder = PKCS7(_AES_BLOCK_BYTES * 8).padder()
    padded = padder.update(text.encode()) + padder.finalize()
    cipher = Cipher(algorithms.AES(shared_x(secret, their_pubkey)), modes.CBC(iv)).encryptor()
    ciphertext = cipher.update(padded) + cipher.finalize()
    return f"{base64.b64encode(ciphertext).decode()}?iv={base64.b64encode(iv).decode()}"


def decrypt_nip04(secret: bytes, their_pubkey: str, payload: str) -> str:
    """Raises BadMessage. A changed message may well decrypt: there is nothing to tell it by."""
    body, _, iv_text = payload.partition("?iv=")
    try:
        ciphertext = base64.b64decode(body, validate=True)
        iv = base64.b64decode(iv_text, validate=True)
        cipher = Cipher(algorithms.AES(shared_x(secret, their_pubkey)), modes.CBC(iv)).decryptor()
        padded = cipher.update(ciphertext) + cipher.finalize()
        unpadder = PKCS7(_AES_BLOCK_BYTES * 8).unpadder()
        return _text(unpadder.update(padded) + unpadder.finalize())
    except ValueError:
        raise BadMessage("the message cannot be decrypted") from None


def _pad(text: bytes) -> bytes:
    if not 1 <= len(text) <= MAX_TEXT_BYTES:
        raise ValueError(f"a message has 1 to {MAX_TEXT_BYTES} bytes")
    return len(text).to_bytes(2, "big") + text.ljust(padded_length(len(text)), b"\0")


def _unpad(padded: bytes) -> bytes:
    length = int.from_bytes(padded[:2], "big")
    text, rest = padded[2 : 2 + length], padded[2 + length :]
    if length == 0 or len(text) != length or any(rest):
        raise BadMessage("the message's padding is wrong")
    if len(padded) != 2 + padded_length(length):
        raise BadMessage("the message's padding is wrong")
    return text


def _chacha20(key: bytes, nonce: bytes, data: bytes) -> bytes:
    # The library takes the block counter, four bytes of zero, in front of the nonce.
    cipher = Cipher(algorithms.ChaCha20(key, bytes(4) + nonce), mode=None).encryptor()
    return cipher.update(data) + cipher.finalize()


def _text(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise BadMessage("the message is not UTF-8") from None
