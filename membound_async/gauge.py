"""The gauge: reads the probe, and knows what to think of a probe that fails or lies."""

from __future__ import annotations

from .events import log
from .exceptions import InvalidLimit
from .probes import MemoryProbe, check_reading

__all__ = ["Gauge"]


class Gauge:
    """The readings of one probe.

    A reading that fails is logged once and the last good one kept; when the probe has failed
    for ``stale_after_seconds``, memory is taken to be at the limit. A reading of 0 bytes
    counts as a failure, unless the program says that its baseline is 0.

    Args:
        probe: what to read.
        may_be_zero: whether 0 bytes is a possible reading.
        stale_after_seconds: how long the last good reading is believed.

    Attributes:
        measured: the last reading in bytes.
        peak: the highest reading in bytes.
        readings: how many were taken, failures included.
        failures: how many failed.
    """

    def __init__(
        self, probe: MemoryProbe, *, may_be_zero: bool, stale_after_seconds: float
    ) -> None:
        self.probe = probe
        self.name = getattr(probe, "name", type(probe).__name__)
        self.measured = self.peak = 0
        self.readings = self.failures = 0
        self._may_be_zero = may_be_zero
        self._stale_after_seconds = stale_after_seconds
        self._failing_since: float | None = None

    def first(self) -> int:
        """Read the probe, which must work.

        Raises:
            InvalidLimit: it fails, or reads what cannot be.
        """
        try:
            measured = self._read()
        except Exception as error:
            raise InvalidLimit(
                f"the probe {self.name!r} cannot be read: {error}; pass another one with "
                "probe= (or baseline=0 in a test that measures nothing)"
            ) from error
        return self._note(measured)

    def read(self, now: float, limit_bytes: int) -> int:
        """Read the probe, and make the best of it if that fails.

        Args:
            now: the time in seconds.
            limit_bytes: what to assume when the last good reading has become too old.
        """
        try:
            measured = self._read()
        except Exception as error:  # noqa: BLE001 -- a probe is anybody's code
            self.failures += 1
            if self._failing_since is None:
                self._failing_since = now
                log().warning(
                    "membound.probe_failed",
                    probe=self.name,
                    error=repr(error),
                    kept_bytes=self.measured,
                )
            measured = self.measured
            if now - self._failing_since >= self._stale_after_seconds:
                measured = max(measured, limit_bytes)
            self.readings += 1
            return measured
        if self._failing_since is not None:
            self._failing_since = None
            log().info("membound.probe_recovered", probe=self.name)
        return self._note(measured)

    def forget_time(self) -> None:
        """Begin anew with counting how long the probe has failed: the clock has changed."""
        self._failing_since = None

    def _read(self) -> int:
        measured = check_reading(self.probe.read(), self.name)
        if measured == 0 and not self._may_be_zero:
            raise ValueError("it reads 0 bytes, but no running process uses none")
        return measured

    def _note(self, measured: int) -> int:
        self.readings += 1
        self.measured = measured
        self.peak = max(self.peak, measured)
        return measured
