"""Published scores, as data, each with its status. They are Meta's figures, not ours; shots and metrics differ between
generations, so only compare within one row.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from puna.family.member import Status

Variant = Literal["base", "instruct", "classifier", "all"]

_PAPER = "The Llama 3 Herd of Models"
_LLAMA_4_CARD = "Llama 4 model card"
_PURPLE = "PurpleLlama model card"


@dataclass(frozen=True)
class Claim:
    """One published figure. `value` is in percent unless `unit` says otherwise; `source` names where it stands."""

    member: str
    variant: Variant
    subject: str
    setting: str
    value: float
    unit: str
    status: Status
    source: str


Row = tuple[str, str, Mapping[str, float]]  # subject, setting, member -> value

# Short names for the columns of the tables below.
_MEMBERS = {
    "2-7": "llama-2-7b", "2-13": "llama-2-13b", "2-70": "llama-2-70b", "3-8": "llama-3-8b", "3-70": "llama-3-70b",
    "31-8": "llama-3.1-8b", "31-70": "llama-3.1-70b", "31-405": "llama-3.1-405b", "32-1": "llama-3.2-1b",
    "32-3": "llama-3.2-3b", "32-11v": "llama-3.2-11b-vision", "32-90v": "llama-3.2-90b-vision",
    "33-70": "llama-3.3-70b", "scout": "llama-4-scout", "maverick": "llama-4-maverick",
    "behemoth": "llama-4-behemoth", "lg3-8": "llama-guard-3-8b", "lg3-1": "llama-guard-3-1b",
    "lg3-int4": "llama-guard-3-1b-int4", "lg3-11v": "llama-guard-3-11b-vision", "lg4": "llama-guard-4-12b",
    "pg1": "prompt-guard-86m", "pg2-86": "prompt-guard-2-86m", "pg2-22": "prompt-guard-2-22m",
}  # fmt: skip

_INSTRUCT: tuple[Row, ...] = (
    ("MMLU", "5-shot", {"3-8": 68.5, "3-70": 82.0, "31-8": 69.4, "31-70": 83.6, "31-405": 87.3, "32-1": 49.3,
                        "32-3": 63.4}),
    ("MMLU", "0-shot, chain of thought", {"31-8": 73.0, "31-70": 86.0, "31-405": 88.6, "33-70": 86.0, "32-11v": 73.0,
                                          "32-90v": 86.0}),
    ("MMLU-Pro", "5-shot, chain of thought", {"31-8": 48.3, "31-70": 66.4, "31-405": 73.3, "33-70": 68.9}),
    ("MMLU-Pro", "0-shot", {"scout": 74.3, "maverick": 80.5}),
    ("GPQA", "", {"3-8": 34.6, "3-70": 39.5, "31-8": 30.4, "31-70": 46.7, "31-405": 50.7, "32-1": 27.2, "32-3": 32.8,
                  "32-11v": 32.8, "32-90v": 46.7}),
    ("GPQA Diamond", "", {"31-8": 31.8, "31-70": 48.0, "31-405": 49.0, "33-70": 50.5, "scout": 57.2,
                          "maverick": 69.8}),
    ("HumanEval", "0-shot", {"3-8": 60.4, "3-70": 81.7, "31-8": 72.6, "31-70": 80.5, "31-405": 89.0, "33-70": 88.4}),
    ("MBPP EvalPlus", "base", {"3-8": 70.6, "3-70": 82.5, "31-8": 72.8, "31-70": 86.0, "31-405": 88.6, "33-70": 87.6}),
    ("LiveCodeBench", "10/2024 to 02/2025", {"scout": 32.8, "maverick": 43.4}),
    ("IFEval", "", {"31-8": 80.4, "31-70": 87.5, "31-405": 88.6, "33-70": 92.1, "32-1": 59.5, "32-3": 77.4}),
    ("GSM8K", "chain of thought", {"31-8": 84.5, "31-70": 95.1, "31-405": 96.8, "32-1": 44.4, "32-3": 77.7}),
    ("MATH", "chain of thought", {"3-8": 29.1, "3-70": 51.0, "31-8": 51.9, "31-70": 68.0, "31-405": 73.8,
                                  "33-70": 77.0, "32-1": 30.6, "32-3": 48.0, "32-11v": 51.9, "32-90v": 68.0}),
    ("MGSM", "", {"31-8": 68.9, "31-70": 86.9, "31-405": 91.6, "33-70": 91.1, "32-1": 24.5, "32-3": 58.2,
                  "32-11v": 68.9, "32-90v": 86.9, "scout": 90.6, "maverick": 92.3}),
    ("NIH, multi-needle", "", {"31-8": 98.8, "31-70": 97.5, "32-1": 75.0, "32-3": 84.7}),
    ("MMMU", "", {"32-11v": 50.7, "32-90v": 60.3, "scout": 69.4, "maverick": 73.4}),
    ("MMMU-Pro", "standard", {"32-11v": 33.0, "32-90v": 45.2}),
    ("MMMU-Pro", "vision", {"32-11v": 23.7, "32-90v": 33.8}),
    ("MMMU-Pro", "average", {"scout": 52.2, "maverick": 59.6}),
    ("MathVista", "", {"32-11v": 51.5, "32-90v": 57.3, "scout": 70.7, "maverick": 73.7}),
    ("ChartQA", "", {"32-11v": 83.4, "32-90v": 85.5, "scout": 88.8, "maverick": 90.0}),
    ("DocVQA", "test", {"32-11v": 88.4, "32-90v": 90.1, "scout": 94.4, "maverick": 94.4}),
    ("MTOB half book", "English to Kalamang, chrF", {"scout": 42.2, "maverick": 54.0}),
    ("MTOB half book", "Kalamang to English, chrF", {"scout": 36.6, "maverick": 46.4}),
    ("MTOB full book", "English to Kalamang, chrF", {"scout": 39.7, "maverick": 50.8}),
    ("MTOB full book", "Kalamang to English, chrF", {"scout": 36.3, "maverick": 46.7}),
    ("MMLU", "5-shot, int4 SpinQuant", {"32-1": 47.3, "32-3": 62.0}),
    ("MMLU", "5-shot, int4 QLoRA", {"32-1": 49.0, "32-3": 62.4}),
)  # fmt: skip

# Llama 4's card repeats older models with its own settings.
_INSTRUCT_IN_LLAMA_4_CARD: tuple[Row, ...] = (
    ("MMLU-Pro", "0-shot", {"31-405": 73.4, "33-70": 68.9}),
    ("LiveCodeBench", "10/2024 to 02/2025", {"31-405": 27.7, "33-70": 33.3}),
)

_INSTRUCT_IN_PAPER: tuple[Row, ...] = (
    ("GPQA", "the paper's figure", {"31-8": 32.8, "31-405": 51.1}),
    ("NIH, multi-needle", "the paper's figure", {"31-405": 98.1}),
)

_BASE: tuple[Row, ...] = (
    ("MMLU", "5-shot", {"2-7": 45.3, "2-13": 54.8, "2-70": 68.9, "3-8": 66.7, "3-70": 79.5, "31-8": 66.7,
                        "31-70": 79.3, "31-405": 85.2, "32-1": 32.2, "32-3": 58.0, "scout": 79.6, "maverick": 85.5}),
    ("Code", "mean of HumanEval and MBPP", {"2-7": 16.8, "2-13": 24.5, "2-70": 37.5}),
    ("Math", "mean of GSM8K 8-shot and MATH 4-shot", {"2-7": 14.6, "2-13": 28.7, "2-70": 35.2}),
    ("MMLU-Pro", "", {"31-8": 37.1, "31-70": 53.8, "31-405": 61.6, "scout": 58.2, "maverick": 62.9}),
    ("MBPP", "3-shot", {"31-70": 66.4, "31-405": 74.4, "scout": 67.8, "maverick": 77.6}),
    ("MATH", "4-shot", {"31-70": 41.6, "31-405": 53.5, "scout": 50.3, "maverick": 61.2}),
    ("TydiQA", "", {"31-70": 29.9, "31-405": 34.3, "scout": 31.5, "maverick": 31.7}),
    ("ChartQA", "", {"32-11v": 39.4, "32-90v": 54.2, "scout": 83.4, "maverick": 85.3}),
    ("DocVQA", "", {"32-11v": 62.3, "32-90v": 70.7, "scout": 89.4, "maverick": 91.6}),
    ("VQAv2", "", {"32-11v": 66.8, "32-90v": 73.6}),
    ("MMMU", "", {"32-11v": 41.7, "32-90v": 49.3}),
    ("NIH, multi-needle", "", {"32-1": 96.8}),
)  # fmt: skip

_GUARDS: tuple[Row, ...] = (
    ("F1, English", "response classification", {"lg3-8": 93.9, "lg3-1": 89.9, "lg3-int4": 90.4}),
    ("False positive rate, English", "response classification", {"lg3-8": 4.0, "lg3-1": 9.0, "lg3-int4": 8.4}),
    ("F1", "prompts with an image", {"lg3-11v": 73.3}),
    ("F1", "responses to an image", {"lg3-11v": 93.8}),
    ("Recall, English", "in-house set, outputs", {"lg4": 69}),
    ("False positive rate, English", "in-house set, outputs", {"lg4": 11}),
    ("F1, English", "in-house set, outputs", {"lg4": 61}),
    ("Recall, seven other languages", "in-house set, outputs", {"lg4": 43}),
    ("False positive rate, seven other languages", "in-house set, outputs", {"lg4": 3}),
    ("F1, seven other languages", "in-house set, outputs", {"lg4": 51}),
    ("Recall, one image", "in-house set, outputs", {"lg4": 41}),
    ("False positive rate, one image", "in-house set, outputs", {"lg4": 9}),
    ("F1, one image", "in-house set, outputs", {"lg4": 38}),
    ("Recall, several images", "in-house set, outputs", {"lg4": 61}),
    ("False positive rate, several images", "in-house set, outputs", {"lg4": 9}),
    ("F1, several images", "in-house set, outputs", {"lg4": 52}),
    ("Recall at 1% false positives, English", "private jailbreak set", {"pg1": 21.2, "pg2-86": 97.5, "pg2-22": 88.7}),
    ("Attack prevention at 3% utility loss", "AgentDojo", {"pg1": 67.6, "pg2-86": 81.2, "pg2-22": 78.4}),
)
_CLASSIFIERS_OTHER_UNITS: tuple[tuple[str, str, str, Mapping[str, float]], ...] = (
    ("AUC, English", "private jailbreak set", "", {"pg1": 0.987, "pg2-86": 0.998, "pg2-22": 0.995}),
    ("AUC, multilingual", "private jailbreak set", "", {"pg1": 0.983, "pg2-86": 0.995, "pg2-22": 0.942}),
    ("Latency at 512 tokens", "A100", "ms", {"pg1": 92.4, "pg2-86": 92.4, "pg2-22": 19.3}),
)

# Sizes as the cards print them, in billions: total, active.
_CARD_SIZES: Mapping[str, tuple[float, float | None]] = {
    "2-7": (7, None), "2-13": (13, None), "2-70": (70, None), "3-8": (8, None), "3-70": (70, None),
    "31-8": (8, None), "31-70": (70, None), "31-405": (405, None), "32-1": (1.23, None), "32-3": (3.21, None),
    "32-11v": (10.6, None), "32-90v": (88.8, None), "33-70": (70, None), "scout": (109, 17), "maverick": (400, 17),
    "lg3-int4": (1.123, None), "lg4": (12, None),
}  # fmt: skip
_BEHEMOTH = "press reports quoting Meta's announcement"
_BEHEMOTH_CLAIMS = (("Parameters", "total, about", 2000, "billion"), ("Parameters", "active", 288, "billion"),
                    ("Routed experts", "", 16, ""))  # fmt: skip


def _generation(column: str) -> str:
    if column in ("scout", "maverick"):
        return "4"
    return {"2": "2", "3": "3", "31": "3.1", "32": "3.2", "33": "3.3"}[column.split("-")[0]]


def _card(column: str) -> str:
    if column.startswith(("lg", "pg")):
        return _PURPLE
    if column.endswith("v"):
        return "Llama 3.2 vision model card"
    return f"Llama {_generation(column)} model card"


def _variant(column: str, variant: Variant) -> Variant:
    return "classifier" if column.startswith("pg") else variant


def _rows(rows: tuple[Row, ...], variant: Variant, source: str | None = None) -> list[Claim]:
    return [
        Claim(_MEMBERS[column], _variant(column, variant), subject, setting, value, "%", "verified",
              source or _card(column))
        for subject, setting, values in rows
        for column, value in values.items()
    ]  # fmt: skip


def _sizes() -> list[Claim]:
    claims = []
    for column, (total, active) in _CARD_SIZES.items():
        for setting, value in (("total", total), ("active", active)):
            if value is not None:
                claims.append(Claim(_MEMBERS[column], "all", "Parameters", setting, value, "billion", "verified",
                                    _card(column)))  # fmt: skip
    return claims


def _all() -> dict[str, tuple[Claim, ...]]:
    claims = _sizes()
    claims += _rows(_INSTRUCT, "instruct")
    claims += _rows(_INSTRUCT_IN_LLAMA_4_CARD, "instruct", _LLAMA_4_CARD)
    claims += _rows(_INSTRUCT_IN_PAPER, "instruct", _PAPER) + _rows(_BASE, "base") + _rows(_GUARDS, "instruct")
    for subject, setting, unit, values in _CLASSIFIERS_OTHER_UNITS:
        claims += [Claim(_MEMBERS[column], "classifier", subject, setting, value, unit, "verified", _PURPLE)
                   for column, value in values.items()]  # fmt: skip
    for subject, setting, value, unit in _BEHEMOTH_CLAIMS:
        claims.append(Claim(_MEMBERS["behemoth"], "all", subject, setting, value, unit, "secondary", _BEHEMOTH))
    by_member: dict[str, tuple[Claim, ...]] = dict.fromkeys(_MEMBERS.values(), ())
    for claim in claims:
        by_member[claim.member] += (claim,)
    return by_member


CLAIMS: dict[str, tuple[Claim, ...]] = _all()
