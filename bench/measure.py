"""Resident memory of this process, for the benches that measure a peak in a process of its own, and the name
of the machine's processor."""

import platform
from pathlib import Path


def processor() -> str:
    """The name of this machine's processor."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def resident_mb(field: str = "VmRSS") -> float:
    """MB now; "VmHWM": at the highest since the start or the last `added_peak_mb`; "RssAnon": without the
    pages of mapped files."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def added_peak_mb(call) -> float:
    """MB that one `call()` adds at its peak to what is resident before it."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the high-water mark starts again
    before = resident_mb()
    kept = call()  # the result counts until the peak is read
    peak = resident_mb("VmHWM")
    del kept
    return peak - before
