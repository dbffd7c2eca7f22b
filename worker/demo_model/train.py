# pyright: reportMissingImports=false
"""Trains the demo model on a CPU, within a time that you give it.

    python -m worker.demo_model.train OUT --minutes 15 [--go-on-from EARLIER]

Writes OUT/tokenizer.json and OUT/model.pt; `export_gguf` makes a GGUF file of them. Needs torch,
tokenizers and numpy. One thread is often faster than two: on a busy machine they wait for each
other.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from random import Random

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from worker.demo_model.corpus import Message, conversation
from worker.demo_model.network import Network, Shape

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
VOCAB = 1536
VOCAB_CONVERSATIONS = 20_000
ROW_TOKENS = 512
ROWS = 8
HELD_OUT = 500
WARM_UP_STEPS = 50
REPORT_EVERY_S = 30
# Questions and frames are learned a little, answers in full.
REST_WEIGHT = 0.1

Example = tuple[list[int], list[float]]


def parts_of(message: Message) -> tuple[tuple[str, float], ...]:
    """A message as ChatML, in pieces with their weight in the loss."""
    answer = 1.0 if message["role"] == "assistant" else REST_WEIGHT
    return (
        (f"<|im_start|>{message['role']}\n", REST_WEIGHT),
        (message["content"] + "<|im_end|>", answer),
        ("\n", REST_WEIGHT),
    )


def train_tokenizer(conversations: Sequence[list[Message]]) -> Tokenizer:
    """Byte-level BPE of the corpus: every byte is a token, so that no text is unknown."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (message["content"] for talk in conversations for message in talk)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, conversations: Sequence[list[Message]]) -> list[Example]:
    """Tokens of each conversation and their weights, cut at a row's length."""
    pieces = [piece for talk in conversations for message in talk for piece in parts_of(message)]
    encoded = iter(tokenizer.encode_batch([text for text, _ in pieces]))
    weights = iter(weight for _, weight in pieces)
    examples: list[Example] = []
    for talk in conversations:
        ids: list[int] = []
        marks: list[float] = []
        for _ in range(len(talk) * len(parts_of(talk[0]))):
            part = next(encoded).ids
            ids += part
            marks += [next(weights)] * len(part)
        examples.append((ids[:ROW_TOKENS], marks[:ROW_TOKENS]))
    return examples


def pack(examples: Sequence[Example]) -> tuple[Tensor, Tensor]:
    """Whole conversations in rows of ROW_TOKENS + 1, padded: the last token is only predicted."""
    rows: list[Example] = []
    ids: list[int] = []
    marks: list[float] = []
    for more_ids, more_marks in examples:
        if len(ids) + len(more_ids) > ROW_TOKENS + 1:
            rows.append((ids, marks))
            ids, marks = [], []
        ids, marks = ids + more_ids, marks + more_marks
    rows.append((ids, marks))
    length = ROW_TOKENS + 1
    return (
        torch.tensor([ids + [0] * (length - len(ids)) for ids, _ in rows]),
        torch.tensor([marks + [0.0] * (length - len(marks)) for _, marks in rows]),
    )


def weighted_loss(network: Network, rows: Tensor, weights: Tensor) -> Tensor:
    """Mean cross entropy of the next token."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = network(rows[:, :-1])
    loss = F.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten(), reduction="none")
    flat = weights[:, 1:].flatten()
    return (loss * flat).sum() / flat.sum()


def validate(network: Network, rows: Tensor, weights: Tensor) -> float:
    """Loss of the answers alone, on conversations that were not trained on."""
    network.eval()
    with torch.no_grad():
        losses = [
            weighted_loss(network, rows[at : at + 16], (weights[at : at + 16] == 1).float()).item()
            for at in range(0, len(rows), 16)
        ]
    network.train()
    return sum(losses) / len(losses)


def batches(examples: list[Example], rng: Random) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches without end, shuffled anew each time round."""
    while True:
        rng.shuffle(examples)
        rows, weights = pack(examples)
        for at in range(0, len(rows) - ROWS, ROWS):
            yield rows[at : at + ROWS], weights[at : at + ROWS]


def learning_rate(highest: float, step: int, done: float) -> float:
    """Up within the first steps, then down on a cosine; `done` is the share of the time used."""
    cosine = 0.5 * (1 + math.cos(math.pi * done))
    return highest * min(1, (step + 1) / WARM_UP_STEPS) * (0.02 + 0.98 * cosine)


def train(network: Network, examples: list[Example], *, minutes: float, highest: float) -> None:
    """Train until the time is over, and print how it goes."""
    held_rows, held_weights = pack(examples[:HELD_OUT])
    flat = [p for p in network.parameters() if p.dim() == 1]
    matrices = [p for p in network.parameters() if p.dim() > 1]
    groups = [
        {"params": matrices, "weight_decay": 0.05},
        {"params": flat, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=highest, betas=(0.9, 0.98), fused=True)
    began = told_at = time.monotonic()
    for step, (rows, weights) in enumerate(batches(examples[HELD_OUT:], Random(2))):
        now = time.monotonic()
        done = (now - began) / 60 / minutes
        if done >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(highest, step, done)
        loss = weighted_loss(network, rows, weights)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        if now - told_at > REPORT_EVERY_S:
            told_at = now
            speed = (step + 1) * ROWS * ROW_TOKENS / (now - began)
            print(f"step {step}: loss {loss.item():.3f}, {speed:.0f} tokens/s", flush=True)
    print(f"validation loss of answers: {validate(network, held_rows, held_weights):.4f}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Trains the demo model; see the file's docstring.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("--go-on-from", type=Path, help="a folder of an earlier run")
    parser.add_argument("--conversations", type=int, default=80_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    rng = Random(options.seed)
    conversations = [conversation(rng) for _ in range(options.conversations)]
    earlier: Path | None = options.go_on_from
    if earlier is not None:
        tokenizer = Tokenizer.from_file(str(earlier / "tokenizer.json"))
    else:
        tokenizer = train_tokenizer(conversations[:VOCAB_CONVERSATIONS])
    options.out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(options.out / "tokenizer.json"))
    network = Network(Shape())
    if earlier is not None:
        network.load_state_dict(torch.load(earlier / "model.pt", map_location="cpu")["weights"])
    examples = encode(tokenizer, conversations)
    print(f"{sum(len(ids) for ids, _ in examples) / 1e6:.1f} million tokens", flush=True)
    train(network, examples, minutes=options.minutes, highest=options.learning_rate)
    torch.save(
        {"weights": network.state_dict(), "shape": asdict(Shape())}, options.out / "model.pt"
    )


if __name__ == "__main__":
    main()
