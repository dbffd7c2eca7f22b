"""The wallet of the command line: the simulated one, or a person with a wallet of their own."""

from __future__ import annotations

import io
import os
from pathlib import Path

from rich.console import Console

from client import Credential, Info, Patience, SimulatedWallet, parse_credential
from client.errors import WalletFailed
from client.wallet import SyncWallet

try:
    import segno
except ImportError:
    segno = None

# A person at a keyboard rather sees an error soon.
CLI_PATIENCE = Patience(attempts=6)


def wallet_for(info: Info, router_url: str, console: Console) -> SyncWallet:
    """Simulated money for a simulated router; otherwise the invoice is shown and paid by hand."""
    return SimulatedWallet(router_url) if info.simulated else AskingWallet(console)


class AskingWallet:
    """Shows the invoice, waits for a person to pay it, and asks for the preimage."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def __call__(self, bolt11: str, amount_msat: int) -> str | None:
        """Raises WalletFailed when there is nobody to ask."""
        if not self._console.is_terminal:
            raise WalletFailed(
                "this router takes real money, and there is no terminal to show an invoice on;"
                " use a prepaid key (--key)"
            )
        self._console.print(f"Pay {amount_msat // 1000} satoshi with your Lightning wallet:\n")
        self._console.print(bolt11, style="bold", soft_wrap=True, highlight=False)
        if segno is not None:
            # Upper case fits QR's alphanumeric mode, which makes the picture smaller.
            picture = io.StringIO()
            segno.make(bolt11.upper(), error="L").terminal(out=picture, compact=True)
            self._console.file.write(picture.getvalue())
        answer = self._console.input(
            "\nThen enter the preimage that the wallet shows (empty, if it shows none): "
        )
        return answer.strip() or None


def money(amount_msat: int, *, simulated: bool) -> str:
    """`1352 msat`, and that it is simulated where it is."""
    return f"{amount_msat} msat" + (" (simulated)" if simulated else "")


def save_credential(credential: Credential, path: Path) -> Path:
    """Write a credential to a file that only its owner may read."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(credential.as_text() + "\n")
    return path


def read_credential(text: str) -> Credential:
    """A credential from its text, or from the file that `@path` names. Raises ValueError."""
    if text.startswith("@"):
        try:
            text = Path(text[1:]).expanduser().read_text()
        except OSError as error:
            raise ValueError(f"cannot read the credential file: {error.strerror}") from error
    return parse_credential(text)
