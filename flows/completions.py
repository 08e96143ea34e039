"""OpenAI's chat completions over the project's own sampler: the web application that `python -m flows.serve` runs.

Requests are answered one after another, in the order in which they come; the choices of one (its `n`) are sampled
together. What can't be done is refused in OpenAI's form of errors, never ignored. Messages become tokens as in every
stage (model/text/dialogue.py): `</s>` in a message is text, and a message with a tag such as `[INST]` is refused, so
none can pass for another's turn.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import threading
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware

from flows import chat
from flows.requests import Asked, StreamOptions
from model.network.transformer import Llama
from model.sampling.sampler import Sampling, sample
from model.text.dialogue import decode_answer, encode_prompt
from model.text.tokenizer import Tokenizer

SECONDS_BETWEEN_LOOKS = 0.2  # whether the client is still there
END = "data: [DONE]\n\n"


class RefusedError(Exception):
    """Raised for a request that can't be answered; becomes OpenAI's form of an error."""

    def __init__(self, message: str, param: str | None, code: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.message, self.param, self.code, self.status = message, param, code, status


class EndedError(Exception):
    """Raised while tokens are drawn when nobody needs more of them."""


@dataclass
class Endpoint:
    """A model with what it needs to answer."""

    name: str
    model: Llama
    tokenizer: Tokenizer
    drawing: chat.Params
    max_choices: int
    created: int = field(default_factory=lambda: int(time.time()))
    # one thread: the model is asked by one request at a time, and the others wait in the order in which they came
    worker: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(max_workers=1))
    is_closing: threading.Event = field(default_factory=threading.Event)  # the server is being stopped


@dataclass
class Choice:
    """One answer while it grows; what may be the beginning of a text to stop at is not shown yet."""

    ids: list[int] = field(default_factory=list)
    shown: str = ""
    finish_reason: Literal["stop", "length"] | None = None

    def add(self, token: int, tokenizer: Tokenizer, stop: Sequence[str], room: int) -> str:
        """Take a token that was drawn; return the text that can be shown now. `room`: most tokens of an answer."""
        self.ids.append(token)
        if token == tokenizer.eos_id:
            self.finish_reason = "stop"
        elif len(self.ids) == room:
            self.finish_reason = "length"
        text = decode_answer(self.ids, tokenizer) if self.finish_reason else chat.visible(self.ids, tokenizer)
        places = [text.find(each) for each in stop if each in text]
        if places:
            self.finish_reason = "stop"
            text = text[: min(places)].rstrip()
        elif not self.finish_reason:
            held = max((overlap(text, each) for each in stop), default=0)
            text = text[: len(text) - held].rstrip()
        piece = text[len(self.shown) :]
        self.shown += piece
        return piece


def overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of `text` that `stop` begins with."""
    return next((size for size in range(min(len(text), len(stop)), 0, -1) if text.endswith(stop[:size])), 0)


@dataclass
class Answer:
    """What is asked, as the sampler reads it, and how the client is told."""

    prompt: list[int]
    sampling: Sampling
    stop: list[str]
    seed: int
    choices: list[Choice]
    loop: asyncio.AbstractEventLoop
    # a choice's number and new text, an error, or None at the end
    events: asyncio.Queue[tuple[int, str] | Exception | None] = field(default_factory=asyncio.Queue)
    is_left: threading.Event = field(default_factory=threading.Event)  # the client is gone

    def tell(self, event: tuple[int, str] | Exception | None) -> None:
        """Hand an event to the client's coroutine, from the worker's thread."""
        self.loop.call_soon_threadsafe(self.events.put_nowait, event)

    @property
    def usage(self) -> dict[str, int]:
        """Tokens that were read and drawn, EOS included."""
        drawn = sum(len(choice.ids) for choice in self.choices)
        read = len(self.prompt)
        return {"prompt_tokens": read, "completion_tokens": drawn, "total_tokens": read + drawn}


# --- from a request to tokens ---


