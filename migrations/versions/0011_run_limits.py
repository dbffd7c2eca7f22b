"""How long a job may run, where its client says so."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("jobs", sa.Column("run_limit_s", sa.Integer(), nullable=True))


def downgrade() -> None:
    op.drop_column("jobs", "run_limit_s")
