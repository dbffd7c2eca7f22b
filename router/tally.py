"""What this process has done since it started: jobs ended, tokens, money. For metrics only.

Counters of a process, as Prometheus wants them: the sum over routers is the market's. The books are
in the ledger.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import orjson

from router.job_records import Ended, Ending


@dataclass(slots=True)
class Tally:
    """`ended` is by (state, reason); tokens are those charged."""

    ended: Counter[tuple[str, str]] = field(default_factory=Counter)
    prompt_tokens: int = 0
    output_tokens: int = 0
    charged_msat: int = 0
    refunded_msat: int = 0

    def count(self, ending: Ending, ended: Ended) -> None:
        """A job has ended: this is called once for each, after the commit."""
        self.ended[ended.state.value, ending.end_reason] += 1
        self.charged_msat += ended.charged_msat
        self.refunded_msat += ended.refunded_msat
        if ending.usage is not None:
            ours = orjson.loads(ending.usage)["satherd"]
            self.prompt_tokens += ours["prompt_tokens"]
            self.output_tokens += ours["completion_tokens"]