def prepare(endpoint: Endpoint, asked: Asked) -> Answer:
    """Return what is to be sampled. Raises RefusedError for what can't be answered."""
    if asked.model != endpoint.name:
        raise RefusedError(
            f"the model `{asked.model}` does not exist: this server has `{endpoint.name}`",
            "model", "model_not_found", 404,
        )  # fmt: skip
    if asked.n > endpoint.max_choices:
        raise RefusedError(f"n is {asked.n}: at most {endpoint.max_choices} (serve.max_choices of params.yaml)", "n")
    try:
        prompt = encode_prompt([turn.message() for turn in asked.messages], endpoint.tokenizer)
    except ValueError as error:
        raise RefusedError(str(error), "messages") from None
    context = endpoint.model.config.max_position_embeddings
    if len(prompt) >= context:
        raise RefusedError(
            f"the messages have {len(prompt)} tokens and leave no room for an answer: this model's context is "
            f"{context} tokens; shorten them",
            "messages", "context_length_exceeded",
        )  # fmt: skip
    drawing = endpoint.drawing
    limit = asked.max_completion_tokens or asked.max_tokens or drawing.max_new_tokens
    sampling = Sampling(
        temperature=drawing.temperature if asked.temperature is None else asked.temperature,
        top_p=asked.top_p or drawing.top_p,
        top_k=drawing.top_k if asked.top_k is None else asked.top_k,
        max_new_tokens=min(limit, context - len(prompt)),
    )
    seed = secrets.randbits(64) if asked.seed is None else asked.seed % 2**64
    choices = [Choice() for _ in range(asked.n)]
    return Answer(prompt, sampling, asked.stop, seed, choices, asyncio.get_running_loop())


def draw(endpoint: Endpoint, answer: Answer) -> None:
    """Sample an answer's choices in the worker, telling each piece of text; end early when the client has gone."""

    def is_over() -> bool:
        return answer.is_left.is_set() or endpoint.is_closing.is_set()

    def take(prompt: int, number: int, token: int) -> None:
        if is_over():
            raise EndedError
        choice = answer.choices[number]
        if choice.finish_reason is None:  # else a text to stop at has ended it, and others still grow
            piece = choice.add(token, endpoint.tokenizer, answer.stop, answer.sampling.max_new_tokens)
            answer.tell((number, piece))
        if all(each.finish_reason for each in answer.choices):
            raise EndedError

    try:
        if not is_over():  # the client may have gone while it waited
            sample(
                endpoint.model, [answer.prompt], answer.sampling, num_samples=len(answer.choices),
                eos_id=endpoint.tokenizer.eos_id, seeds=[answer.seed], max_rows=len(answer.choices),
                description=None, on_token=take,
            )  # fmt: skip
    except EndedError:
        pass
    except Exception as error:  # noqa: BLE001 - the client is told, in place of an answer
        answer.tell(error)
    answer.tell(None)


async def events_of(endpoint: Endpoint, answer: Answer, request: Request) -> AsyncIterator[tuple[int, str]]:
    """Yield the pieces of an answer; when the client has gone, or the server is stopped, sampling ends.

    Raises the error that sampling ended with.
    """
    endpoint.worker.submit(draw, endpoint, answer)
    looked = time.monotonic()
    try:
        while True:
            if time.monotonic() - looked > SECONDS_BETWEEN_LOOKS:
                if await request.is_disconnected():
                    return
                looked = time.monotonic()
            try:
                event = await asyncio.wait_for(answer.events.get(), SECONDS_BETWEEN_LOOKS)
            except TimeoutError:
                continue
            if event is None:
                return
            if isinstance(event, Exception):
                raise event
            yield event
    finally:
        answer.is_left.set()


# --- from pieces to OpenAI's forms ---


