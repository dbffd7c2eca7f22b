"""What an operator may set: `SATHERD_…` in the environment or `.env`, or flags of the same name."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, SecretStr, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

MIN_ADMIN_TOKEN = 16


def default_data_dir() -> Path:
    return Path.home() / ".satherd"


class Settings(BaseSettings):
    """Settings of a router. Times in seconds, money in msat, shares in parts per million."""

    model_config = SettingsConfigDict(env_prefix="SATHERD_", env_file=".env", extra="ignore")

    host: str = Field(
        default="127.0.0.1",
        description="The address to listen on; 0.0.0.0 for all, behind a TLS proxy.",
    )
    port: int = Field(
        default=8000, ge=0, le=65535, description="The port to listen on; 0 takes a free one."
    )
    data_dir: Path = Field(
        default_factory=default_data_dir,
        description="Where this router keeps its state, and the embedded database its data.",
    )
    public_url: str | None = Field(
        default=None,
        description="The address that clients and workers reach it at, if it is another.",
    )
    trusted_proxies: str = Field(
        default="",
        description="Networks of proxies whose X-Forwarded-For is believed, comma separated.",
    )
    name: str = Field(default="Satherd", description="What this router calls itself in /info.")
    contact: str | None = Field(
        default=None, description="How to reach its operator; shown in /info."
    )
    terms: str | None = Field(
        default=None, description="Its terms of use, or where they are; shown in /info."
    )

    database_url: SecretStr | None = Field(
        default=None, description="A PostgreSQL of your own in place of the embedded one."
    )
    nats_url: SecretStr | None = Field(
        default=None,
        description="The NATS server between several routers on one database, such as"
        " nats://127.0.0.1:4222; several, comma separated, of one cluster; unset: one router.",
    )
    admin_token: SecretStr = Field(
        default=SecretStr(""),
        description="Opens the admin API; at least 16 characters, needed with real money.",
    )
    secret: SecretStr | None = Field(
        default=None,
        description="What credentials are made with; unset: made once, in the data directory.",
    )
    previous_secret: SecretStr | None = Field(
        default=None, description="The secret before a change: what was made with it stays good."
    )

    lightning: str = Field(
        default="simulated",
        description="The kind of Lightning node: lnd, cln, phoenixd, lnbits, nwc, electrum; with"
        " `simulated` no money is real. `satherd lightning check` tries it.",
    )
    simulated_url: str | None = Field(
        default=None, description="The simulated network to use, where `satherd up` starts none."
    )
    lnd_url: str | None = Field(
        default=None, description="LND's REST interface, such as https://127.0.0.1:8080."
    )
    lnd_macaroon: SecretStr | None = Field(
        default=None,
        description="LND: the macaroon as hex, or the path of its file; for all that Satherd does,"
        " or for invoices only (invoices:read, invoices:write).",
    )
    lnd_pay_macaroon: SecretStr | None = Field(
        default=None,
        description="LND: the macaroon for all but invoices (offchain:read, offchain:write,"
        " info:read), where the other may not.",
    )
    lnd_cert: Path | None = Field(
        default=None, description="LND: the path of its tls.cert, which is then trusted."
    )
    cln_url: str | None = Field(
        default=None, description="Core Lightning's clnrest, such as https://127.0.0.1:3010."
    )
    cln_rune: SecretStr | None = Field(
        default=None,
        description="Core Lightning: the rune for all that Satherd does, or for invoice,"
        " listinvoices, waitanyinvoice, delinvoice, getinfo and listpeerchannels.",
    )
    cln_pay_rune: SecretStr | None = Field(
        default=None,
        description="Core Lightning: the rune for xpay, listpays and listsendpays, where the other"
        " may not.",
    )
    cln_cert: Path | None = Field(
        default=None, description="Core Lightning: the path of clnrest's ca.pem."
    )
    phoenixd_url: str | None = Field(
        default=None, description="phoenixd, such as http://127.0.0.1:9740."
    )
    phoenixd_password: SecretStr | None = Field(
        default=None, description="phoenixd: its password, or the one of limited access."
    )
    phoenixd_pay_password: SecretStr | None = Field(
        default=None, description="phoenixd: the password that may pay, where the other may not."
    )
    lnbits_url: str | None = Field(
        default=None, description="LNbits (1.6 or later), such as https://lnbits.example.com."
    )
    lnbits_key: SecretStr | None = Field(
        default=None, description="LNbits: the wallet's invoice key, which cannot pay."
    )
    lnbits_pay_key: SecretStr | None = Field(
        default=None, description="LNbits: the wallet's admin key; without it nothing is paid out."
    )
    nwc_url: SecretStr | None = Field(
        default=None,
        description="Nostr Wallet Connect: what the wallet shows, nostr+walletconnect://…; it is"
        " the key to the wallet.",
    )
    electrum_url: str | None = Field(
        default=None, description="Electrum's daemon, such as http://127.0.0.1:7777."
    )
    electrum_user: str | None = Field(default=None, description="Electrum: its rpcuser.")
    electrum_password: SecretStr | None = Field(
        default=None, description="Electrum: its rpcpassword."
    )
    lnurl_allow_private: bool = Field(
        default=False,
        description="Development only: pay to addresses, and call webhooks, on private networks and by"
        " plain http; never on mainnet.",
    )

    payout_threshold_msat: int = Field(
        default=1_000_000,
        ge=1000,
        description="A worker is paid as soon as it is owed this much, in msat.",
    )
    payout_interval_s: int = Field(
        default=86_400,
        ge=1,
        description="A worker that is owed less, yet worth sending, is paid after this long.",
    )
    commission_ppm: int = Field(
        default=50_000,
        ge=0,
        le=1_000_000,
        description="The router's part of each charge, in parts per million.",
    )

    check_every_s: int = Field(
        default=0,
        ge=0,
        description="How often a job is bought that checks workers (`satherd admin checks`);"
        " 0: never.",
    )
    check_budget_msat: int = Field(
        default=1_000_000, ge=0, description="The most that such jobs may cost in 24 hours."
    )
    failed_checks_hold_s: int = Field(
        default=604_800,
        ge=0,
        description="How long a worker waits for its money whose answers fail checks; 0: not at all.",
    )

    default_max_tokens: int = Field(
        default=1024,
        ge=1,
        description="The longest answer, in tokens, where a request does not say.",
    )
    default_max_wait_s: int = Field(
        default=1200,
        ge=1,
        description="How long a job waits for a worker where a request does not say.",
    )
    max_wait_s: int = Field(
        default=86_400, ge=1, description="The longest wait that a request may ask for."
    )
    max_n: int = Field(default=128, ge=1, le=1024, description="The most answers of one request.")
    max_multiplier: int = Field(
        default=1000,
        ge=1,
        le=1_000_000,
        description="The highest multiplier of the base fee that is taken.",
    )
    image_prompt_tokens: int = Field(
        default=765, ge=0, description="Tokens that are charged for an image in a prompt."
    )
    min_amount_msat: int = Field(
        default=1000, ge=1000, description="The least amount of an invoice."
    )
    max_amount_msat: int = Field(
        default=100_000_000_000, ge=1000, description="The most that one top-up may bring."
    )
    quote_ttl_s: int = Field(
        default=600, ge=10, description="How long a quote and its invoice are good."
    )
    topup_ttl_s: int = Field(
        default=3600, ge=10, description="How long the invoice of a top-up is good."
    )
    wipe_after_s: int = Field(
        default=600,
        ge=1,
        description="How long prompts and answers are kept after a job was last asked for.",
    )

    lease_s: int = Field(
        default=60,
        ge=5,
        description="After how long without a sign of life a worker's jobs are taken back.",
    )
    http_workers: Literal["loopback", "outside", "off"] = Field(
        default="loopback",
        description="Where servers that register as workers may be: on this machine only, also"
        " elsewhere (https, public addresses), or nowhere.",
    )
    first_token_timeout_s: float = Field(
        default=180, gt=0, description="How long a worker may take to its first token."
    )
    pull_ttl_s: float = Field(
        default=150,
        gt=0,
        description="How long a worker that asks for its jobs may keep one without an answer.",
    )
    image_timeout_s: float = Field(
        default=600, gt=0, description="How long a worker may take for a picture."
    )
    stall_timeout_s: float = Field(
        default=60, gt=0, description="How long a worker may pause between two tokens."
    )
    max_attempts: int = Field(
        default=3, ge=1, description="How many workers try a job before it fails and is refunded."
    )
    drain_s: float = Field(
        default=20, ge=0, description="How long jobs that run may go on when the router stops."
    )

    rate_limits: Literal["on", "off"] = Field(
        default="on", description="Limits for each client address; off for load tests."
    )
    invoices_per_minute: int = Field(
        default=300, ge=1, description="Invoices that one client address may ask for in a minute."
    )
    jobs_per_minute: int = Field(
        default=6000, ge=1, description="Jobs that one client address may start in a minute."
    )
    max_body_bytes: int = Field(default=8 << 20, ge=1024, description="The largest request body.")
    max_queue: int = Field(
        default=1_000_000, ge=1, description="How many jobs may wait before new ones are refused."
    )
    log_format: Literal["text", "json"] = Field(
        default="text", description="Log lines for people or for programs."
    )

    @property
    def simulated(self) -> bool:
        return self.lightning == "simulated"

    @model_validator(mode="after")
    def _real_money_wants_a_real_admin_token(self) -> Settings:
        token = self.admin_token.get_secret_value()
        if (token or not self.simulated) and len(token) < MIN_ADMIN_TOKEN:
            raise ValueError(
                f"SATHERD_ADMIN_TOKEN must have at least {MIN_ADMIN_TOKEN} characters"
                " (make one with: openssl rand -hex 32)"
            )
        return self


def backend_settings(settings: Settings) -> dict[str, str | None]:
    """What is set for the chosen kind of node, as `billing.lightning.connect.connect` takes it:
    every `SATHERD_<KIND>_…` without that prefix."""
    prefix = f"{settings.lightning}_"
    found: dict[str, str | None] = {}
    for name in type(settings).model_fields:
        if name.startswith(prefix):
            value = getattr(settings, name)
            secret = value.get_secret_value() if isinstance(value, SecretStr) else value
            found[name.removeprefix(prefix)] = None if secret is None else str(secret)
    return found
