"""Secrets of a project: its credentials for trackers and a hub. They are encrypted, and nothing ever shows a value."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Final

from sqlalchemy import delete, func, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from shared.errors import Invalid, NotFound
from shared.store.tables import ProjectSecretRow
from shared.tenants.secret_box import SecretBox

WANDB_API_KEY: Final = "WANDB_API_KEY"
MLFLOW_TRACKING_URI: Final = "MLFLOW_TRACKING_URI"
MLFLOW_TRACKING_TOKEN: Final = "MLFLOW_TRACKING_TOKEN"  # noqa: S105  # a name
MLFLOW_TRACKING_USERNAME: Final = "MLFLOW_TRACKING_USERNAME"
MLFLOW_TRACKING_PASSWORD: Final = "MLFLOW_TRACKING_PASSWORD"  # noqa: S105  # a name
HF_TOKEN: Final = "HF_TOKEN"  # noqa: S105  # a name
# The libraries' own names of environment variables: who has used them before knows them.
NAMES: Final = (
    WANDB_API_KEY,
    MLFLOW_TRACKING_URI,
    MLFLOW_TRACKING_TOKEN,
    MLFLOW_TRACKING_USERNAME,
    MLFLOW_TRACKING_PASSWORD,
    HF_TOKEN,
)
# Tracker -> secrets without which it cannot be reached.
NEEDED: Final[Mapping[str, tuple[str, ...]]] = {"wandb": (WANDB_API_KEY,), "mlflow": (MLFLOW_TRACKING_URI,)}
MAX_CHARACTERS: Final = 2000


def checked_name(name: str) -> str:
    """Raises Invalid for a name that nothing would read."""
    if name not in NAMES:
        raise Invalid(f"No integration reads a secret of that name; the names are {', '.join(NAMES)}.", param="name")
    return name


def checked_value(value: Any) -> str:
    """Raises Invalid. Nothing of the value is in the message: what is wrong may be one character of a secret."""
    if not isinstance(value, str) or not 1 <= len(value) <= MAX_CHARACTERS:
        raise Invalid(f"'value' must be a text of 1 to {MAX_CHARACTERS} characters.", param="value")
    if not value.isascii() or not value.isprintable() or " " in value:
        raise Invalid("'value' must be visible ASCII characters, without spaces or line ends.", param="value")
    return value


def store(session: Session, box: SecretBox, name: str, value: str, *, project_id: str) -> ProjectSecretRow:
    """Keep a value under a name, in place of an earlier one. Raises Invalid when nothing is encrypted."""
    sealed = box.close(value)
    wanted = insert(ProjectSecretRow).values(project_id=project_id, name=name, sealed=sealed)
    session.execute(
        wanted.on_conflict_do_update(
            index_elements=[ProjectSecretRow.project_id, ProjectSecretRow.name],
            set_={"sealed": sealed, "updated_at": func.now()},
        )
    )
    return session.get_one(ProjectSecretRow, (project_id, name), populate_existing=True)


def listed(session: Session, *, project_id: str) -> Sequence[ProjectSecretRow]:
    """Those that the project has, by name."""
    query = select(ProjectSecretRow).where(ProjectSecretRow.project_id == project_id)
    return session.scalars(query.order_by(ProjectSecretRow.name)).all()


def remove(session: Session, name: str, *, project_id: str) -> None:
    """Raises NotFound."""
    gone = session.scalars(
        delete(ProjectSecretRow)
        .where(ProjectSecretRow.project_id == project_id, ProjectSecretRow.name == name)
        .returning(ProjectSecretRow.name)
    ).one_or_none()
    if gone is None:
        raise NotFound("This project has no secret of that name.", param="name")


def missing(session: Session, names: Collection[str], *, project_id: str) -> list[str]:
    """Those of `names` that the project has not, in their order."""
    kept = {row.name for row in listed(session, project_id=project_id)} if names else set()
    return [name for name in names if name not in kept]


def sealed(session: Session, *, project_id: str) -> dict[str, str]:
    """Name -> encrypted value."""
    return {row.name: row.sealed for row in listed(session, project_id=project_id)}
