"""NIP-44 v2 against published vectors, and both ciphers against tampering."""

from __future__ import annotations

import base64
import hmac
import secrets

import pytest
from coincurve import PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from billing.lightning import nip44
from billing.lightning.nip44 import BadMessage
from billing.lightning.nostr import pubkey_of

ONE = bytes(31) + b"\x01"
TWO = bytes(31) + b"\x02"

# From the vectors published with NIP-44: (secret 1, secret 2, conversation key).
CONVERSATIONS = [
    (
        "0000000000000000000000000000000000000000000000000000000000000001",
        "0000000000000000000000000000000000000000000000000000000000000002",
        "c41c775356fd92eadc63ff5a0dc1da211b268cbea22316767095b2871ea1412d",
    ),
    (
        "5c0c523f52a5b6fad39ed2403092df8cebc36318b39383bca6c00808626fab3a",
        "4b22aa260e4acb7021e32f38a6cdf4b673c6a277755bfce287e370c924dc936d",
        "3e2b52a63be47d34fe0a80e34e73d436d6963bc8f39827f327057a9986c20a45",
    ),
    (
        "8f40e50a84a7462e2b8d24c28898ef1f23359fff50d8c509e6fb7ce06e142f9c",
        "b9b0a1e9cc20100c5faa3bbe2777303d25950616c4c6a3fa2e3e046f936ec2ba",
        "d5a2f879123145a4b291d767428870f5a8d9e5007193321795b40183d4ab8c2b",
    ),
    (
        "d5633530f5bcfebceb5584cfbbf718a30df0751b729dd9a789b9f30c0587d74e",
        "b74e6a341fb134127272b795a08b59250e5fa45a82a2eb4095e4ce9ed5f5e214",
        "75fe686d21a035f0c7cd70da64ba307936e5ca0b20710496a6b6b5f573377bdd",
    ),
]
IMPOSSIBLE_KEYS = [
    ("ff" * 32, "1234567890abcdef1234567890abcdef1234567890abcdef1234567890abcdef"),
    ("00" * 32, "1234567890abcdef1234567890abcdef1234567890abcdef1234567890abcdef"),
    ("fffffffffffffffffffffffffffffffebaaedce6af48a03bbfd25e8cd0364139", "ff" * 32),
    (
        "fffffffffffffffffffffffffffffffebaaedce6af48a03bbfd25e8cd0364141",
        "1234567890abcdef1234567890abcdef1234567890abcdef1234567890abcdef",
    ),
    ("00" * 31 + "02", "1234567890abcdef1234567890abcdef1234567890abcdef1234567890abcdef"),
    ("0102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f20", "00" * 32),
    (
        "0102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f20",
        "eb1f7200aecaa86682376fb1c13cd12b732221e774f553b0a0857f88fa20f86d",
    ),
]
PADDING = [
    (16, 32), (32, 32), (33, 64), (37, 64), (45, 64), (49, 64), (64, 64), (65, 96), (100, 128),
    (111, 128), (200, 224), (250, 256), (320, 320), (383, 384), (384, 384), (400, 448), (500, 512),
    (512, 512), (515, 640), (700, 768), (800, 896), (900, 1024), (1020, 1024), (65536, 65536),
]  # fmt: skip
SHORT = (
    "AgAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAABee0G5VSK0/9YypIObAtDKfYEAjD35uVkHyB0F4DwrcNaCXlCWZ"
    "KaArsGrY6M9wnuTMxWfp1RTN9Xga8no+kF5Vsb"
)


def public(secret: bytes) -> str:
    return pubkey_of(PrivateKey(secret))


@pytest.mark.parametrize("one, two, conversation", CONVERSATIONS)
def test_both_ends_have_the_published_conversation_key(
    one: str, two: str, conversation: str
) -> None:
    first, second = bytes.fromhex(one), bytes.fromhex(two)
    assert nip44.conversation_key(first, public(second)).hex() == conversation
    assert nip44.conversation_key(second, public(first)).hex() == conversation


@pytest.mark.parametrize("secret, pubkey", IMPOSSIBLE_KEYS)
def test_what_is_no_key_is_refused(secret: str, pubkey: str) -> None:
    with pytest.raises(ValueError):
        nip44.conversation_key(bytes.fromhex(secret), pubkey)


@pytest.mark.parametrize("length, padded", PADDING)
def test_texts_are_padded_as_published(length: int, padded: int) -> None:
    assert nip44.padded_length(length) == padded


