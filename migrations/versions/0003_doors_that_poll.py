"""Jobs that any of several models may serve, and the ids that polling doors hand out."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("jobs", sa.Column("choices", sa.Text(), nullable=True))
    op.create_table(
        "door_ids",
        sa.Column("id_hash", sa.LargeBinary(), nullable=False),
        sa.Column("door", sa.Text(), nullable=False),
        sa.Column("quote_id", sa.Text(), nullable=False),
        sa.Column("job_index", sa.Integer(), nullable=True),
        sa.Column(
            "created_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
        ),
        sa.PrimaryKeyConstraint("id_hash"),
    )
    op.create_index("door_ids_created", "door_ids", ["created_at"], unique=False)


def downgrade() -> None:
    op.drop_index("door_ids_created", table_name="door_ids")
    op.drop_table("door_ids")
    op.drop_column("jobs", "choices")
