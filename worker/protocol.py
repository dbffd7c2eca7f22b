"""Every message between a router and a worker, and the job they are about.

A worker opens `WS /worker`, sends one `Registration`, and is answered with `Registered` or
`Refused`. From then on

    router -> worker   assign, cancel, drain
    worker -> router   chunk, chunks, finished, failed, ready

Every frame about work names `(job_id, attempt)`. A frame of an attempt that is no longer current is
dropped by whoever receives it. Frames are JSON objects with a `type`; unknown keys are ignored, so
that either side may be newer than the other.

Only pydantic and the standard library are imported here: the router needs this module, and must not
pull in an engine with it.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    TypeAdapter,
    field_validator,
    model_validator,
)

PROTOCOL = "satherd/1"


class Kind(StrEnum):
    """What a job produces."""

    CHAT = "chat"
    COMPLETION = "completion"
    EMBEDDING = "embedding"
    IMAGE = "image"
    IMAGE_EDIT = "image_edit"


class ModelKind(StrEnum):
    """What a served model is able to do; chat and completion both need `text`."""

    TEXT = "text"
    EMBEDDING = "embedding"
    IMAGE = "image"
    IMAGE_EDIT = "image_edit"


MODEL_KIND: dict[Kind, ModelKind] = {
    Kind.CHAT: ModelKind.TEXT,
    Kind.COMPLETION: ModelKind.TEXT,
    Kind.EMBEDDING: ModelKind.EMBEDDING,
    Kind.IMAGE: ModelKind.IMAGE,
    Kind.IMAGE_EDIT: ModelKind.IMAGE_EDIT,
}
# Only these say something token by token, and are charged by it.
TEXT_KINDS = frozenset({Kind.CHAT, Kind.COMPLETION})
IMAGE_KINDS = frozenset({Kind.IMAGE, Kind.IMAGE_EDIT})


class Sampling(BaseModel):
    """How tokens are drawn. None everywhere means the engine's default."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)

    temperature: float | None = Field(default=None, ge=0, le=5)
    top_p: float | None = Field(default=None, ge=0, le=1)
    top_k: int | None = Field(default=None, ge=0, le=1_000_000)
    min_p: float | None = Field(default=None, ge=0, le=1)
    repeat_penalty: float | None = Field(default=None, ge=0, le=10)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    logit_bias: dict[str, float] | None = None


class Conditions(BaseModel):
    """What a client asks of the worker (QueenBee's `gpu_filter`) and of its speed. The router sees to
    it; a worker need not look. `worker`: a public id or key. Times in seconds: for the whole
    attempt, and for each token of a stream."""

    model_config = ConfigDict(extra="ignore")

    min_version: str | None = None
    capabilities: list[str] = []
    worker: str | None = None
    slug: str | None = None
    user_id: str | None = None
    timeout_s: float | None = None
    token_s: float | None = None


class ChatSpec(BaseModel):
    """One chat answer. `messages` are OpenAI's, already checked by the front door."""

    model_config = ConfigDict(extra="ignore")

    kind: Literal[Kind.CHAT] = Kind.CHAT
    model: str
    messages: list[dict[str, Any]]
    max_tokens: int
    stop: list[str] = []
    sampling: Sampling = Sampling()
    stream: bool = False
    conditions: Conditions | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Any = None
    response_format: dict[str, Any] | None = None


class CompletionSpec(BaseModel):
    """One continuation of `prompt`, which is text or token ids of the model.

    `kobold`: samplers that only KoboldAI's family of engines has, by its own names.
    """

    model_config = ConfigDict(extra="ignore")

    kind: Literal[Kind.COMPLETION] = Kind.COMPLETION
    model: str
    prompt: str | list[int]
    suffix: str | None = None
    max_tokens: int
    stop: list[str] = []
    sampling: Sampling = Sampling()
    stream: bool = False
    conditions: Conditions | None = None
    echo: bool = False
    kobold: dict[str, Any] | None = None


class EmbeddingSpec(BaseModel):
    """One vector for each entry of `input`; an entry is text or token ids."""

    model_config = ConfigDict(extra="ignore")

    kind: Literal[Kind.EMBEDDING] = Kind.EMBEDDING
    model: str
    input: list[str | list[int]]
    max_tokens: int = 0
    stream: bool = False
    conditions: Conditions | None = None


class ImageSpec(BaseModel):
    """One picture of `prompt`, so many pixels wide and high.

    `response_format`: `b64_json` must bring the picture itself, `url` may bring where it lies, None
    leaves it to the worker. `steps` None: the engine's own number.
    """

    model_config = ConfigDict(extra="ignore")

    kind: Literal[Kind.IMAGE] = Kind.IMAGE
    model: str
    prompt: str
    negative_prompt: str | None = None
    width: int
    height: int
    steps: int | None = None
    seed: int | None = None
    response_format: Literal["url", "b64_json"] | None = None
    max_tokens: int = 0
    stream: bool = False
    conditions: Conditions | None = None


