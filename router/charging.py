"""What a job that has ended is charged, and what its `usage` says. Pure.

ended by itself, or cancelled while running    prompt fee + input + output (tokens, or a picture)
lost after some output was shown               input + the output delivered
anything else                                  nothing
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from billing import fees
from billing.fees import Rates
from router.job_records import Claimed


@dataclass(frozen=True, slots=True)
class Delivered:
    """What reached the router: UTF-8 bytes of text, pictures, the worker's counts if it gave any."""

    utf8_bytes: int
    worker_tokens: int | None
    worker_prompt_tokens: int | None = None
    images: int = 0


@dataclass(frozen=True, slots=True)
class Charge:
    """`output_tokens` are those charged; `charge_msat` never exceeds what is held."""

    charge_msat: int
    output_tokens: int


NOTHING = Charge(0, 0)


@lru_cache(maxsize=1_000)
def rates_of(text: str) -> Rates:
    """The rates that a job was quoted, from its row."""
    return Rates(**json.loads(text))


def charge(job: Claimed, delivered: Delivered, *, with_prompt_fee: bool) -> Charge:
    """The charge for a job that ran."""
    output_tokens = fees.charged_output_tokens(
        max_tokens=job.max_tokens,
        worker_tokens=delivered.worker_tokens,
        utf8_bytes=delivered.utf8_bytes,
    )
    charge_msat = fees.charge_msat(
        rates_of(job.rates),
        prompt_tokens=job.prompt_tokens,
        output_tokens=output_tokens,
        multiplier_milli=job.multiplier_milli,
        held_msat=job.held_msat,
        with_prompt_fee=with_prompt_fee,
        images=delivered.images,
    )
    return Charge(charge_msat, output_tokens)


def usage(job: Claimed, delivered: Delivered, charged: Charge) -> dict[str, Any]:
    """OpenAI's `usage` with the model's counts, and ours in `usage.satherd`."""
    prompt = delivered.worker_prompt_tokens
    completion = delivered.worker_tokens
    prompt_tokens = job.prompt_tokens if prompt is None else prompt
    completion_tokens = charged.output_tokens if completion is None else completion
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "satherd": {
            "job": job.job_id,
            "worker": job.worker_id,
            "fee_msat": charged.charge_msat,
            "refund_msat": job.held_msat - charged.charge_msat,
            "multiplier": fees.format_multiplier(job.multiplier_milli),
            "prompt_tokens": job.prompt_tokens,
            "completion_tokens": charged.output_tokens,
        },
    }
