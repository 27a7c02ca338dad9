"""Figures for Prometheus. Knows a scheduler's counters, and routes by their templates."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from lora_cli.serving.scheduler import Scheduler

__all__ = ["CONTENT_TYPE", "Metrics"]

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """What was asked of a server, and how it stands."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_State(scheduler))
        self._requests = Counter("lora_requests", "Requests answered", ["route", "code"], registry=self._registry)
        self._seconds = Histogram(
            "lora_request_seconds", "From the head of a request to the end of its answer", ["route"],
            registry=self._registry,
        )  # fmt: skip
        self._rows = Counter("lora_rows", "Texts answered", ["model"], registry=self._registry)
        self._tokens = Counter("lora_tokens", "Tokens read and written", ["model", "kind"], registry=self._registry)

    def answered(self, route: str, code: int, seconds: float) -> None:
        """Count a request. `route` is its template, so that clients cannot make up names."""
        self._requests.labels(route, str(code)).inc()
        self._seconds.labels(route).observe(seconds)

    def rows(self, model: str, number: int) -> None:
        """Count texts that an adapter has answered."""
        self._rows.labels(model).inc(number)

    def tokens(self, model: str, read: int, written: int) -> None:
        """Count tokens of an answer."""
        self._tokens.labels(model, "read").inc(read)
        self._tokens.labels(model, "written").inc(written)

    def text(self) -> bytes:
        """All figures, as Prometheus reads them."""
        return generate_latest(self._registry)


class _State(Collector):
    """Figures that are read when they are asked for."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler

    def collect(self) -> list[Metric]:
        pool = self._scheduler.pool
        gauges: dict[str, tuple[str, Callable[[], float]]] = {
            "lora_waiting_rows": ("Texts that wait", lambda: self._scheduler.num_waiting),
            "lora_running_tokens": ("Tokens of what is being answered", lambda: self._scheduler.num_tokens),
            "lora_adapters": ("Adapters that can be asked for", lambda: len(pool.entries)),
            "lora_adapters_in_memory": ("Adapters in memory", lambda: len(pool.loaded)),
            "lora_adapter_bytes": ("Memory that adapters take", lambda: pool.bytes),
        }
        counters: dict[str, tuple[str, Callable[[], float]]] = {
            "lora_steps": ("Forward passes", lambda: self._scheduler.num_steps),
            "lora_adapter_loads": ("Adapters read from disk", lambda: pool.num_loaded),
            "lora_adapter_evictions": ("Adapters that left memory", lambda: pool.num_evicted),
            "lora_adapter_reloads": ("Adapters read anew, changed", lambda: pool.num_reloaded),
        }
        found: list[Metric] = [GaugeMetricFamily(name, text, read()) for name, (text, read) in gauges.items()]
        return found + [CounterMetricFamily(name, text, read()) for name, (text, read) in counters.items()]