def form_of(error: Exception) -> tuple[int, dict[str, Any]]:
    """Return an error's status and OpenAI's form of it."""
    kind, param, code, status, message = "invalid_request_error", None, None, 400, str(error)
    if isinstance(error, RefusedError):
        param, code, status = error.param, error.code, error.status
    elif isinstance(error, RequestValidationError):
        first = error.errors()[0]
        place = [str(each) for each in first["loc"] if each != "body"]
        param = ".".join(place) or None
        message = f"{param or 'the request'}: {first['msg']}"
        if first["type"] == "extra_forbidden":
            code, message = "unsupported_parameter", f"{param} is not supported here with this value: leave it out"
    elif isinstance(error, HTTPException):
        status, message = error.status_code, f"{error.detail}: this server has /v1/models and /v1/chat/completions"
    else:
        kind, status, message = "server_error", 500, f"{type(error).__name__}: {error}"
    return status, {"error": {"message": message, "type": kind, "param": param, "code": code}}


def line(value: Any) -> str:
    """Return a line of a stream."""
    return f"data: {json.dumps(value)}\n\n"


async def stream(endpoint: Endpoint, answer: Answer, request: Request, options: StreamOptions) -> AsyncIterator[str]:
    """Yield the lines of a streamed answer; an error becomes the last one."""
    head = header(endpoint, "chat.completion.chunk")
    usage = {"usage": None} if options.include_usage else {}

    def chunk(number: int, delta: dict[str, str]) -> str:
        reason = None if delta else answer.choices[number].finish_reason
        return line({**head, "choices": [{"index": number, "delta": delta, "finish_reason": reason}], **usage})

    for number in range(len(answer.choices)):
        yield chunk(number, {"role": "assistant", "content": ""})
    try:
        async for number, piece in events_of(endpoint, answer, request):
            if piece:
                yield chunk(number, {"content": piece})
    except Exception as error:  # noqa: BLE001 - the status is sent already
        yield line(form_of(error)[1])
        return
    for number in range(len(answer.choices)):
        yield chunk(number, {})
    if options.include_usage:
        yield line({**head, "choices": [], "usage": answer.usage})
    yield END


async def whole(endpoint: Endpoint, answer: Answer, request: Request) -> dict[str, Any]:
    """Return an answer's choices when all are complete."""
    async for _ in events_of(endpoint, answer, request):
        pass
    choices = [
        {
            "index": number,
            "message": {"role": "assistant", "content": choice.shown},
            "finish_reason": choice.finish_reason,
        }
        for number, choice in enumerate(answer.choices)
    ]
    return {**header(endpoint, "chat.completion"), "choices": choices, "usage": answer.usage}


def header(endpoint: Endpoint, kind: str) -> dict[str, Any]:
    """Return what every answer begins with."""
    return {
        "id": f"chatcmpl-{secrets.token_hex(12)}",
        "object": kind,
        "created": int(time.time()),
        "model": endpoint.name,
    }


def application(endpoint: Endpoint) -> FastAPI:
    """Return the web application; it has no pages, and answers only what is addressed to this machine."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        endpoint.is_closing.set()
        endpoint.worker.shutdown(wait=True, cancel_futures=True)

    async def told(request: Request, error: Exception) -> JSONResponse:
        status, form = form_of(error)
        return JSONResponse(form, status)

    handlers: Any = dict.fromkeys((RefusedError, RequestValidationError, HTTPException, Exception), told)
    app = FastAPI(lifespan=lifespan, exception_handlers=handlers, docs_url=None, redoc_url=None, openapi_url=None)
    # a page of the Web whose name was made to point here would be answered otherwise
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost"])

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    def described() -> dict[str, Any]:
        context = endpoint.model.config.max_position_embeddings
        own = {"id": endpoint.name, "object": "model", "created": endpoint.created, "owned_by": "arriero"}
        return {**own, "max_model_len": context}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [described()]}

    @app.get("/v1/models/{name}")
    async def model(name: str) -> dict[str, Any]:
        if name != endpoint.name:
            message = f"the model `{name}` does not exist: this server has `{endpoint.name}`"
            raise RefusedError(message, "model", "model_not_found", 404)
        return described()

    @app.post("/v1/chat/completions", response_model=None)
    async def complete(asked: Asked, request: Request) -> Response:
        answer = prepare(endpoint, asked)
        if asked.stream:
            return StreamingResponse(
                stream(endpoint, answer, request, asked.stream_options), media_type="text/event-stream"
            )
        return JSONResponse(await whole(endpoint, answer, request))

    return app
