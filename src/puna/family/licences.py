"""The licences that the weights come under, as data. A summary, not legal advice: the text in force is the one shipped
with the weights. Source: llama-models, `models/*/LICENSE` and `USE_POLICY.md`.
"""

from dataclasses import dataclass

_RIGHTS = "Meta Platforms, Inc. All Rights Reserved."


@dataclass(frozen=True)
class Licence:
    """What one Llama Community License asks of those who distribute weights, derivatives or products with them.

    `badge`: text to show prominently. `name_prefix`: how the name of a derived model must begin.
    `prefix_for_outputs`: whether that also holds for models trained on a Llama's outputs. `outputs_may_train_others`:
    whether outputs may improve other language models. `eu_multimodal_exclusion`: whether the use policy withholds the
    rights to multimodal models from individuals and companies of the European Union (end users of products excepted).
    `notice`: the attribution for the text file "Notice" that must go with every copy.
    """

    id: str
    title: str
    dated: str
    badge: str | None
    name_prefix: str | None
    prefix_for_outputs: bool
    outputs_may_train_others: bool
    eu_multimodal_exclusion: bool
    notice: str


def _from_31(version: str, dated: str, eu_multimodal_exclusion: bool) -> Licence:
    """Licences from Llama 3.1 on differ only in version, date and the clause on the European Union."""
    title = f"Llama {version} Community License"
    return Licence(
        f"llama{version}", title, dated, badge="Built with Llama", name_prefix="Llama", prefix_for_outputs=True,
        outputs_may_train_others=True, eu_multimodal_exclusion=eu_multimodal_exclusion,
        notice=f"Llama {version} is licensed under the {title}, Copyright © {_RIGHTS}",
    )  # fmt: skip


_ALL = (
    Licence(
        "llama2", "Llama 2 Community License", "2023-07-18", badge=None, name_prefix=None, prefix_for_outputs=False,
        outputs_may_train_others=False, eu_multimodal_exclusion=False,
        notice=f"Llama 2 is licensed under the LLAMA 2 Community License, Copyright (c) {_RIGHTS}",
    ),
    Licence(
        "llama3", "Meta Llama 3 Community License", "2024-04-18", badge="Built with Meta Llama 3",
        name_prefix="Llama 3", prefix_for_outputs=False, outputs_may_train_others=False, eu_multimodal_exclusion=False,
        notice=f"Meta Llama 3 is licensed under the Meta Llama 3 Community License, Copyright © {_RIGHTS}",
    ),
    _from_31("3.1", "2024-07-23", eu_multimodal_exclusion=False),
    _from_31("3.2", "2024-09-25", eu_multimodal_exclusion=True),
    _from_31("3.3", "2024-12-06", eu_multimodal_exclusion=True),
    _from_31("4", "2025-04-05", eu_multimodal_exclusion=True),
)  # fmt: skip

LICENCES: dict[str, Licence] = {licence.id: licence for licence in _ALL}

MONTHLY_ACTIVE_USERS_LIMIT = 700_000_000  # above this on the version's release date, Meta must grant a licence first
