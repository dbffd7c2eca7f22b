"""How long steps take, and what follows from it while jobs run.

Two things are decided here, from the times of the steps themselves:

- how much of a long prompt goes into one step while others are writing, so that nobody waits longer
  than `PROMPT_STEP_S` for a next token;
- how many threads compute. With other load on a machine, threads wait for each other in every layer,
  and all cores can be three times slower than one (measured). So from time to time a few steps are
  computed with another number, and the faster one stays.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

# Half of what a writer may be kept waiting by somebody else's prompt (0.1 s): steps vary.
PROMPT_STEP_S = 0.05
LEAST_PROMPT_TOKENS = 16
# Before anything is known: quick for a small model, and not long for a large one.
UNKNOWN_PROMPT_TOKENS = 64
_NEWEST = 0.3

PROBE_STEPS = 6
PROBE_EVERY_S = 15.0
PROBE_SOON_S = 3.0
WORTH_SWITCHING = 0.9


class PromptPace:
    """Keeps the steps of writers short while prompts are being read."""

    def __init__(self, prompt_token_s: float | None = None) -> None:
        """`prompt_token_s`: seconds for one token of a prompt, if it was measured."""
        self._token_s = prompt_token_s

    def room(self, writers: int, most: int) -> int:
        """How many tokens of prompts the next step may read beside `writers` who wait for a token."""
        if not writers:
            return most
        if self._token_s is None:
            return min(most, UNKNOWN_PROMPT_TOKENS)
        return max(LEAST_PROMPT_TOKENS, min(most, int(PROMPT_STEP_S / self._token_s)))

    def observe(self, seconds: float, *, prompt_tokens: int) -> None:
        """A step with `prompt_tokens` of prompts has taken `seconds`, its writers included."""
        if prompt_tokens < LEAST_PROMPT_TOKENS:
            return
        newest = seconds / prompt_tokens
        # Later tokens of a prompt cost more, since they look back at more: what is slower counts at
        # once, what is faster only by and by.
        if self._token_s is None or newest > self._token_s:
            self._token_s = newest
        else:
            self._token_s += _NEWEST * (newest - self._token_s)


class ThreadPace:
    """Finds the number of threads that is fastest now, by trying another now and then."""

    def __init__(self, options: Sequence[int], threads: int) -> None:
        """`options` in ascending order; with one there is nothing to find."""
        self._options = sorted({*options, threads})
        self.threads = threads
        self._up = False
        self._until_probe_s = PROBE_SOON_S
        self._size = 0
        self._usual: list[float] = []
        self._probe: int | None = None
        self._probed: list[float] = []

    @property
    def now(self) -> int:
        """With how many threads the next step is to be computed."""
        return self.threads if self._probe is None else self._probe

    def observe(self, seconds: float, *, writers: int) -> None:
        """A step in which `writers` got a token each, and no prompt was read, took `seconds`."""
        if len(self._options) < 2:
            return
        if writers != self._size:
            # Only steps of one size can be compared.
            self._size, self._usual, self._probed, self._probe = writers, [], [], None
        if self._probe is not None:
            self._probed.append(seconds)
            # The first step with other threads also wakes them or lets them go.
            if len(self._probed) > PROBE_STEPS:
                self._decide()
            return
        self._usual = [*self._usual[1 - PROBE_STEPS :], seconds]
        self._until_probe_s -= seconds
        if self._until_probe_s <= 0 and len(self._usual) == PROBE_STEPS:
            self._probe = self._other()

    def _other(self) -> int:
        """A neighbour of the present number, below and above in turn."""
        at = self._options.index(self.threads)
        self._up = not self._up
        low, high = at == 0, at == len(self._options) - 1
        step = 1 if low or (self._up and not high) else -1
        return self._options[at + step]

    def _decide(self) -> None:
        assert self._probe is not None
        faster = median(self._probed[1:]) < WORTH_SWITCHING * median(self._usual)
        if faster:
            self.threads = self._probe
        # What has just changed may have further to go.
        self._until_probe_s = PROBE_SOON_S if faster else PROBE_EVERY_S
        self._probe, self._probed, self._usual = None, [], []
