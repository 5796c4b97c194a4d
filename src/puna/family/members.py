"""Every member of the Llama family, and how to find one by whatever name a user has for it."""

import re
from difflib import get_close_matches

from puna.errors import PunaError
from puna.family import llama4, llama23, safeguards
from puna.family.member import Member

MEMBERS: tuple[Member, ...] = (*llama23.MEMBERS, *llama4.MEMBERS, *safeguards.MEMBERS)

# Endings that name a variant and not another model.
_VARIANT = re.compile(r"(instruct|chat|base|hf|it|bf16|fp8(dynamic)?)$")


def _key(name: str) -> str:
    """What counts in a name: letters, digits and dots, without the owner, Meta's name and the variant."""
    key = re.sub(r"[^a-z0-9.]", "", name.strip().rsplit("/", 1)[-1].lower()).removeprefix("meta")
    while (shorter := _VARIANT.sub("", key)) not in ("", key):
        key = shorter
    return key


def _keys_of(member: Member) -> set[str]:
    names = {member.name, member.title, *member.hub_ids.values()}
    names |= {f"llama-{name}" for name in (member.name, member.title) if not name.lower().startswith("llama")}
    if member.generation == "4" and member.kind == "language model":
        names.add(member.title.split()[-1])
    return {_key(name) for name in names}


_BY_KEY = {key: member for member in MEMBERS for key in _keys_of(member)}


def find(name: str) -> Member | None:
    """The member that `name` means, or None. Case, separators, owner and variant don't matter: "llama-3.1-8b",
    "Llama 3.1 8B", "meta-llama/Llama-3.1-8B-Instruct" and "llama3.1:8b" are one; so are "scout" and "llama-4-scout".
    """
    return _BY_KEY.get(_key(name))


def get(name: str) -> Member:
    """Like `find`, but an unknown name raises PunaError with the closest names."""
    member = find(name)
    if member is None:
        matches = close_matches(name)
        hint = f"Did you mean {', '.join(matches)}?" if matches else "`puna list` shows all names."
        raise PunaError(f"there is no member {name!r} in the Llama family. {hint}")
    return member


def close_matches(name: str, limit: int = 4) -> list[str]:
    """Names of members that look like `name`, or contain it, best first."""
    key = _key(name)
    by_key = {_key(member.name): member.name for member in MEMBERS}
    inside = [full for known, full in by_key.items() if len(key) >= 2 and key in known]
    similar = [_BY_KEY[close].name for close in get_close_matches(key, list(_BY_KEY), n=limit, cutoff=0.6)]
    return list(dict.fromkeys([*inside, *similar]))[:limit]
