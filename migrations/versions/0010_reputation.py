"""Reputation: what was noted about workers, and what the checks of their answers have found."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("workers", sa.Column("quality", sa.Float(), server_default="1", nullable=False))
    op.create_table(
        "worker_events",
        sa.Column("id", sa.BigInteger(), autoincrement=True, nullable=False),
        sa.Column("worker_id", sa.Text(), nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("code", sa.Text(), nullable=False),
        sa.Column("job_id", sa.Text(), nullable=True),
        sa.Column("facts", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index("worker_events_at", "worker_events", ["at"], unique=False)
    op.create_index("worker_events_worker", "worker_events", ["worker_id", "at"], unique=False)


def downgrade() -> None:
    op.drop_index("worker_events_worker", table_name="worker_events")
    op.drop_index("worker_events_at", table_name="worker_events")
    op.drop_table("worker_events")
    op.drop_column("workers", "quality")
