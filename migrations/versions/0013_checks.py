"""Checks on what is sold: the operator's prompts, what came of them, and payees that wait."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0013"
down_revision = "0012"
branch_labels = None
depends_on = None


def _time(name: str) -> sa.Column:
    return sa.Column(name, sa.DateTime(timezone=True), nullable=True)


def _now(name: str) -> sa.Column:
    return sa.Column(
        name, sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False
    )


def upgrade() -> None:
    op.add_column("payees", _time("held_until"))
    op.create_table(
        "check_prompts",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("prompt", sa.Text(), nullable=False),
        sa.Column("expected", sa.Text(), nullable=True),
        sa.Column("model", sa.Text(), nullable=True),
        sa.Column("max_tokens", sa.Integer(), nullable=False),
        _now("created_at"),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_table(
        "checks",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("prompt_id", sa.Text(), nullable=False),
        sa.Column("job_id", sa.Text(), nullable=False),
        sa.Column("worker_id", sa.Text(), nullable=True),
        sa.Column("model", sa.Text(), nullable=True),
        sa.Column("answer", sa.Text(), nullable=True),
        sa.Column("score", sa.Float(), nullable=True),
        _time("scored_at"),
        _now("created_at"),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("job_id"),
    )
    op.create_index(
        "checks_open",
        "checks",
        ["created_at"],
        unique=False,
        postgresql_where=sa.text("scored_at is null"),
    )
    op.create_index("checks_prompt", "checks", ["prompt_id", "created_at"], unique=False)
    op.create_index("checks_worker", "checks", ["worker_id", "created_at"], unique=False)


def downgrade() -> None:
    op.drop_index("checks_worker", table_name="checks")
    op.drop_index("checks_prompt", table_name="checks")
    op.drop_index("checks_open", table_name="checks", postgresql_where=sa.text("scored_at is null"))
    op.drop_table("checks")
    op.drop_table("check_prompts")
    op.drop_column("payees", "held_until")
