"""Workers that poll, by their names; what clients use by theirs, at doors that show it."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("door_ids", sa.Column("shown_as", sa.Text(), nullable=True))
    op.create_table(
        "named_use",
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("tokens", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("name"),
    )
    op.create_table(
        "pull_workers",
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("door", sa.Text(), nullable=False),
        sa.Column("worker_id", sa.Text(), nullable=False),
        sa.Column("owner_hash", sa.LargeBinary(), nullable=False),
        sa.Column("shown_as", sa.Text(), nullable=True),
        sa.Column("info", sa.Text(), nullable=True),
        sa.Column("agent", sa.Text(), nullable=True),
        sa.Column(
            "created_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
        ),
        sa.PrimaryKeyConstraint("name"),
        sa.UniqueConstraint("worker_id"),
    )
    op.create_index("pull_workers_owner", "pull_workers", ["owner_hash"], unique=False)


def downgrade() -> None:
    op.drop_index("pull_workers_owner", table_name="pull_workers")
    op.drop_table("pull_workers")
    op.drop_table("named_use")
    op.drop_column("door_ids", "shown_as")
