"""Find the workers that are connected to a router, among all that ever were."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0014"
down_revision = "0013"
branch_labels = None
depends_on = None

_CONNECTED = "router_id is not null"


def upgrade() -> None:
    op.create_index(
        "workers_connected", "workers", ["router_id"], postgresql_where=sa.text(_CONNECTED)
    )


def downgrade() -> None:
    op.drop_index("workers_connected", table_name="workers", postgresql_where=sa.text(_CONNECTED))