class ImageEditSpec(BaseModel):
    """`image` changed as `prompt` says; `image` and `mask` are an https or a data URL.

    `width` and `height` None: as the given picture.
    """

    model_config = ConfigDict(extra="ignore")

    kind: Literal[Kind.IMAGE_EDIT] = Kind.IMAGE_EDIT
    model: str
    prompt: str
    image: str
    mask: str | None = None
    negative_prompt: str | None = None
    width: int | None = None
    height: int | None = None
    steps: int | None = None
    seed: int | None = None
    response_format: Literal["url", "b64_json"] | None = None
    max_tokens: int = 0
    stream: bool = False
    conditions: Conditions | None = None


JobSpec = Annotated[
    ChatSpec | CompletionSpec | EmbeddingSpec | ImageSpec | ImageEditSpec,
    Field(discriminator="kind"),
]
JOB_SPEC: TypeAdapter[JobSpec] = TypeAdapter(JobSpec)


# --- registration -------------------------------------------------------------------------------


class Gpu(BaseModel):
    """One accelerator; `memory` in MB."""

    model_config = ConfigDict(extra="ignore")

    name: str
    uuid: str | None = None
    memory: float | None = None
    clock: int | None = None
    clock_unit: str | None = None


class ServedModel(BaseModel):
    """A model that a worker serves. Lengths are in tokens; `max_tokens` caps one answer."""

    model_config = ConfigDict(extra="ignore")

    id: str = Field(min_length=1, max_length=200)
    kind: ModelKind = ModelKind.TEXT
    context_length: int = Field(default=2048, ge=1, le=100_000_000)
    max_tokens: int = Field(default=0, ge=0, le=100_000_000)


class Held(BaseModel):
    """An attempt that a worker has in hand, or has just ended, from before its line broke."""

    job_id: str = Field(max_length=100, pattern=r"\A[\x21-\x7e]+\z")
    attempt: int = Field(ge=1, le=1_000_000)


class Registration(BaseModel):
    """The first frame of a worker. The hardware fields are QueenBee's (QB-W2), all optional.

    `holding`: what it was working on when its line broke. What the answer names in `resume` it says
    again from the beginning, chunk 0 first, and goes on with it; the rest it stops.
    """

    model_config = ConfigDict(extra="ignore")

    protocol: Literal["satherd/1"] = PROTOCOL
    worker_key: str = Field(min_length=32, max_length=128, repr=False)
    name: str | None = Field(default=None, max_length=100)
    ln_url: str | None = Field(default=None, max_length=2000)
    models: list[ServedModel] = Field(min_length=1, max_length=200)
    slots: int = Field(default=1, ge=1, le=1024)
    min_fees: dict[str, dict[str, int]] | None = None
    holding: list[Held] = Field(default=[], max_length=2000)
    worker_version: str | None = Field(default=None, max_length=50)
    cpu_count: int | None = None
    disk_space: int | None = None
    vram: int | None = None
    nv_gpu_count: int | None = None
    nv_driver_version: str | None = None
    nv_gpus: list[Gpu] = []
    cl_driver_version: str | None = None
    cl_gpus: list[Gpu] = []


class Registered(BaseModel):
    type: Literal["registered"] = "registered"
    worker_id: str
    ln_url: str | None
    payable: bool
    commission_ppm: int
    resume: list[Held] = []


class Refused(BaseModel):
    """The registration is not accepted; the socket closes after it.

    `retryable` False tells the worker that trying again with the same settings is pointless.
    """

    type: Literal["refused"] = "refused"
    code: str
    message: str
    retryable: bool = False


# --- router -> worker ---------------------------------------------------------------------------


class Assign(BaseModel):
    type: Literal["assign"] = "assign"
    job_id: str
    attempt: int
    lease_s: int
    job: JobSpec


class Cancel(BaseModel):
    """Stop this attempt; the worker answers `finished` with reason `cancelled` and its counts."""

    type: Literal["cancel"] = "cancel"
    job_id: str
    attempt: int


class Drain(BaseModel):
    """Take no more jobs; finish what is held."""

    type: Literal["drain"] = "drain"


RouterFrame = Annotated[Registered | Refused | Assign | Cancel | Drain, Field(discriminator="type")]
ROUTER_FRAME: TypeAdapter[RouterFrame] = TypeAdapter(RouterFrame)


# --- worker -> router ---------------------------------------------------------------------------


# More than any answer has; it keeps what a worker says within the columns of a database.
MOST_TOKENS = 1_000_000_000
# A picture in base64; a frame of the socket, which is no larger than 64 MiB, must hold it.
MOST_IMAGE_CHARACTERS = 32 << 20


class Usage(BaseModel):
    """Token counts by the model's own tokenizer."""

    prompt_tokens: int = Field(default=0, ge=0, le=MOST_TOKENS)
    completion_tokens: int = Field(default=0, ge=0, le=MOST_TOKENS)


class FinishReason(StrEnum):
    STOP = "stop"
    LENGTH = "length"
    TOOL_CALLS = "tool_calls"
    CANCELLED = "cancelled"


