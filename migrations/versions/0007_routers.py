"""Several routers on one database: who they are, and cancels that one asks of another."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

_TO_CANCEL = "cancel_reason is not null and state in ('queued', 'running')"


def upgrade() -> None:
    op.create_table(
        "routers",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column(
            "started_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
        ),
        sa.Column(
            "seen_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
        ),
        sa.Column(
            "workers",
            postgresql.JSONB(astext_type=sa.Text()),
            server_default="[]",
            nullable=False,
        ),
        sa.PrimaryKeyConstraint("id"),
    )
    op.add_column("workers", sa.Column("router_id", sa.Text(), nullable=True))
    op.add_column("jobs", sa.Column("cancel_reason", sa.Text(), nullable=True))
    op.create_index("jobs_to_cancel", "jobs", ["router_id"], postgresql_where=sa.text(_TO_CANCEL))


def downgrade() -> None:
    op.drop_index("jobs_to_cancel", table_name="jobs", postgresql_where=sa.text(_TO_CANCEL))
    op.drop_column("jobs", "cancel_reason")
    op.drop_column("workers", "router_id")
    op.drop_table("routers")
