"""An agent that reads a chat, buys an opinion on its mood, and trades on it, on paper.

    satherd up                                              # in another terminal
    python examples/sentiment_agent.py --once               # a chat that comes with the example
    python examples/sentiment_agent.py --chat chat.txt --interval-s 60

At regular intervals it reads the latest lines of a chat (a file, one message per line), asks a
model whether people are positive, negative or neutral about the token, and turns the answer into a
decision: buy, sell or hold. The trades are entries in a ledger on paper; each opinion is paid for
over Lightning (simulated money, on a simulated router) or from a prepaid key.

A model that answers anything else than one of the three words is taken as neutral. The small demo
model does that often: for good opinions, put a worker with a larger one behind the router.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from client import Client, SatherdError, SimulatedWallet

EXAMPLE_CHAT = [
    "anna> the new release is great, so fast",
    "ben> bought more this morning",
    "clara> fees went down again, wonderful",
    "dan> not sure about the roadmap",
]
QUESTION = (
    "Below are messages about {token}. Is their mood positive, negative or neutral?"
    " Answer with that one word.\n\n{chat}\n\nMood:"
)


class Sentiment(StrEnum):
    POSITIVE = "positive"
    NEGATIVE = "negative"
    NEUTRAL = "neutral"


class Decision(StrEnum):
    BUY = "buy"
    SELL = "sell"
    HOLD = "hold"


DECISIONS = {
    Sentiment.POSITIVE: Decision.BUY,
    Sentiment.NEGATIVE: Decision.SELL,
    Sentiment.NEUTRAL: Decision.HOLD,
}


def read_sentiment(answer: str) -> Sentiment:
    """The first of the three words in an answer; neutral when there is none.

    A denied word is not taken at its face: "not positive" is neutral.
    """
    pattern = rf"(\bnot\s+|\bn't\s+)?\b({'|'.join(Sentiment)})\b"
    match = re.search(pattern, answer.lower())
    if match is None or match[1]:
        return Sentiment.NEUTRAL
    return Sentiment(match[2])


@dataclass
class Portfolio:
    """What the agent owns, on paper."""

    cash: int = 1000
    tokens: int = 0
    price: int = 10

    def trade(self, decision: Decision) -> bool:
        """Buy or sell one token; False when there was nothing to do or nothing to do it with."""
        if decision is Decision.BUY and self.cash >= self.price:
            self.cash, self.tokens = self.cash - self.price, self.tokens + 1
            return True
        if decision is Decision.SELL and self.tokens:
            self.cash, self.tokens = self.cash + self.price, self.tokens - 1
            return True
        return False


def latest_lines(chat: Path | None, count: int) -> list[str]:
    if chat is None:
        return EXAMPLE_CHAT[-count:]
    lines = (line.strip() for line in chat.read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line][-count:]


def ask(client: Client, options: argparse.Namespace, lines: list[str]) -> tuple[str, int]:
    """The model's answer, and what it was charged in msat."""
    completion = client.run(
        QUESTION.format(token=options.token, chat="\n".join(lines)),
        model=options.model,
        max_tokens=16,
        temperature=0,
        fee_multiplier="auto",
        max_fee_msat=options.max_fee_msat,
    )
    return completion.text.strip(), completion.charged_msat


def beats(interval_s: float, *, once: bool) -> Iterator[None]:
    """One beat now, and one after each interval unless `once`."""
    yield
    while not once:
        time.sleep(interval_s)
        yield


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--router-url", default=os.environ.get("SATHERD_ROUTER_URL", "http://127.0.0.1:8000"))
    add("--key", default=os.environ.get("SATHERD_KEY"), help="a prepaid key; else simulated money")
    add("--model", help="the router's first, if not given")
    add("--chat", type=Path, help="a file of messages, one per line, read again each time")
    add("--lines", type=int, default=10, help="how many of the latest messages it reads")
    add("--token", default="the token", help="what the chat is about")
    add("--interval-s", type=float, default=60.0)
    add("--once", action="store_true", help="decide once and stop")
    add("--max-fee-msat", type=int, default=50_000, help="for each opinion")
    options = parser.parse_args()
    portfolio = Portfolio()
    wallet = SimulatedWallet(options.router_url)
    with Client(options.router_url, key=options.key, wallet=wallet) as client:
        for _ in beats(options.interval_s, once=options.once):
            try:
                answer, charged_msat = ask(
                    client, options, latest_lines(options.chat, options.lines)
                )
            except (SatherdError, OSError) as error:
                print(f"no opinion this time: {error}", file=sys.stderr)
                if options.once:
                    return 1
                continue
            sentiment = read_sentiment(answer)
            decision = DECISIONS[sentiment]
            outcome = {
                "answer": answer,
                "sentiment": sentiment,
                "decision": decision,
                "traded": portfolio.trade(decision),
                "cash": portfolio.cash,
                "tokens": portfolio.tokens,
                "charged_msat": charged_msat,
            }
            print(json.dumps(outcome), flush=True)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
