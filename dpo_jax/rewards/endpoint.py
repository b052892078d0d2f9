"""A model behind an OpenAI-compatible interface (chat completions): asked in parallel, each question once.

Answers are kept on disk under a key of their content, so that what is interrupted goes on where it was. The key for
the interface comes from the environment, goes into one header, and is never printed, logged or written.
"""

import contextlib
import email.message
import hashlib
import http.client
import json
import os
import random
import secrets
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from dpo_jax.config.commands import EndpointConfig
from dpo_jax.errors import UserError

PASSING = {408, 409, 425, 429, 500, 502, 503, 504, 529}  # statuses after which the same request may succeed
LONGEST_WAIT = 60.0  # seconds between two tries, unless the server asks for more
SAID = 300  # characters of a server's message that an error repeats


class EndpointAnswer(NamedTuple):
    """What the model said, and for how many tokens."""

    text: str
    tokens_in: int
    tokens_out: int


class EndpointClient:
    """Asks an endpoint."""

    def __init__(self, endpoint: EndpointConfig, cache: Path, sleep: Callable[[float], None] = time.sleep):
        """Prepares; asks nothing yet.

        Args:
          endpoint: whom to ask.
          cache: the folder of answers.
          sleep: waits for so many seconds.

        Raises:
          UserError: settings that make no sense.
        """
        self.endpoint, self.asked, self.found, self.cost = endpoint, 0, 0, 0.0
        self._fields, self._cache, self._sleep = _checked(endpoint), cache, sleep
        self._secret = os.environ.get(endpoint.key, "").strip()
        if not (self._secret.isascii() and self._secret.isprintable()):
            raise UserError(f"${endpoint.key}: holds characters that no key has")
        self._opener = urllib.request.build_opener(_Stay)
        self._lock, self._next = threading.Lock(), 0.0

    def ask(self, questions: Sequence[str]) -> list[str]:
        """Returns the model's answer to each question, from the cache where it is there.

        Raises:
          UserError: the endpoint refuses, fails for good, or would cost too much; answers so far are kept.
        """
        with ThreadPoolExecutor(self.endpoint.parallel) as pool:
            futures = {question: pool.submit(self._answer, question) for question in dict.fromkeys(questions)}
            try:
                return [futures[question].result().text for question in questions]
            finally:
                pool.shutdown(cancel_futures=True)  # what has not begun, after an error

    def _answer(self, question: str) -> EndpointAnswer:
        messages = [{"role": "user", "content": question}]
        request = {"model": self.endpoint.model, "messages": messages, **self._fields}
        text = json.dumps([self.endpoint.base_url, request], sort_keys=True)
        key = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
        path = self._cache / key[:2] / f"{key}.json"
        if (kept := _kept(path)) is not None:
            with self._lock:
                self.found += 1
            return kept
        answer = self._tried(request)
        _keep(path, answer)
        return answer

    def _tried(self, request: dict[str, Any]) -> EndpointAnswer:
        """Returns the answer to a request, tried again while it fails in passing."""
        problem = ""
        for attempt in range(self.endpoint.retries + 1):
            self._admit()
            try:
                return self._paid(self._sent(request))
            except urllib.error.HTTPError as e:
                with e:
                    problem, wait = self._said(e), _asked_for(e.headers)
                if e.code not in PASSING:
                    raise UserError(self._refusal(e.code, problem)) from None
            except (OSError, http.client.HTTPException) as e:  # no connection, or one that broke
                problem, wait = self._hidden(str(e) or type(e).__name__), 0.0
            if attempt < self.endpoint.retries:
                self._sleep(max(wait, min(LONGEST_WAIT, 2.0**attempt) * random.uniform(0.75, 1.25)))
        tries = f"{self.endpoint.retries + 1} tries"
        raise UserError(f"{self.endpoint.base_url}: no answer after {tries}: {problem}; answers so far are kept")

    def _admit(self) -> None:
        """Waits for its turn; refuses where the money is spent."""
        limit = self.endpoint.max_cost
        with self._lock:
            if limit is not None and self.cost >= limit:
                raise UserError(
                    f"endpoint.max_cost: {self.asked} answers cost {self.cost:.4g} of at most {limit:g}; they are "
                    "kept, and the same command goes on with as much again"
                )
            now = time.monotonic()
            turn = max(now, self._next)
            self._next = turn + (60 / self.endpoint.per_minute if self.endpoint.per_minute else 0.0)
        if turn > now:
            self._sleep(turn - now)

    def _sent(self, request: dict[str, Any]) -> Any:
        """Returns what the server answers, as JSON."""
        headers = {"Content-Type": "application/json", "User-Agent": "dpo_jax"}
        url = self.endpoint.base_url.rstrip("/") + "/chat/completions"
        sent = urllib.request.Request(url, json.dumps(request).encode(), headers)
        if self._secret:
            sent.add_unredirected_header("Authorization", f"Bearer {self._secret}")
        with self._opener.open(sent, timeout=self.endpoint.timeout) as response:
            content = response.read()
        try:
            return json.loads(content)
        except ValueError as e:
            raise UserError(f"{url}: answered what is not JSON; is endpoint.base_url right?") from e

    def _paid(self, found: Any) -> EndpointAnswer:
        """Returns an answer, its cost counted."""
        try:
            text, usage = found["choices"][0]["message"]["content"] or "", found.get("usage") or {}
            answer = EndpointAnswer(
                str(text), int(usage.get("prompt_tokens", 0)), int(usage.get("completion_tokens", 0))
            )
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as e:
            said = self._hidden(json.dumps(found))
            raise UserError(f"{self.endpoint.base_url}: answered what is no chat completion: {said}") from e
        if self.endpoint.max_cost is not None and not usage:
            raise UserError(f"{self.endpoint.base_url}: says not how many tokens it used, so max_cost cannot be kept")
        prices = self.endpoint.price_in or 0.0, self.endpoint.price_out or 0.0
        with self._lock:
            self.asked += 1
            self.cost += (answer.tokens_in * prices[0] + answer.tokens_out * prices[1]) / 1e6
        return answer

    def _said(self, error: urllib.error.HTTPError) -> str:
        """Returns a server's message on a failure, as one line."""
        try:
            content = error.read(10_000).decode("utf-8", "replace")
        except (OSError, http.client.HTTPException):
            content = ""
        with contextlib.suppress(ValueError, KeyError, TypeError):
            content = str(json.loads(content)["error"]["message"])
        return self._hidden(f"{error.code} {error.reason}: {content}")

    def _hidden(self, text: str) -> str:
        """Returns a text as the beginning of one line, without the key, which a server might repeat."""
        text = text.replace(self._secret, "(the key)") if self._secret else text
        return " ".join(text.split())[:SAID]

    def _refusal(self, code: int, problem: str) -> str:
        known = {
            401: f"; is ${self.endpoint.key} set, and right?",
            404: "; are endpoint.base_url and endpoint.model right?",
        }
        return f"{self.endpoint.base_url}: {problem}{known.get(code, '')}"


