"""What a slot remembers: prompts that begin alike are computed once."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.worker_stand_ins import RecordingSink
from worker import demo_model
from worker.engines.llama_decoder import Answer, Decoder, common_prefix
from worker.engines.llama_model import LlamaModel
from worker.engines.llama_pace import PROMPT_STEP_S, PromptPace, ThreadPace
from worker.engines.llama_sampling import plan_sampling, silent_stderr
from worker.protocol import FinishReason, Sampling

SYSTEM = "<|im_start|>system\n" + "You are a helpful assistant. " * 12 + "<|im_end|>\n"
ASK = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
STORY = SYSTEM + ASK.format("Tell me a story about a fox.")
LETTER = SYSTEM + ASK.format("Write a letter to Anna.")
OTHER = ASK.format("What is the capital of France?")


@pytest.fixture(scope="module")
def model() -> Iterator[LlamaModel]:
    model = LlamaModel(demo_model.PATH, gpu_layers=0, on_progress=lambda fraction: True)
    yield model
    model.close()


@pytest.fixture
def decoder(model: LlamaModel) -> Iterator[Decoder]:
    decoder = Decoder(
        model, slots=3, context=1024, threads=ThreadPace([1], 1), prompts=PromptPace()
    )
    yield decoder
    decoder.close()


class Writer:
    """Adds prompts to a decoder, and runs it until they have ended."""

    def __init__(self, model: LlamaModel, decoder: Decoder) -> None:
        self.model = model
        self.decoder = decoder
        self.fed = 0
        self.texts: dict[Answer, str] = {}

    def add(self, text: str, max_tokens: int = 20) -> Answer:
        prompt = self.model.tokenize(text)
        answer = self.decoder.add(
            prompt,
            plan_sampling(self.model, Sampling(temperature=0), None),
            max_tokens=max_tokens,
            stops=(),
            sink=RecordingSink(),
        )
        # What is still to be computed: less than the prompt when something was remembered.
        self.fed = len(answer.pending)
        self.texts[answer] = ""
        return answer

    def step(self) -> None:
        for output in self.decoder.step():
            self.texts[output.answer] += output.text

    def finish(self) -> None:
        while self.decoder.active:
            self.step()

    def write(self, text: str, max_tokens: int = 20) -> str:
        answer = self.add(text, max_tokens)
        self.finish()
        return self.texts[answer]


@pytest.fixture
def writer(model: LlamaModel, decoder: Decoder) -> Writer:
    return Writer(model, decoder)


def test_a_new_prompt_is_computed_whole(writer: Writer, model: LlamaModel):
    writer.add(STORY)
    assert writer.fed == len(model.tokenize(STORY))


def test_the_same_prompt_again_costs_one_token_and_gives_the_same_answer(writer: Writer):
    first = writer.write(STORY)
    assert writer.write(STORY) == first
    assert writer.fed == 1


def test_a_conversation_goes_on_where_it_ended(writer: Writer, model: LlamaModel):
    answer = writer.write(STORY)
    assert answer
    question = "<|im_end|>\n" + ASK.format("Tell me more.")
    writer.add(STORY + answer + question)
    # Its own answer is remembered too, apart from the last token, which was never fed.
    assert writer.fed <= len(model.tokenize(question)) + 2


def test_a_prompt_that_begins_like_another_slots_gets_a_copy(writer: Writer, model: LlamaModel):
    fresh = writer.write(LETTER)
    writer.decoder.drop_all()
    story = writer.add(STORY, max_tokens=200)
    for _ in range(5):
        writer.step()
    letter = writer.add(LETTER)
    assert letter.slot != story.slot
    assert writer.fed < len(model.tokenize(LETTER)) / 2
    writer.finish()
    # Batches of another size round differently, and may part at a near tie: not at once.
    assert writer.texts[letter][:40] == fresh[:40]


def test_a_copy_leaves_the_slot_it_came_from_as_it_was(writer: Writer):
    alone = writer.write(STORY, max_tokens=100)
    writer.decoder.drop_all()
    story = writer.add(STORY, max_tokens=100)
    for _ in range(5):
        writer.step()
    writer.add(LETTER)
    writer.finish()
    assert writer.texts[story][:40] == alone[:40]


def test_what_differs_is_computed_anew_and_not_mixed_up(writer: Writer):
    expected = writer.write(OTHER)
    writer.decoder.drop_all()
    writer.write(STORY)
    assert writer.write(OTHER) == expected


def test_the_slot_that_was_used_least_recently_is_given_up_first(writer: Writer, model: LlamaModel):
    prompts = [
        f"{name} went to the market with a golden key. " * 4 for name in ("Anna", "Ben", "Leo")
    ]
    for prompt in prompts:
        writer.write(prompt)
    writer.write("The sea is blue and the sea is wide. " * 4)
    writer.add(prompts[0])
    assert writer.fed == len(model.tokenize(prompts[0]))
    writer.finish()
    writer.add(prompts[2])
    assert writer.fed == 1


def test_a_slot_is_reused_after_a_cancelled_answer(writer: Writer):
    fresh = writer.write(STORY)
    writer.decoder.drop_all()
    answer = writer.add(STORY, max_tokens=300)
    for _ in range(8):
        writer.step()
    answer.sink.cancel()  # pyright: ignore[reportAttributeAccessIssue]
    endings = [output.ending for output in writer.decoder.step()]
    assert endings == [FinishReason.CANCELLED]
    assert writer.write(STORY) == fresh
    assert writer.fed == 1


def test_the_prefix_of_two_lists_is_found():
    cases = [([], [], 0), ([1], [], 0), ([1, 2], [1, 2], 2), ([1, 2, 3], [1, 2, 4, 5], 2)]
    for one, other, expected in cases:
        assert common_prefix(one, other) == common_prefix(other, one) == expected


def test_stderr_is_quiet_for_a_moment_and_then_back(capfd: pytest.CaptureFixture[str]):
    with silent_stderr():
        os.write(2, b"hidden\n")
    os.write(2, b"shown\n")
    assert capfd.readouterr().err == "shown\n"


def test_a_process_without_stderr_can_be_quiet_as_well():
    code = (
        "import os; from worker.engines.llama_sampling import silent_stderr\n"
        "os.close(2)\n"
        "with silent_stderr(): print('fine')"
    )
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=True)
    assert done.stdout == b"fine\n"


def test_a_long_prompt_is_read_in_parts_while_others_write(model: LlamaModel):
    """The writer gets a token in every step, and no step reads more than it may."""
    slow = PromptPace(prompt_token_s=PROMPT_STEP_S / 20)
    decoder = Decoder(model, slots=2, context=1024, threads=ThreadPace([1], 1), prompts=slow)
    writer = Writer(model, decoder)
    story = writer.add(STORY, max_tokens=100)
    writer.step()
    writer.step()
    letter = writer.add(SYSTEM * 8 + LETTER)
    parts = []
    while letter.pending and not letter.made:
        before, made = len(letter.pending), story.made
        writer.step()
        assert story.made == made + 1
        parts.append(before - len(letter.pending))
        # What the steps really took is no matter here.
        slow.observe(PROMPT_STEP_S, prompt_tokens=20)
    decoder.close()
    assert len(parts) > 5
    assert max(parts) < 60


def test_a_cancelled_answer_takes_no_part_in_the_next_step(writer: Writer):
    answer = writer.add(STORY, max_tokens=100)
    for _ in range(3):
        writer.step()
    made = answer.made
    assert isinstance(answer.sink, RecordingSink)
    answer.sink.cancel()
    [output] = writer.decoder.step()
    assert (output.answer, output.ending) == (answer, FinishReason.CANCELLED)
    assert answer.made == made
    assert not writer.decoder.active
