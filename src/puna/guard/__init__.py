"""Guards: what judges the things that go in and come out. Nothing here needs torch to import."""

from puna.guard.code import Finding, scan_code

__all__ = ["Finding", "scan_code"]