class FailureCode(StrEnum):
    """Why an attempt failed, and so who is to blame.

    PROMPT_TOO_LONG and BAD_REQUEST lie in the job; RETURNED is a worker that shuts down; the rest
    lies in the worker.
    """

    PROMPT_TOO_LONG = "prompt_too_long"
    BAD_REQUEST = "bad_request"
    RETURNED = "returned"
    ENGINE_ERROR = "engine_error"
    MODEL_NOT_SERVED = "model_not_served"
    OVERLOADED = "overloaded"


class CalledFunction(BaseModel):
    """A piece of a function's name and of its arguments."""

    model_config = ConfigDict(extra="allow")

    name: str | None = None
    arguments: str | None = None


class ToolCall(BaseModel):
    """A piece of the call with this `index`."""

    model_config = ConfigDict(extra="allow")

    index: int | None = Field(default=None, ge=0, le=1000)
    id: str | None = None
    type: str | None = None
    function: CalledFunction | None = None


# How deep a delta may be nested: whoever writes it as JSON must not fail at it.
MOST_NESTED = 100


def is_deep(value: Any) -> bool:
    """Whether a JSON value is nested deeper than MOST_NESTED."""
    level = [value]
    for _ in range(MOST_NESTED):
        inner: list[Any] = []
        for outer in level:
            if isinstance(outer, dict):
                inner.extend(outer.values())
            elif isinstance(outer, list):
                inner.extend(outer)
        if not inner:
            return False
        level = inner
    return True


class Delta(BaseModel):
    """OpenAI's streamed delta, as far as anybody has to read it."""

    model_config = ConfigDict(extra="allow")

    content: str | None = None
    tool_calls: list[ToolCall] | None = None


class Chunk(BaseModel):
    """New output of one attempt. `seq` counts the chunks of the attempt from 0.

    `text` is what to append to the answer. `delta` is an OpenAI delta for what is not text (tool
    calls). `tokens` is how many tokens the model produced for it; None when the engine cannot say.
    """

    type: Literal["chunk"] = "chunk"
    job_id: str
    attempt: int
    seq: int
    text: str = ""
    delta: dict[str, Any] | None = None
    tokens: int | None = Field(default=None, ge=0, le=MOST_TOKENS)

    @field_validator("delta")
    @classmethod
    def _is_a_delta(cls, delta: dict[str, Any] | None) -> dict[str, Any] | None:
        # Checked, and passed on as it is.
        if delta is not None:
            if is_deep(delta):
                raise ValueError("nested too deeply")
            Delta.model_validate(delta, strict=True)
        return delta


class Chunks(BaseModel):
    """Several chunks in one frame, as a batched engine produces them: one step, one frame.

    Items are `[job_id, attempt, seq, text, tokens]`: arrays, since names would be most of it.
    """

    type: Literal["chunks"] = "chunks"
    items: list[tuple[str, int, int, str, int | None]]


class Picture(BaseModel):
    """A picture in base64, or the http(s) URL where it lies."""

    model_config = ConfigDict(extra="ignore")

    b64_json: str | None = Field(
        default=None,
        min_length=1,
        max_length=MOST_IMAGE_CHARACTERS,
        pattern=r"\A[A-Za-z0-9+/]+={0,2}\z",
        repr=False,
    )
    url: str | None = Field(
        default=None, max_length=4000, pattern=r"\Ahttps?://[\x21-\x7e]+\z", repr=False
    )
    revised_prompt: str | None = Field(default=None, max_length=32_000, repr=False)

    @model_validator(mode="after")
    def _is_there(self) -> Picture:
        if self.b64_json is None and self.url is None:
            raise ValueError("a picture needs b64_json or url")
        # With the pattern this is what makes it decodable, without decoding it.
        if self.b64_json is not None and len(self.b64_json) % 4:
            raise ValueError("b64_json is cut off")
        return self


class Finished(BaseModel):
    """The attempt has ended. `usage` None: the engine gave no counts.

    `data`: the vectors of an embedding job. `images`: the one picture of an image job.
    """

    type: Literal["finished"] = "finished"
    job_id: str
    attempt: int
    finish_reason: FinishReason
    usage: Usage | None = None
    data: list[list[FiniteFloat]] | None = None
    images: list[Picture] | None = Field(default=None, max_length=1)


class Failed(BaseModel):
    """The attempt has failed. `message` is for the operator's eyes and the attempt's record."""

    type: Literal["failed"] = "failed"
    job_id: str
    attempt: int
    code: FailureCode
    message: str = Field(default="", max_length=2000)
    retryable: bool = True


class Ready(BaseModel):
    """How many further jobs the worker can take now."""

    type: Literal["ready"] = "ready"
    slots_free: int


WorkerFrame = Annotated[Chunk | Chunks | Finished | Failed | Ready, Field(discriminator="type")]
WORKER_FRAME: TypeAdapter[WorkerFrame] = TypeAdapter(WorkerFrame)
