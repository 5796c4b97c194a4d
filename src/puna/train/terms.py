"""Which licence a run's base and data come under, and what it asks of the run and of what comes out of it.

A summary of the facts in `puna.family.licences`, not legal advice.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from puna.checkpoint.hub import licence_of
from puna.checkpoint.lineage import read_record
from puna.errors import PunaError
from puna.family.licences import LICENCES, Licence
from puna.family.members import find

EU = "EU"
_EXCLUDED = ("of the Acceptable Use Policy: the rights under section 1(a) of the {title} are not granted, with respect "
             "to multimodal models, to an individual domiciled in, or a company with a principal place of business in, "
             "the European Union")  # fmt: skip
_OTHERS = ("section 1.b.v of the {title}: you will not use the Llama Materials or any output or results of them to "
           "improve any other large language model (excluding {name} or derivative works thereof)")  # fmt: skip


@dataclass(frozen=True)
class Terms:
    """What a model is under. `licence` None: nobody says, or none of Meta's. `stated`: what its card says."""

    licence: Licence | None
    stated: str | None
    multimodal: bool = False
    prefix: str | None = None  # how names begin already, because of what the base learnt from

    def as_record(self, prefix: str | None) -> dict[str, Any]:
        """For the lineage record of something whose name begins with `prefix`."""
        one = self.licence
        facts = {"title": one.title, "badge": one.badge, "notice": one.notice} if one else {}
        return {"id": one.id if one else self.stated, "name_prefix": prefix, **facts}


def terms_of(path: Path, name: str) -> Terms:
    """Of a checkpoint at `path` that the user calls `name`: by its lineage, its model card, or its name."""
    record = read_record(path) or {}
    stated = (record.get("licence") or {}).get("id") or licence_of(path)
    if stated is None and (member := find(name)) is not None:
        stated = member.licence
    prefix = (record.get("licence") or {}).get("name_prefix")
    return Terms(LICENCES.get(_key(stated)) if stated else None, stated, _multimodal(path), prefix)


def check_terms(base: Terms, authors: Sequence[str], domicile: str | None) -> list[str]:
    """What to tell the user before a run on a base, with data that the models `authors` wrote.

    Raises PunaError with the clause where a licence forbids it.
    """
    told: list[str] = []
    licence = base.licence
    if licence is not None and licence.eu_multimodal_exclusion and base.multimodal:
        clause = _EXCLUDED.format(title=licence.title)
        if domicile == EU:
            raise PunaError(f"this base may not be tuned by you, by the last clause {clause}. Tune a text-only member, "
                            "or a base under another licence.")  # fmt: skip
        if domicile is None:
            told.append(f"Mind the last clause {clause} (`domicile` in the configuration answers it).")
    for author in authors:
        theirs = _licence_of_author(author)
        if theirs is None:
            told.append(f"outputs_of: {author} is no Llama known here; see yourself what its terms say of training.")
        elif not theirs.outputs_may_train_others and (licence is None or licence.id != theirs.id):
            own = (theirs.badge or "Built with Llama 2").removeprefix("Built with ")
            clause = _OTHERS.format(title=theirs.title, name=own)
            raise PunaError(f"data written by {author} may not train this base, by {clause}. Take it out, or tune "
                            "a model of that generation.")  # fmt: skip
    return told


def prefix_of(base: Terms, authors: Sequence[str]) -> str | None:
    """How the result's name must begin, or None."""
    if base.licence is not None and base.licence.name_prefix is not None:
        return base.licence.name_prefix
    if base.prefix is not None:
        return base.prefix
    theirs = [licence for author in authors if (licence := _licence_of_author(author)) is not None]
    return next((one.name_prefix for one in theirs if one.prefix_for_outputs and one.name_prefix), None)


def named(name: str, prefix: str | None) -> str:
    """A model's name as its licence wants it: "mine" becomes "Llama-mine"."""
    if prefix is None:
        return name
    start = "".join(each for each in prefix.lower() if each.isalnum())
    kept = "".join(each for each in name.lower() if each.isalnum())
    spelt = prefix.replace(" ", "-")
    if not kept.startswith(start):
        return f"{spelt}-{name}"
    count = at = 0
    while count < len(start):
        count += name[at].isalnum()
        at += 1
    return spelt + name[at:]


def _licence_of_author(name: str) -> Licence | None:
    """The licence of a model that wrote data, if it is one of the family's."""
    if name in LICENCES:
        return LICENCES[name]
    member = find(name)
    return None if member is None or member.licence is None else LICENCES.get(member.licence)


def _key(stated: str) -> str:
    return stated.lower().replace("-", "").removesuffix("communitylicense").removesuffix("license").strip()


def _multimodal(path: Path) -> bool:
    config = path / "config.json" if path.is_dir() else path.parent / "config.json"
    try:
        return isinstance(json.loads(config.read_bytes()).get("vision_config"), dict)
    except (OSError, ValueError, AttributeError):
        return False
