"""An OpenAI-compatible chat endpoint, asked in parallel through the `openai` client (extra `judge`).

Answers are cached on disk by the content of their request, so an interrupted command continues where it stopped. The
API key comes from the environment, is sent in one header, and is never printed, logged or written.
"""

import hashlib
import importlib
import json
import os
import threading
import time
import urllib.parse
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo_jax.errors import UserError
from dpo_jax.paths import read_checked, write_checked

OWN = "x-stainless-"  # how the client's own headers start; OWN + "retry-count" holds the retries so far
HEADERS = {"host", "connection", "accept", "accept-encoding", "content-type", "content-length", "user-agent"}
LARGEST_ANSWER = 2**24  # bytes
QUOTED = 300  # characters of a server's message that an error repeats
ADVICE: dict[int | None, str] = {401: "; check ${key}", 404: "; check endpoint.base_url and endpoint.model"}


@dataclass(frozen=True)
class EndpointConfig:
    """A model behind an OpenAI-compatible interface."""

    model: str = ""
    """Name of the model at the endpoint."""
    base_url: str = "https://api.openai.com/v1"
    """Address of the interface; that of a local server may be http://localhost:8000/v1."""
    key: str = "OPENAI_API_KEY"
    """Environment variable that holds the API key; if it is not set, no key is sent."""
    body: tuple[str, ...] = ("temperature=0", "max_tokens=300")
    """Further fields of a request, name=value."""
    parallel: int = 8
    """Concurrent requests."""
    per_minute: float | None = None
    """Most requests per minute, retries included."""
    retries: int = 6
    """Retries after a lost connection or status 408, 409, 429, 5xx; waits 0.5, 1, 2, .. 8 s, or up to 120 if asked."""
    timeout: float = 120.0
    """Seconds to wait for an answer."""
    price_in: float | None = None
    """Price per million input tokens (same currency as max_cost)."""
    price_out: float | None = None
    """Price per million output tokens."""
    max_cost: float | None = None
    """Budget of one command; requests already sent are finished."""


