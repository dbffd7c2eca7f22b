"""Where each router's data folder lies, so that a copy of it elsewhere is told from the router itself."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0017"
down_revision = "0016"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("routers", sa.Column("place", sa.Text(), nullable=True))


def downgrade() -> None:
    op.drop_column("routers", "place")
