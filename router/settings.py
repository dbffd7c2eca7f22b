"""What an operator may set: environment variables `SATHERD_…`, `.env`, or flags of the same name."""

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

    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)
    data_dir: Path = Field(default_factory=default_data_dir)
    public_url: str | None = None
    trusted_proxies: str = ""
    name: str = "Satherd"
    contact: str | None = None
    terms: str | None = None

    database_url: SecretStr | None = None
    nats_url: str | None = None
    admin_token: SecretStr = SecretStr("")
    secret: SecretStr | None = None
    previous_secret: SecretStr | None = None

    lightning: str = "simulated"
    simulated_url: str | None = None
    lnurl_allow_private: bool = False

    payout_threshold_msat: int = Field(default=1_000_000, ge=1000)
    payout_interval_s: int = Field(default=86_400, ge=1)
    commission_ppm: int = Field(default=50_000, ge=0, le=1_000_000)

    default_max_tokens: int = Field(default=1024, ge=1)
    default_max_wait_s: int = Field(default=1200, ge=1)
    max_wait_s: int = Field(default=86_400, ge=1)
    max_n: int = Field(default=128, ge=1, le=1024)
    max_multiplier: int = Field(default=1000, ge=1, le=1_000_000)
    image_prompt_tokens: int = Field(default=765, ge=0)
    min_amount_msat: int = Field(default=1000, ge=1000)
    max_amount_msat: int = Field(default=100_000_000_000, ge=1000)
    quote_ttl_s: int = Field(default=600, ge=10)
    topup_ttl_s: int = Field(default=3600, ge=10)
    wipe_after_s: int = Field(default=600, ge=1)

    lease_s: int = Field(default=60, ge=5)
    first_token_timeout_s: float = Field(default=180, gt=0)
    stall_timeout_s: float = Field(default=60, gt=0)
    max_attempts: int = Field(default=3, ge=1)
    drain_s: float = Field(default=20, ge=0)

    rate_limits: Literal["on", "off"] = "on"
    invoices_per_minute: int = Field(default=60, ge=1)
    jobs_per_minute: int = Field(default=600, ge=1)
    max_body_bytes: int = Field(default=8 << 20, ge=1024)
    max_queue: int = Field(default=1_000_000, ge=1)
    log_format: Literal["text", "json"] = "text"

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
