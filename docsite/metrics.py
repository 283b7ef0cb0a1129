"""The Prometheus metrics of ALTER's own, read off a registry in which they have been made."""

from __future__ import annotations

from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import Metric

from server.metrics import PAUSE_BUCKETS_S, AlterMetrics

from .markup import code, sentence, table


def metrics() -> str:
    """One row a metric, under the name that `/metrics` gives it."""
    registry = CollectorRegistry()
    AlterMetrics(registry)
    buckets = ", ".join(f"{bound:g}" for bound in PAUSE_BUCKETS_S)
    rows = [
        (code(_exposed(found)), found.type, _labels(found), sentence(found.documentation))
        for found in registry.collect()
    ]
    text = table(("metric", "type", "labels", "meaning"), rows)
    return f"{text}\nBuckets of the histogram, in seconds: {buckets}.\n"


def _exposed(metric: Metric) -> str:
    return f"{metric.name}_total" if metric.type == "counter" else metric.name


def _labels(metric: Metric) -> str:
    """Names, and the values that are there from the start."""
    values: dict[str, list[str]] = {}
    for sample in metric.samples:
        for name, value in sample.labels.items():
            if name != "le" and value not in values.setdefault(name, []):
                values[name].append(value)
    return "; ".join(
        f"{code(name)}: {', '.join(map(code, found))}" for name, found in values.items()
    )
