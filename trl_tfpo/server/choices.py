# SPDX-License-Identifier: Apache-2.0

"""The completions of one request: their submission, and their events in the event loop."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence

from fastapi import Request
from prometheus_client import Histogram

from .engine import Engine, PromptTooLong
from .errors import ApiError
from .generation import Event, Generation


CHECK_SECONDS = 0.5  # between two checks of the connection


class Choices:
    """The generations of one request, and a queue of their events. Must be made in a running event loop."""

    def __init__(self, engine: Engine, seconds: Histogram):
        self._engine, self._seconds = engine, seconds
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._generations: Sequence[Generation] = ()

    def listener(self, index: int) -> Callable[[Event], None]:
        """Return a function that queues the events of one choice. It may be called in any thread."""

        def on_event(event: Event) -> None:
            self._loop.call_soon_threadsafe(self._queue.put_nowait, (index, event))

        return on_event

    def submit(self, generations: Sequence[Generation]) -> None:
        """Submit all generations to the engine, or raise `ApiError` if it refuses one."""
        self._generations = generations
        try:
            for generation in generations:
                self._engine.submit(generation)
        except ValueError as error:
            self.cancel()
            code = "context_length_exceeded" if isinstance(error, PromptTooLong) else None
            raise ApiError(400, str(error), code=code) from error
        except OverflowError as error:
            self.cancel()
            raise ApiError(429, str(error), "rate_limit_error") from error

    def cancel(self) -> None:
        """Cancel all generations of the request."""
        for generation in self._generations:
            generation.is_cancelled = True

    async def events(self, request: Request) -> AsyncIterator[tuple[int, Event]]:
        """Yield events and the indices of their choices, until all choices have ended or the client disconnects."""
        num_open, checked = len(self._generations), time.monotonic()
        try:
            with self._seconds.time():
                while num_open:
                    if time.monotonic() - checked > CHECK_SECONDS:
                        checked = time.monotonic()
                        if await request.is_disconnected():
                            return
                    try:
                        index, event = await asyncio.wait_for(self._queue.get(), timeout=CHECK_SECONDS)
                    except TimeoutError:
                        continue
                    num_open -= "finish_reason" in event
                    yield index, event
        finally:
            self.cancel()