class EndpointClient:
    """Asks a model; counts answers `asked` of the server, answers `found` in the cache, and the `cost`."""

    def __init__(self, endpoint: EndpointConfig, cache: Path):
        """Checks the settings; sends nothing.

        Args:
          endpoint: the model to ask.
          cache: folder of answers.

        Raises:
          UserError: invalid settings, or the package openai is not installed.
        """
        self.endpoint, self.asked, self.found, self.cost = endpoint, 0, 0, 0.0
        self._fields, self._cache = _checked_fields(endpoint), cache
        self._key = os.environ.get(endpoint.key, "").strip()
        if not (self._key.isascii() and self._key.isprintable()):
            raise UserError(f"${endpoint.key}: contains characters that no API key has; set it again")
        try:
            self._openai: Any = importlib.import_module("openai")
        except ImportError as e:
            raise UserError("judge 'endpoint' needs the package openai; install dpo_jax[judge]") from e
        self._lock, self._next = threading.Lock(), 0.0

    def ask(self, questions: Sequence[str]) -> list[str]:
        """Returns the model's answer to each question, from the cache where possible.

        Raises:
          UserError: the server refuses or fails, or the budget is spent; answers so far are cached.
        """
        with self._connect() as client, ThreadPoolExecutor(self.endpoint.parallel) as pool:
            futures = {question: pool.submit(self._answer, client, question) for question in dict.fromkeys(questions)}
            try:
                return [futures[question].result() for question in questions]
            finally:
                pool.shutdown(cancel_futures=True)  # after an error, send no further question

    def _connect(self) -> Any:
        """Returns the client, which follows no redirect, so that only endpoint.base_url sees questions and key."""
        hooks = {"request": [self._admit], "response": [self._limit]}
        try:
            http = self._openai.DefaultHttpxClient(follow_redirects=False, event_hooks=hooks)
        except (ImportError, ValueError) as e:
            raise UserError(f"proxy in the environment: {e}; change or unset HTTPS_PROXY, HTTP_PROXY, ALL_PROXY") from e
        url, timeout, retries = self.endpoint.base_url, self.endpoint.timeout, self.endpoint.retries
        return self._openai.OpenAI(
            api_key="set by _admit", base_url=url, timeout=timeout, max_retries=retries, http_client=http
        )

    def _admit(self, request: Any) -> None:
        """Runs before each try: checks the budget, waits for the rate limit, sets the headers.

        The client takes further headers from OPENAI_* variables. They may be secrets of another service: none is sent.
        """
        limit = self.endpoint.max_cost
        with self._lock:
            if limit is not None and self.cost >= limit:
                spent = f"{self.asked} answers cost {self.cost:.4g} of at most {limit:g}"
                raise UserError(f"endpoint.max_cost: {spent}; they are cached, run the command again to continue")
            now = time.monotonic()
            turn = max(now, self._next)
            self._next = turn + (60 / self.endpoint.per_minute if self.endpoint.per_minute else 0.0)
        if turn > now:
            time.sleep(turn - now)
        request.extensions["deadline"] = time.monotonic() + self.endpoint.timeout
        for name in set(request.headers) - HEADERS:
            if not name.startswith(OWN):
                del request.headers[name]
        if self._key:
            request.headers["Authorization"] = f"Bearer {self._key}"

    def _limit(self, response: Any) -> None:
        """Runs before an answer is read, to end one that never does: the client's timeout is that of each part."""
        httpx = importlib.import_module(type(response).__module__.partition(".")[0])  # which of its versions it may be
        parts, deadline = response.stream, response.request.extensions["deadline"]

        class Limited(httpx.SyncByteStream):
            def __iter__(self) -> Any:
                size = 0
                for part in parts:
                    size += len(part)
                    if time.monotonic() > deadline or size > LARGEST_ANSWER:
                        raise httpx.ReadTimeout("the answer took too long, or is too long", request=response.request)
                    yield part

            def close(self) -> None:
                parts.close()

        response.stream = Limited()

    def _answer(self, client: Any, question: str) -> str:
        messages = [{"role": "user", "content": question}]
        request = {"model": self.endpoint.model, "messages": messages, **self._fields}
        text = json.dumps([self.endpoint.base_url, request], sort_keys=True)
        key = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
        path = self._cache / key[:2] / f"{key}.json"
        if (content := read_checked(path)) is not None:
            with self._lock:
                self.found += 1
            return json.loads(content)["text"]
        answer = self._paid_answer(self._send(client, question))
        write_checked(path, json.dumps(answer).encode())
        return answer["text"]

    def _send(self, client: Any, question: str) -> bytes:
        """Returns the content of the server's response."""
        content = question.encode("utf-8", "replace").decode()  # the client refuses lone surrogates
        messages = [{"role": "user", "content": content}]
        create = client.chat.completions.with_raw_response.create
        try:
            return create(model=self.endpoint.model, messages=messages, extra_body=self._fields).http_response.content
        except (self._openai.APIStatusError, self._openai.APIConnectionError) as e:
            raise self._failure(e) from None
        except (RecursionError, OverflowError, ValueError) as e:  # an error's body, or a header, that is nonsense
            raise self._error(
                f"the client cannot read the response ({self._quote(str(e))}); check the server"
            ) from None

    def _paid_answer(self, content: bytes) -> dict[str, Any]:
        """Returns the answer in a response, with its tokens, after adding its cost."""
        try:
            found = json.loads(content)
            text, usage = found["choices"][0]["message"]["content"] or "", found.get("usage") or {}
            read, written = int(usage.get("prompt_tokens", 0)), int(usage.get("completion_tokens", 0))
        except (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError, RecursionError):
            said = self._quote(content.decode("utf-8", "replace"))
            raise self._error(f"response is not JSON of a chat completion; check endpoint.base_url: {said}") from None
        if self.endpoint.max_cost is not None and not usage:
            raise self._error("response has no token usage, which endpoint.max_cost needs; remove endpoint.max_cost")
        with self._lock:
            self.asked += 1
            self.cost += (read * (self.endpoint.price_in or 0.0) + written * (self.endpoint.price_out or 0.0)) / 1e6
        return {"text": str(text), "tokens_in": read, "tokens_out": written}

    def _failure(self, error: Any) -> UserError:
        """Returns the error of a request that the server refused, or that failed in its last try."""
        status, tries = getattr(error, "status_code", None), int(error.request.headers.get(f"{OWN}retry-count", 0)) + 1
        if status is None:
            problem = str(error.__cause__) or type(error.__cause__).__name__
        else:
            body, response = error.body, error.response
            said = body["message"] if isinstance(body, dict) and "message" in body else response.text
            problem = f"{status} {response.reason_phrase}: {said}"
        advice = ADVICE.get(status, "").format(key=self.endpoint.key)
        return self._error(f"no answer after {tries} tries: {self._quote(problem)}{advice}; answers so far are cached")

    def _error(self, problem: str) -> UserError:
        return UserError(f"{self.endpoint.base_url}: {problem}")

    def _quote(self, text: str) -> str:
        """Returns the start of a text as one line, without the key, which a server may repeat."""
        text = text.replace(self._key, "(the key)") if self._key else text
        return " ".join(text.split())[:QUOTED]


def _checked_fields(endpoint: EndpointConfig) -> dict[str, Any]:
    """Returns the further fields of a request; refuses invalid settings."""
    if not endpoint.model:
        raise UserError("endpoint.model: name the model to ask")
    if not endpoint.base_url.startswith(("http://", "https://")):
        raise UserError(f"endpoint.base_url must start with http:// or https://, got {endpoint.base_url!r}")
    try:
        urllib.parse.urlsplit(endpoint.base_url).port  # noqa: B018
    except ValueError as e:
        raise UserError(f"endpoint.base_url: {endpoint.base_url!r} is no address ({e}); correct it") from e
    least = {"parallel": 1, "retries": 0, "timeout": 1e-3, "per_minute": 1e-3, "max_cost": 0.0}
    for name, limit in least.items():
        value = getattr(endpoint, name)
        if value is not None and not value >= limit:
            raise UserError(f"endpoint.{name} must be at least {limit:g}, got {value}")
    if endpoint.max_cost is not None and (endpoint.price_in is None or endpoint.price_out is None):
        raise UserError("endpoint.max_cost needs endpoint.price_in and endpoint.price_out, per million tokens")
    return dict(_parse_field(text) for text in endpoint.body)


def _parse_field(text: str) -> tuple[str, Any]:
    """Returns name and value of `name=value`; a value that is not JSON is a text."""
    name, equals, value = text.partition("=")
    if not equals or not name or name in ("model", "messages", "stream", "n"):
        raise UserError(f"endpoint.body: {text!r}: write name=value; model, messages, stream and n cannot be set")
    try:
        return name, json.loads(value, parse_constant=str)
    except ValueError:
        return name, value
