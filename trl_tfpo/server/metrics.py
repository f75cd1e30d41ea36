# SPDX-License-Identifier: Apache-2.0

"""Prometheus metrics of a server."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from .engine import Engine


class Metrics:
    """Counts of responses by path and status, durations of requests, and the state of an engine."""

    def __init__(self, engine: Engine):
        self._registry = registry = CollectorRegistry()
        self.requests = Counter(
            "trl_tfpo_requests", "Requests by path and status", ["path", "status"], registry=registry
        )
        self.seconds = Histogram("trl_tfpo_request_seconds", "Time until the last token", registry=registry)
        for name, help_text, value in (
            ("trl_tfpo_rows", "Completions being decoded", lambda: engine.num_rows),
            ("trl_tfpo_waiting", "Completions waiting", lambda: engine.num_waiting),
            ("trl_tfpo_generated_tokens", "Tokens generated", lambda: engine.num_tokens),
        ):
            Gauge(name, help_text, registry=registry).set_function(value)

    def report(self) -> bytes:
        """Return the metrics in the text format of Prometheus."""
        return generate_latest(self._registry)
