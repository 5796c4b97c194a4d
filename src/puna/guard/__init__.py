"""Guards: what judges the things that go in and come out. Nothing here needs torch to import."""

from puna.guard.code import CodeStream, Finding, Policy, scan_answer, scan_code

__all__ = ["CodeStream", "Finding", "Policy", "scan_answer", "scan_code"]
