# SPDX-License-Identifier: Apache-2.0

"""Client of an OpenAI-compatible HTTP endpoint: retries, concurrent requests, exponents of doctors."""

import http.client
import json
import re
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from queue import SimpleQueue
from typing import Any
from urllib.parse import urlsplit


RETRIED_STATUSES = {408, 409, 425, 429}  # HTTP statuses, besides those from 500 on
MAX_DELAY = 60.0  # seconds between two attempts
PROBE = {"vllm_xargs": {"beta_": 0}}  # no doctor has an empty name: the vLLM plugin answers with the names it has
Json = dict[str, Any]


class RefusedError(ValueError):
    """Refusal of a request, with an HTTP `status` that a retry would not change, and the `reason` of the endpoint."""

    def __init__(self, message: str, status: int, reason: str):
        super().__init__(message)
        self.status, self.reason = status, reason


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Handler that follows no redirects, because these could send the key to another host."""

    def redirect_request(self, *_: object) -> None:
        return None


class Endpoint:
    """
    An OpenAI-compatible endpoint: `trl-tfpo serve`, vLLM, or a hosted model.

    Requests are repeated with growing delays if the endpoint is overloaded, fails or cannot be reached. Redirects are
    not followed.

    Args:
        base_url (`str`):
            URL of the endpoint, up to and including `/v1`.
        model (`str`):
            Name of the model at the endpoint.
        api_key (`str`, *optional*):
            Sent as a bearer token. It appears in no message, file or `repr`.
        num_requests (`int`, *optional*, defaults to `32`):
            Maximum number of requests in flight.
        timeout (`float`, *optional*, defaults to `600.0`):
            Seconds to wait for an answer.
        max_retries (`int`, *optional*, defaults to `8`):
            Maximum number of retries of a request.
        backoff (`float`, *optional*, defaults to `1.0`):
            Seconds before the first retry. Doubled with each retry, up to a minute, unless the endpoint names a delay.

    Raises:
        `ValueError`: if the URL is not an HTTP URL or has a user or password, the key cannot be a header, or a number
            is out of range.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        api_key: str | None = None,
        num_requests: int = 32,
        timeout: float = 600.0,
        max_retries: int = 8,
        backoff: float = 1.0,
    ):
        if not base_url.startswith(("http://", "https://")) or "@" in urlsplit(base_url).netloc:
            raise ValueError(
                "`base_url` must be the URL of an endpoint, without user and password. Got "
                f"{re.sub('//[^/]*@', '//...@', base_url)!r}; try 'http://localhost:8000/v1'."
            )
        if api_key is not None and not (api_key.isascii() and api_key.isprintable() and api_key.strip() == api_key):
            raise ValueError(
                "A key must consist of printable ASCII characters, without spaces around it. Got one that does not; "
                "set it again, without a line break."
            )
        if not (num_requests >= 1 and timeout > 0 and max_retries >= 0 and backoff >= 0):
            raise ValueError(
                "The number of requests must be at least 1, `timeout` positive, `max_retries` and `backoff` at least "
                f"0. Got {num_requests}, {timeout}, {max_retries} and {backoff}; leave them out for the defaults."
            )
        self.base_url, self.model = base_url.rstrip("/"), model
        self.num_requests, self.timeout, self.max_retries, self.backoff = num_requests, timeout, max_retries, backoff
        self._api_key = api_key
        self._opener = urllib.request.build_opener(_NoRedirects)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.base_url!r}, {self.model!r})"

    def send(
        self,
        path: str,
        payload: Mapping[str, object] | None = None,
        *,
        read: Callable[[Json], Any] = lambda reply: reply,
        stop: threading.Event | None = None,
    ) -> Any:
        """
        Send a request, and return its answer.

        Args:
            path (`str`):
                Path below `base_url`, such as `"/completions"`.
            payload (`Mapping`, *optional*):
                Body of a POST request. Without one it is a GET request.
            read (`Callable`, *optional*):
                Function that converts the answer. The request is repeated if this function raises a `ValueError`,
                `LookupError` or `TypeError`.
            stop (`threading.Event`, *optional*):
                If set, the request is not repeated.

        Returns:
            The result of `read`, by default the answer as a `dict`.

        Raises:
            [`RefusedError`]: if the endpoint refuses the request.
            `ConnectionError`: if no attempt gets an answer that `read` accepts.
        """
        stop = stop or threading.Event()
        url, headers = self.base_url + path, {"Content-Type": "application/json"}
        if self._api_key is not None:
            headers["Authorization"] = f"Bearer {self._api_key}"
        request = urllib.request.Request(url, None if payload is None else json.dumps(payload).encode(), headers)
        for attempt in range(self.max_retries + 1):
            delay = min(self.backoff * 2**attempt, MAX_DELAY)
            try:
                with self._opener.open(request, timeout=self.timeout) as response:  # nosec B310  # HTTP, see above
                    return read(json.load(response))
            except urllib.error.HTTPError as error:
                status, reason = error.code, self._without_key(error.read(2000).decode(errors="replace"))
                if status < 500 and status not in RETRIED_STATUSES:
                    raise RefusedError(
                        f"{url} must accept the request. Got {status}: {reason[:500]}; check the name of the model "
                        f"({self.model!r}), the key and the request.",
                        status,
                        reason,
                    ) from None
                last = f"{status}: {reason[:500]}"
                retry_after = error.headers.get("Retry-After", "")
                if retry_after.isdigit():
                    delay = min(float(retry_after), MAX_DELAY)
            except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError) as error:
                last = self._without_key(f"{type(error).__name__}: {error}")  # unreachable, interrupted or malformed
            if attempt == self.max_retries or stop.wait(delay):
                break
        raise ConnectionError(
            f"{url} must answer. Got {last} in {attempt + 1} attempts; check the endpoint, and run again."
        )

    def send_all(self, path: str, payloads: Sequence[Mapping[str, object]]) -> Iterator[tuple[int, Json]]:
        """
        Send requests, at most `num_requests` at once. Yield index and answer of each, in the order of arrival.

        Raises:
            As [`send`], for the first request that fails. No further request is sent then.
        """
        tasks, lock, stop = iter(enumerate(payloads)), threading.Lock(), threading.Event()
        answers: SimpleQueue[tuple[int, Json | BaseException]] = SimpleQueue()

        def work() -> None:
            while not stop.is_set():
                with lock:
                    index, payload = next(tasks, (-1, None))
                if payload is None:
                    return
                try:
                    answers.put((index, self.send(path, payload, stop=stop)))
                except BaseException as error:  # of any type: without an answer the caller would wait forever
                    stop.set()
                    answers.put((index, error))

        for _ in range(min(self.num_requests, len(payloads))):
            threading.Thread(target=work, daemon=True).start()  # an interrupt does not wait for answers
        try:
            for _ in payloads:
                index, answer = answers.get()
                if isinstance(answer, BaseException):
                    raise answer
                yield index, answer
        finally:
            stop.set()

    @cached_property
    def description(self) -> Json:
        """
        The entry of the model in `/models`.

        Raises:
            `ValueError`: if the endpoint has no such model.
        """
        models = self.send("/models", read=lambda reply: {entry["id"]: entry for entry in reply["data"]})
        if self.model not in models:
            raise ValueError(
                f"The model must be one of those at {self.base_url}: {', '.join(map(repr, models))}. Got "
                f"{self.model!r}; pass one of these."
            )
        return models[self.model]

    @cached_property
    def doctors(self) -> list[str]:
        """
        Names of the doctors at the endpoint. Only `trl-tfpo serve`, and vLLM with the plugin, have doctors.

        Raises:
            `ValueError`: if vLLM refuses the request for their names with an unknown error.
        """
        owner = self.description.get("owned_by")
        if owner == "trl-tfpo":
            return list(self.description["doctors"])
        if owner != "vllm":
            return []
        try:
            self.send("/completions", {"model": self.model, "prompt": [0], "max_tokens": 1, **PROBE})
        except RefusedError as error:
            if names := re.findall(r"beta_([\w-]+)", error.reason.partition(". Got")[0]):
                return names
            raise
        return []  # vLLM without the plugin ignores unknown arguments

    def exponents(self, weights: Mapping[str, float], alpha: float | None = None) -> Json:
        """
        Return the fields of a request that set exponents.

        Args:
            weights (`Mapping[str, float]`):
                Exponents of doctors, by name. The other doctors have the defaults of the endpoint.
            alpha (`float`, *optional*):
                Exponent of the patient. The default is that of the endpoint.

        Returns:
            `dict`: `weights` and `alpha` for `trl-tfpo serve`, `vllm_xargs` for vLLM with doctors, else empty.

        Raises:
            `ValueError`: if the endpoint lacks a doctor, or if `alpha` is not 1 and the endpoint is neither `trl-tfpo
                serve` nor vLLM with doctors.
        """
        if unknown := sorted({*weights} - {*self.doctors}):
            raise ValueError(
                f"Doctors must be among those of {self.base_url}, {self.doctors}. Got {unknown}; check the names, and "
                "that the endpoint is `trl-tfpo serve`, or vLLM with `trl-tfpo-vllm`."
            )
        is_ours = self.description.get("owned_by") == "trl-tfpo"
        if not (self.doctors or is_ours):
            if alpha not in (None, 1.0):
                raise ValueError(
                    f"`alpha` needs an endpoint that guides. Got {alpha} for {self.base_url}, without doctors; leave "
                    "it out, or serve the patient with `trl-tfpo serve`, or vLLM with `trl-tfpo-vllm`."
                )
            return {}
        patient = {} if alpha is None else {"alpha": float(alpha)}
        if is_ours:
            return {"weights": dict(weights), **patient}
        return {"vllm_xargs": {f"beta_{name}": float(weight) for name, weight in weights.items()} | patient}

    def policy(self, weights: Mapping[str, float] | None = None, alpha: float | None = None) -> Json:
        """As [`exponents`], with 0 for doctors without a weight. Without arguments, as [`patient_alone`]."""
        if not weights and alpha is None:
            return self.patient_alone
        return self.exponents(dict.fromkeys(self.doctors, 0.0) | dict(weights or {}), alpha)

    @property
    def patient_alone(self) -> Json:
        """Fields of a request that the patient answers without doctors."""
        return self.exponents(dict.fromkeys(self.doctors, 0.0), 1.0)

    def _without_key(self, text: str) -> str:
        return text.replace(self._api_key, "[key]") if self._api_key else text
