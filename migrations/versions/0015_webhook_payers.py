"""Whose a webhook is, so that each payer has a share of the calls."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0015"
down_revision = "0014"
branch_labels = None
depends_on = None

_PENDING = "state = 'pending'"


def upgrade() -> None:
    op.add_column("webhooks", sa.Column("account_id", sa.Text(), nullable=True))
    # Of a job that is no more, its own id: a payer by itself.
    op.execute(
        "update webhooks w set account_id = coalesce("
        "(select j.account_id from jobs j where j.id = w.job_id), w.job_id)"
    )
    op.alter_column("webhooks", "account_id", nullable=False)
    op.drop_index("webhooks_due", table_name="webhooks")
    op.create_index(
        "webhooks_due",
        "webhooks",
        ["account_id", "next_try_at"],
        postgresql_where=sa.text(_PENDING),
    )


def downgrade() -> None:
    op.drop_index("webhooks_due", table_name="webhooks")
    op.create_index("webhooks_due", "webhooks", ["next_try_at"], postgresql_where=sa.text(_PENDING))
    op.drop_column("webhooks", "account_id")
