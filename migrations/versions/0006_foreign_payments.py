"""Payments of the node that no payout has asked for."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "foreign_payments",
        sa.Column("payment_hash", sa.Text(), nullable=False),
        sa.Column("node_pubkey", sa.Text(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("amount_msat", sa.BigInteger(), nullable=False),
        sa.Column("fee_msat", sa.BigInteger(), nullable=False),
        sa.Column("sent_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("seen_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("confirmed_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("account", sa.Text(), nullable=True),
        sa.Column("booked", sa.Boolean(), server_default=sa.text("false"), nullable=False),
        sa.PrimaryKeyConstraint("payment_hash"),
    )
    op.create_index(
        "foreign_payments_held",
        "foreign_payments",
        ["payment_hash"],
        postgresql_where=sa.text("confirmed_at is null and state <> 'failed'"),
    )


def downgrade() -> None:
    op.drop_index(
        "foreign_payments_held",
        table_name="foreign_payments",
        postgresql_where=sa.text("confirmed_at is null and state <> 'failed'"),
    )
    op.drop_table("foreign_payments")
