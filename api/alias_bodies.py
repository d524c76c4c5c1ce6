"""Bodies of the routes that move aliases. Strict, like every body."""

from __future__ import annotations

from typing import Annotated, Any, Final

from pydantic import Field, StringConstraints

from shared.contract.gate_file import MAX_BYTES
from shared.contract.part import Part

Reason = Annotated[str, StringConstraints(min_length=1, max_length=1000)]
SubjectOfRole = Annotated[str, StringConstraints(min_length=1, max_length=300)]
Role = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,99}$")]
KeyIds = Annotated[list[SubjectOfRole], Field(min_length=1, max_length=100)]
VersionNumber = Annotated[int, Field(ge=1, le=2**31 - 1)]


class GateBody(Part):
    """A gate, and the figures that it is held against: of an evaluation, or of a report as it stands."""

    text: Annotated[str, StringConstraints(min_length=1, max_length=MAX_BYTES)] = Field(
        description="Of gate.yaml; docs/gate.md."
    )
    evaluation: Annotated[str, StringConstraints(min_length=1, max_length=100)] | None = None
    report: dict[str, Any] | None = Field(
        default=None, description="Only without `evaluation`: the caller's own figures."
    )
    roles: Annotated[dict[Role, SubjectOfRole], Field(max_length=20)] = Field(
        default_factory=dict,
        description="Role -> subject. `candidate`, `base` and the stages of aliases (`prod`) are known without.",
    )


class PromoteAlias(Part):
    model: SubjectOfRole = Field(description="`ft:…`, a checkpoint, a combination's id, or another alias.")
    gate: GateBody | None = None
    dry_run: bool = Field(default=False, description="Only judge; nothing moves.")
    expected_version: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = Field(
        default=None, description="Move only if the alias is still at this version; 0: only if it is new."
    )
    force: bool = Field(default=False, description="Whatever the gate says, or without one. Needs a reason.")
    reason: Reason | None = None


class RollBackAlias(Part):
    to_version: VersionNumber | None = Field(default=None, description="null: what it named before.")
    expected_version: VersionNumber | None = Field(
        default=None, description="Move only if the alias is still at this version."
    )
    reason: Reason | None = None


class WithdrawPromotion(Part):
    reason: Reason | None = None


class EditAlias(Part):
    """What is named changes."""

    movers: KeyIds | None = Field(
        default=None, description="Ids of the keys that may move it; null: every key with models:write."
    )
    approvals: Annotated[int, Field(ge=0, le=10)] = Field(
        default=0, description="How many other keys must approve a promotion before it moves the alias."
    )
    approvers: KeyIds | None = Field(
        default=None, description="Ids of the keys that may approve; null: every key with models:write."
    )
    project_id: Annotated[str, StringConstraints(max_length=100)] | None = Field(
        default=None, description="Of the alias; null: the caller's own."
    )


BODIES: Final = (PromoteAlias, RollBackAlias, EditAlias, WithdrawPromotion)
