"""The official `openai` package against Satherd, unchanged, with a prepaid key.

    pip install openai
    satherd up                                   # in another terminal
    python examples/openai_sdk.py
    python examples/openai_sdk.py --key sk-…     # a key that you have already

Without a key, one is bought first: a top-up is an invoice, its preimage shows the key, once. Then
chat, a stream, embeddings and the list of models go through the package as they would to OpenAI;
what each cost stands in `usage.satherd`, and what is left in the balance.
"""

from __future__ import annotations

import argparse
import os
import sys

from openai import APIStatusError, OpenAI
from openai.types import CompletionUsage

from client import Client, SatherdError, SimulatedWallet


def buy_key(router_url: str, amount_msat: int) -> str:
    """A new account with this much on it; its key."""
    with Client(router_url, wallet=SimulatedWallet(router_url)) as client:
        top_up = client.top_up(amount_msat)
    assert top_up.key is not None, "a new top-up has a key to show"
    return top_up.key.as_text()


def charged_msat(usage: CompletionUsage | None) -> int:
    """What a request cost: Satherd's part of OpenAI's usage object."""
    return (usage.model_extra or {})["satherd"]["fee_msat"] if usage else 0


def chat(sdk: OpenAI, model: str) -> None:
    answer = sdk.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": "What is the capital of France?"}],
        max_tokens=40,
    )
    print("chat:", answer.choices[0].message.content)
    print(f"      charged {charged_msat(answer.usage)} msat")


def stream(sdk: OpenAI, model: str) -> None:
    print("stream: ", end="")
    chunks = sdk.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": "Write a poem about the sea."}],
        max_tokens=80,
        stream=True,
        stream_options={"include_usage": True},
        # Priority, and a limit to what it may cost: the fields are Satherd's, the package passes
        # them on.
        extra_headers={"X-Fee-Multiplier": "1.1", "X-Max-Fee-Msat": "100000"},
    )
    usage = None
    for chunk in chunks:
        for choice in chunk.choices:
            print(choice.delta.content or "", end="", flush=True)
            # The chunk that ends the answer carries what was charged for it.
            usage = chunk.usage if choice.finish_reason else usage
    print(f"\n        charged {charged_msat(usage)} msat")


def embed(sdk: OpenAI, model: str | None) -> None:
    if model is None:
        print("embeddings: this router serves no embedding model")
        return
    texts = ["a story about a fox", "a tale of a wolf", "the capital of Italy"]
    answer = sdk.embeddings.create(model=model, input=texts)
    fox, wolf, italy = (entry.embedding for entry in answer.data)
    print(f"embeddings: {len(fox)} numbers each;", end=" ")
    print(f"fox and wolf {cosine(fox, wolf):.2f}, fox and Italy {cosine(fox, italy):.2f}")


def cosine(a: list[float], b: list[float]) -> float:
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return dot / (sum(x * x for x in a) ** 0.5 * sum(y * y for y in b) ** 0.5)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--router-url", default=os.environ.get("SATHERD_ROUTER_URL", "http://127.0.0.1:8000"))
    add("--key", default=os.environ.get("SATHERD_KEY"), help="a prepaid key; else one is bought")
    add("--amount-msat", type=int, default=100_000, help="how much to put on a new key")
    options = parser.parse_args()
    try:
        key = options.key or buy_key(options.router_url, options.amount_msat)
        with Client(options.router_url, key=key) as client:
            info = client.info()
            sdk = OpenAI(base_url=f"{options.router_url}/v1", api_key=key)
            print("models:", ", ".join(model.id for model in sdk.models.list()))
            text_model = info.first_model("text")
            embedding_model = info.first_model("embedding")
            if text_model is not None:
                chat(sdk, text_model.id)
                stream(sdk, text_model.id)
            embed(sdk, embedding_model.id if embedding_model else None)
            simulated = " (simulated)" if info.simulated else ""
            print(f"left on the key: {client.balance().balance_msat} msat{simulated}")
    except (SatherdError, APIStatusError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
