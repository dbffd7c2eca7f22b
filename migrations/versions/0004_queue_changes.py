"""What comes to the queue and leaves it, for routers that count in memory."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

_FUNCTION = """
create function note_queue_change() returns trigger language plpgsql as $$
begin
    if tg_op <> 'INSERT' then
        insert into queue_changes (lanes, multiplier_milli, seqs, added)
        select lanes, multiplier_milli, array_agg(seq order by seq), false
        from (select array_agg(lane order by lane) as lanes, multiplier_milli, seq
              from gone group by multiplier_milli, seq) j
        group by lanes, multiplier_milli;
    end if;
    if tg_op <> 'DELETE' then
        insert into queue_changes (lanes, multiplier_milli, seqs, added)
        select lanes, multiplier_milli, array_agg(seq order by seq), true
        from (select array_agg(lane order by lane) as lanes, multiplier_milli, seq
              from come group by multiplier_milli, seq) j
        group by lanes, multiplier_milli;
    end if;
    return null;
end $$"""

_TRIGGERS = {
    "insert": "new table as come",
    "delete": "old table as gone",
    "update": "old table as gone new table as come",
}


def upgrade() -> None:
    op.create_table(
        "queue_changes",
        sa.Column(
            "xact",
            sa.BigInteger(),
            server_default=sa.text("pg_current_xact_id()::text::bigint"),
            nullable=False,
        ),
        sa.Column("id", sa.BigInteger(), sa.Identity(), nullable=False),
        sa.Column("lanes", postgresql.ARRAY(sa.Text()), nullable=False),
        sa.Column("multiplier_milli", sa.BigInteger(), nullable=False),
        sa.Column("seqs", postgresql.ARRAY(sa.BigInteger()), nullable=False),
        sa.Column("added", sa.Boolean(), nullable=False),
        sa.Column(
            "at",
            sa.DateTime(timezone=True),
            server_default=sa.text("clock_timestamp()"),
            nullable=False,
        ),
        sa.PrimaryKeyConstraint("xact", "id"),
    )
    op.execute(_FUNCTION)
    for event, tables in _TRIGGERS.items():
        op.execute(
            f"create trigger queue_{event} after {event} on queue referencing {tables}"
            " for each statement execute function note_queue_change()"
        )


def downgrade() -> None:
    for event in _TRIGGERS:
        op.execute(f"drop trigger queue_{event} on queue")
    op.execute("drop function note_queue_change()")
    op.drop_table("queue_changes")