def test_the_keys_of_a_message_are_the_published_ones() -> None:
    cipher_key, cipher_nonce, mac_key = nip44.message_keys(
        bytes.fromhex("a1a3d60f3470a8612633924e91febf96dc5366ce130f658b1f0fc652c20b3b54"),
        bytes.fromhex("e1e6f880560d6d149ed83dcc7e5861ee62a5ee051f7fde9975fe5d25d2a02d72"),
    )
    assert cipher_key.hex() == "f145f3bed47cb70dbeaac07f3a3fe683e822b3715edb7c4fe310829014ce7d76"
    assert cipher_nonce.hex() == "c4ad129bb01180c0933a160c"
    assert mac_key.hex() == "027c1db445f05e2eee864a0975b0ddef5b7110583c8c192de3732571ca5838c4"


def test_the_published_message_is_written_and_read() -> None:
    conversation = nip44.conversation_key(ONE, public(TWO))
    assert nip44.encrypt(conversation, "a", nonce=ONE) == SHORT
    assert nip44.decrypt(conversation, SHORT) == "a"


@settings(max_examples=50)
@given(st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=3000))
def test_what_one_end_writes_the_other_reads(text: str) -> None:
    payload = nip44.encrypt(nip44.conversation_key(ONE, public(TWO)), text)
    assert nip44.decrypt(nip44.conversation_key(TWO, public(ONE)), payload) == text


def test_the_longest_text_goes_and_one_more_byte_does_not() -> None:
    conversation = secrets.token_bytes(32)
    longest = "x" * nip44.MAX_TEXT_BYTES
    assert nip44.decrypt(conversation, nip44.encrypt(conversation, longest)) == longest
    for text in (longest + "x", ""):
        with pytest.raises(ValueError):
            nip44.encrypt(conversation, text)


def test_no_byte_of_a_message_can_be_changed() -> None:
    conversation = nip44.conversation_key(ONE, public(TWO))
    data = base64.b64decode(SHORT)
    for place in range(len(data)):
        changed = bytearray(data)
        changed[place] ^= 1
        with pytest.raises(BadMessage):
            nip44.decrypt(conversation, base64.b64encode(changed).decode())


def test_a_message_of_another_conversation_is_refused() -> None:
    with pytest.raises(BadMessage):
        nip44.decrypt(secrets.token_bytes(32), SHORT)


@pytest.mark.parametrize(
    "payload",
    ["", "#" + SHORT[1:], SHORT[:-4], SHORT[:-1], "ü" * 132, base64.b64encode(bytes(98)).decode()],
)
def test_what_is_no_message_is_refused(payload: str) -> None:
    with pytest.raises(BadMessage):
        nip44.decrypt(nip44.conversation_key(ONE, public(TWO)), payload)


@pytest.mark.parametrize(
    "padded",
    [
        bytes(34),  # no text at all
        b"\x00\x01a" + bytes(30) + b"x",  # something after the text
        b"\x00\x30" + bytes(32),  # more text than there is
        b"\x00\x01a" + bytes(63),  # more padding than its length asks for
        b"\x00\x01\xff" + bytes(31),  # no UTF-8
    ],
)
def test_a_well_authenticated_message_with_wrong_padding_is_refused(padded: bytes) -> None:
    conversation = nip44.conversation_key(ONE, public(TWO))
    nonce = secrets.token_bytes(32)
    cipher_key, cipher_nonce, mac_key = nip44.message_keys(conversation, nonce)
    ciphertext = nip44._chacha20(cipher_key, cipher_nonce, padded)
    mac = hmac.digest(mac_key, nonce + ciphertext, "sha256")
    with pytest.raises(BadMessage):
        nip44.decrypt(conversation, base64.b64encode(b"\x02" + nonce + ciphertext + mac).decode())


def test_the_old_cipher_is_read_by_the_other_end_and_refuses_nonsense() -> None:
    payload = nip44.encrypt_nip04(ONE, public(TWO), "pay, please ₿")
    assert nip44.decrypt_nip04(TWO, public(ONE), payload) == "pay, please ₿"
    body, _, iv = payload.partition("?iv=")
    for broken in ("", body, f"{body}?iv=", f"{body[:-4]}?iv={iv}", f"?iv={iv}", "!!?iv=!!"):
        with pytest.raises(BadMessage):
            nip44.decrypt_nip04(TWO, public(ONE), broken)
