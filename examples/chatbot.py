"""A chatbot that buys every reply: it listens to a chat room and answers in character.

    satherd up                                   # in another terminal
    python examples/chatbot.py                   # talk to it; an empty line or Ctrl-D ends it
    python examples/chatbot.py --character "You are a pirate." --context 6
    tail -f room.txt | python examples/chatbot.py --probability 0.3 >> replies.txt

The room is standard input, one message per line, `nick> message` or just a message; what the bot
says goes to standard output. It keeps the latest messages as context, pays for each reply over
Lightning as it is needed (simulated money, on a simulated router), or from a prepaid key, and
offers what the queue asks for: the base fee while nobody waits, a little more when others do.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
from collections import deque
from dataclasses import dataclass

from client import Client, SatherdError, SimulatedWallet
from client.events import Position


@dataclass(frozen=True)
class Message:
    nick: str
    text: str


def parse_line(line: str, *, default_nick: str = "you") -> Message:
    """`nick> message`; a line without a nick is from `default_nick`."""
    nick, separator, text = line.strip().partition("> ")
    if separator and nick and " " not in nick:
        return Message(nick, text)
    return Message(default_nick, line.strip())


def prompt_of(character: str, latest: list[Message], *, own_nick: str) -> list[dict[str, str]]:
    """The character, then the latest messages; nicks only where several people talk."""
    nicks = {message.nick for message in latest if message.nick != own_nick}
    messages = [{"role": "system", "content": character}] if character else []
    for message in latest:
        own = message.nick == own_nick
        named = len(nicks) > 1 and not own
        text = f"{message.nick}: {message.text}" if named else message.text
        messages.append({"role": "assistant" if own else "user", "content": text})
    return messages


class Chatbot:
    """Remembers the room, decides whether to speak, and buys what it says."""

    def __init__(self, client: Client, options: argparse.Namespace) -> None:
        self._client = client
        self._options = options
        self._latest: deque[Message] = deque(maxlen=options.context)
        self.label = " (simulated)" if client.info().simulated else ""
        self.spent_msat = 0

    def hear(self, message: Message) -> None:
        """Take in a message, and perhaps answer it."""
        if message.nick == self._options.name:
            return  # its own words, echoed by the room
        self._latest.append(message)
        if random.random() < self._options.probability:
            self.speak()

    def speak(self) -> None:
        messages = prompt_of(
            self._options.character, list(self._latest), own_nick=self._options.name
        )
        stream = self._client.stream(
            messages,
            model=self._options.model,
            max_tokens=self._options.max_tokens,
            fee_multiplier="auto",
            max_fee_msat=self._options.max_fee_msat,
        )
        print(f"{self._options.name}> ", end="", flush=True)
        with stream:
            for event in stream:
                if isinstance(event, Position) and event.position > 1:
                    print(f"(at place {event.position})", file=sys.stderr)
                print(getattr(event, "text", ""), end="", flush=True)
        print()
        self._latest.append(Message(self._options.name, stream.completion.text))
        charged_msat = stream.completion.charged_msat
        self.spent_msat += charged_msat
        print(f"charged {charged_msat} msat{self.label}", file=sys.stderr)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--router-url", default=os.environ.get("SATHERD_ROUTER_URL", "http://127.0.0.1:8000"))
    add("--key", default=os.environ.get("SATHERD_KEY"), help="a prepaid key; else simulated money")
    add("--model", help="the router's first, if not given")
    add("--name", default="satherd", help="the bot's nick in the room")
    add("--character", default="You are a friendly digital farmer. Be brief and funny.")
    add("--context", type=int, default=3, help="how many of the latest messages it reads")
    add("--probability", type=float, default=1.0, help="how likely it answers a message, 0 to 1")
    add("--max-tokens", type=int, default=120)
    add("--max-fee-msat", type=int, default=100_000, help="for each reply")
    options = parser.parse_args()
    wallet = SimulatedWallet(options.router_url)
    with Client(options.router_url, key=options.key, wallet=wallet) as client:
        try:
            bot = Chatbot(client, options)
        except SatherdError as error:
            print(f"cannot talk to the router: {error} [{error.code}]", file=sys.stderr)
            return 1
        for line in sys.stdin:
            if not line.strip():
                break
            try:
                bot.hear(parse_line(line))
            except SatherdError as error:
                print(f"no reply: {error} [{error.code}]", file=sys.stderr)
    print(f"spent {bot.spent_msat} msat{bot.label}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
