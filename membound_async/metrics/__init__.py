"""Metrics of a limiter: `prometheus` for a scraper, `opentelemetry` for an exporter.

Both give the same quantities, which `quantities` names. Each needs the extra of its name.
"""

from __future__ import annotations