class _Stay(urllib.request.HTTPRedirectHandler):
    """Follows no redirection: what is sent is for the server that was named."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> None:
        """Makes it an error."""


def _checked(endpoint: EndpointConfig) -> dict[str, Any]:
    """Returns the further fields of a request; refuses settings that make no sense."""
    if not endpoint.model:
        raise UserError("endpoint.model: name the model to ask")
    if not endpoint.base_url.startswith(("http://", "https://")):
        raise UserError(f"endpoint.base_url: {endpoint.base_url!r} does not start with http:// or https://")
    least = {"parallel": 1, "retries": 0, "timeout": 1e-3, "per_minute": 1e-3, "max_cost": 0.0}
    for name, limit in least.items():
        value = getattr(endpoint, name)
        if value is not None and value < limit:
            raise UserError(f"endpoint.{name}: {value} is less than {limit:g}")
    if endpoint.max_cost is not None and (endpoint.price_in is None or endpoint.price_out is None):
        raise UserError("endpoint.max_cost: give endpoint.price_in and endpoint.price_out, of a million tokens each")
    return dict(_field(text) for text in endpoint.body)


def _field(text: str) -> tuple[str, Any]:
    """Returns name and value of `name=value`, the value read as JSON where it is some, else as text."""
    name, equals, value = text.partition("=")
    if not equals or not name or name in ("model", "messages", "stream", "n"):
        raise UserError(f"endpoint.body: {text!r}: give name=value, and neither model, messages, stream nor n")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def _asked_for(headers: email.message.Message) -> float:
    """Returns the seconds that a server asks to wait; 0 where it says nothing, or a date."""
    try:
        return max(0.0, float(headers.get("Retry-After", 0)))
    except ValueError:
        return 0.0


def _kept(path: Path) -> EndpointAnswer | None:
    """Returns the answer in a file; a file that holds none counts as absent and is replaced."""
    try:
        return EndpointAnswer(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _keep(path: Path, answer: EndpointAnswer) -> None:
    """Writes an answer, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    beside.write_text(json.dumps(answer._asdict()), encoding="utf-8")
    beside.replace(path)
