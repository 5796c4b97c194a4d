"""The family as data: names, licences, claims, and what is not published."""

import subprocess
import sys
from pathlib import Path

import pytest

import puna
from puna.errors import PunaError
from puna.family.claims import CLAIMS
from puna.family.describe import describe
from puna.family.licences import LICENCES
from puna.family.members import MEMBERS, _keys_of, find, get

NAMES = [member.name for member in MEMBERS]


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("llama-3.1-8b", "llama-3.1-8b"),
        ("Llama 3.1 8B", "llama-3.1-8b"),
        ("LLAMA_3.1_8B", "llama-3.1-8b"),
        ("llama3.1:8b", "llama-3.1-8b"),
        ("meta-llama/Llama-3.1-8B-Instruct", "llama-3.1-8b"),
        ("meta-llama/Meta-Llama-3.1-8B", "llama-3.1-8b"),
        ("meta-llama/Meta-Llama-3-8B-Instruct", "llama-3-8b"),
        ("meta-llama/Llama-2-7b-chat-hf", "llama-2-7b"),
        ("someone/Llama-3.2-3B-Instruct-bf16", "llama-3.2-3b"),
        ("meta-llama/Llama-3.2-1B-Instruct-SpinQuant_INT4_EO8", "llama-3.2-1b"),
        ("scout", "llama-4-scout"),
        ("Llama 4 Scout", "llama-4-scout"),
        ("meta-llama/Llama-4-Maverick-17B-128E-Instruct-FP8", "llama-4-maverick"),
        ("llama guard 3 1b int4", "llama-guard-3-1b-int4"),
        ("Llama-Prompt-Guard-2-22M", "prompt-guard-2-22m"),
        ("meta-llama/Prompt-Guard-86M", "prompt-guard-86m"),
    ],
)
def test_forgiving_names(written: str, meant: str) -> None:
    assert get(written).name == meant


def test_every_name_title_and_hub_id_leads_to_its_own_member() -> None:
    assert len(set(NAMES)) == len(NAMES) == 24
    for member in MEMBERS:
        for name in (member.name, member.title, *member.hub_ids.values()):
            assert find(name) is member, name
    keys = [key for member in MEMBERS for key in _keys_of(member)]
    assert len(keys) == len(set(keys)), "two members answer to one name"


@pytest.mark.parametrize(
    ("written", "suggested"),
    [("lama-3.1-8b", "llama-3.1-8b"), ("8b", "llama-3-8b"), ("llama guard 4", "llama-guard-4-12b"),
     ("llama-4-scoot", "llama-4-scout")],
)  # fmt: skip
def test_unknown_name_suggests_close_ones(written: str, suggested: str) -> None:
    assert find(written) is None
    with pytest.raises(PunaError, match="Did you mean") as error:
        get(written)
    assert suggested in str(error.value)


@pytest.mark.parametrize("written", ["mistral", "", "   ", "/", "instruct"])
def test_name_without_relatives_points_to_the_list(written: str) -> None:
    with pytest.raises(PunaError, match="puna list"):
        get(written)


def test_unpublished_values_are_none_and_not_invented() -> None:
    behemoth = describe(get("behemoth"))
    for field in ("shape", "parameters", "weight_bytes", "kv_cache", "released", "licence", "languages"):
        assert behemoth[field] is None, field
    assert behemoth["context"] == {"base": None, "instruct": None}
    assert {claim["status"] for claim in behemoth["claims"]} == {"secondary"}
    shapeless = [member.name for member in MEMBERS if member.config is None and member.encoder is None]
    assert shapeless == ["llama-4-behemoth"]


def test_what_was_not_checked_is_marked() -> None:
    notes = [(member.name, note) for member in MEMBERS for note in member.notes]
    unverified = {(name, note.about) for name, note in notes if note.status == "unverified"}
    assert ("llama-guard-4-12b", "attention") in unverified
    assert ("prompt-guard-2-86m", "encoder") in unverified
    assert ("llama-guard-3-8b", "rope_scaling") in unverified


def test_released_members_are_complete() -> None:
    for member in MEMBERS:
        if member.name == "llama-4-behemoth":
            continue
        assert member.released, member.name
        assert member.hub_ids, member.name
        assert member.licence in LICENCES, member.name
        assert member.context_length, member.name
        if member.config is not None:
            assert member.config.context_length == (member.instruct_context or member.base_context)
            assert ("image" in member.inputs) == (member.vision is not None)


def test_contexts_of_base_and_instruct() -> None:
    assert (get("scout").base_context, get("scout").instruct_context) == (262_144, 10_485_760)
    assert (get("maverick").base_context, get("maverick").instruct_context) == (262_144, 1_048_576)
    assert get("llama-3.3-70b").base_context is None
    assert get("llama-3-8b").knowledge_cutoff == "2023-03"


def test_licences() -> None:
    assert list(LICENCES) == ["llama2", "llama3", "llama3.1", "llama3.2", "llama3.3", "llama4"]
    assert [key for key, licence in LICENCES.items() if not licence.outputs_may_train_others] == ["llama2", "llama3"]
    assert [key for key, licence in LICENCES.items() if licence.eu_multimodal_exclusion] == [
        "llama3.2", "llama3.3", "llama4"]  # fmt: skip
    assert LICENCES["llama3"].name_prefix == "Llama 3"
    assert not LICENCES["llama3"].prefix_for_outputs
    assert LICENCES["llama2"].badge is None
    assert LICENCES["llama4"].notice == (
        "Llama 4 is licensed under the Llama 4 Community License, Copyright © Meta Platforms, Inc. All Rights Reserved."
    )


def test_claims_belong_to_members_and_name_their_source() -> None:
    assert set(CLAIMS) == set(NAMES)
    seen = set()
    for name, claims in CLAIMS.items():
        for claim in claims:
            assert claim.member == name
            assert claim.source
            assert claim.unit != "%" or 0 < claim.value <= 100, claim
            key = (name, claim.variant, claim.subject, claim.setting)
            assert key not in seen, f"published twice: {key}"
            seen.add(key)
    scores = {(c.subject, c.setting): (c.value, c.source) for c in CLAIMS["llama-3.1-405b"] if c.variant == "instruct"}
    assert scores["MMLU", "5-shot"] == (87.3, "Llama 3.1 model card")
    assert scores["MMLU-Pro", "0-shot"] == (73.4, "Llama 4 model card")


def test_importing_the_family_needs_no_heavy_package() -> None:
    source = str(Path(puna.__file__).parents[1])
    code = (
        f"import sys; sys.path.insert(0, {source!r}); import puna.family.members, puna.family.describe; "
        "print([m for m in ('torch', 'numpy', 'pydantic', 'typer', 'rich', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
