"""First tables: money, and work."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute(sa.schema.CreateSequence(sa.Sequence("queue_seq")))
    op.create_table(
        "account_keys",
        sa.Column("key_hash", sa.LargeBinary(), nullable=False),
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("account_id", sa.Text(), nullable=False),
        sa.Column("label", sa.Text(), nullable=True),
        sa.Column("limit_msat", sa.BigInteger(), nullable=True),
        sa.Column("spent_msat", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("can_withdraw", sa.Boolean(), nullable=False),
        sa.Column("is_primary", sa.Boolean(), nullable=False),
        sa.Column(
            "created_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
        ),
        sa.Column("revoked_at", sa.DateTime(timezone=True), nullable=True),
        sa.PrimaryKeyConstraint("key_hash"),
        sa.UniqueConstraint("id"),
    )
    op.create_index(
        op.f("ix_account_keys_account_id"), "account_keys", ["account_id"], unique=False
    )
    op.create_table(
        "accounts",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column(
            "created_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
        ),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_table(
        "attempts",
        sa.Column("job_id", sa.Text(), nullable=False),
        sa.Column("n", sa.Integer(), nullable=False),
        sa.Column("worker_id", sa.Text(), nullable=False),
        sa.Column("router_id", sa.Text(), nullable=False),
        sa.Column(
            "started_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
        ),
        sa.Column("ended_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("outcome", sa.Text(), nullable=True),
        sa.Column("blame", sa.Text(), nullable=True),
        sa.Column("error", sa.Text(), nullable=True),
        sa.Column("tokens", sa.BigInteger(), nullable=True),
        sa.PrimaryKeyConstraint("job_id", "n"),
    )
    op.create_index("attempts_worker", "attempts", ["worker_id", "started_at"], unique=False)
    op.create_table(
        "audit",
        sa.Column("id", sa.BigInteger(), autoincrement=True, nullable=False),
        sa.Column(
            "at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False
        ),
        sa.Column("who", sa.Text(), nullable=False),
        sa.Column("action", sa.Text(), nullable=False),
        sa.Column("subject", sa.Text(), nullable=False),
        sa.Column("before", postgresql.JSONB(astext_type=sa.Text()), nullable=True),
        sa.Column("after", postgresql.JSONB(astext_type=sa.Text()), nullable=True),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_table(
        "billing_state",
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("value", sa.Text(), nullable=False),
        sa.Column("set_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=True),
        sa.PrimaryKeyConstraint("key"),
    )
    op.create_table(
        "fee_changes",
        sa.Column("id", sa.BigInteger(), autoincrement=True, nullable=False),
        sa.Column("model", sa.Text(), nullable=True),
        sa.Column("removed", sa.Boolean(), nullable=False),
        sa.Column("prompt_fee_msat", sa.BigInteger(), nullable=False),
        sa.Column("input_msat_per_mtok", sa.BigInteger(), nullable=False),
        sa.Column("output_msat_per_mtok", sa.BigInteger(), nullable=False),
        sa.Column("image_fee_msat", sa.BigInteger(), nullable=False),
        sa.Column("training_msat_per_mtok", sa.BigInteger(), nullable=False),
        sa.Column(
            "changed_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
        ),
        sa.Column("changed_by", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index(op.f("ix_fee_changes_model"), "fee_changes", ["model"], unique=False)
    op.create_table(
        "idempotency",
        sa.Column("scope", sa.Text(), nullable=False),
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("request_hash", sa.LargeBinary(), nullable=False),
        sa.Column("quote_id", sa.Text(), nullable=False),
        sa.Column(
            "created_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
        ),
        sa.PrimaryKeyConstraint("scope", "key"),
    )
    op.create_index("idempotency_created", "idempotency", ["created_at"], unique=False)
    op.create_table(
        "invoices",
        sa.Column("payment_hash", sa.Text(), nullable=False),
        sa.Column("account_id", sa.Text(), nullable=False),
        sa.Column("purpose", sa.Text(), nullable=False),
        sa.Column("reference", sa.Text(), nullable=False),
        sa.Column("amount_msat", sa.BigInteger(), nullable=False),
        sa.Column("bolt11", sa.Text(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("token_id", sa.LargeBinary(), nullable=False),
        sa.Column("claim_hash", sa.LargeBinary(), nullable=False),
        sa.Column(
            "created_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
        ),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("next_check_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("settled_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("received_msat", sa.BigInteger(), nullable=True),
        sa.Column("key_shown_at", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint("amount_msat > 0", name="invoices_amount"),
        sa.PrimaryKeyConstraint("payment_hash"),
    )
    op.create_index(
        "invoices_check",
        "invoices",
        ["next_check_at"],
        unique=False,
        postgresql_where=sa.text("next_check_at is not null"),
    )
    op.create_index("invoices_claim", "invoices", ["claim_hash"], unique=True)
    op.create_index("invoices_reference", "invoices", ["reference"], unique=False)
    op.create_index(op.f("ix_invoices_account_id"), "invoices", ["account_id"], unique=False)
    op.create_table(
        "job_chunks",
        sa.Column("job_id", sa.Text(), nullable=False),
        sa.Column("n", sa.Integer(), nullable=False),
        sa.Column("start", sa.BigInteger(), nullable=False),
        sa.Column("text", sa.Text(), nullable=False),
        sa.Column("tokens", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("job_id", "n", "start"),
    )
    op.create_table(
        "jobs",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("quote_id", sa.Text(), nullable=False),
        sa.Column("index", sa.Integer(), nullable=False),
        sa.Column("account_id", sa.Text(), nullable=False),
        sa.Column("key_id", sa.Text(), nullable=True),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("model", sa.Text(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("attempt", sa.Integer(), server_default="0", nullable=False),
        sa.Column("spec", sa.Text(), nullable=True),
        sa.Column("rates", sa.Text(), nullable=False),
        sa.Column("prompt_tokens", sa.BigInteger(), nullable=False),
        sa.Column("max_tokens", sa.BigInteger(), nullable=False),
        sa.Column("base_fee_msat", sa.BigInteger(), nullable=False),
        sa.Column("held_msat", sa.BigInteger(), nullable=False),
        sa.Column("multiplier_milli", sa.BigInteger(), nullable=False),
        sa.Column("seq", sa.BigInteger(), nullable=True),
        sa.Column("max_wait_s", sa.Integer(), nullable=False),
        sa.Column("charged_msat", sa.BigInteger(), nullable=True),
        sa.Column("commission_ppm", sa.Integer(), nullable=True),
        sa.Column("worker_id", sa.Text(), nullable=True),
        sa.Column("router_id", sa.Text(), nullable=True),
        sa.Column("attached_to", sa.Text(), nullable=True),
        sa.Column("lease_ends_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("wait_ends_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column(
            "created_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
        ),
        sa.Column("queued_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("started_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("first_token_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("ended_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("end_reason", sa.Text(), nullable=True),
        sa.Column("shown", sa.Boolean(), server_default="false", nullable=False),
        sa.Column("usage", sa.Text(), nullable=True),
        sa.Column("result", sa.Text(), nullable=True),
        sa.Column("wipe_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("wiped", sa.Boolean(), server_default="false", nullable=False),
        sa.CheckConstraint(
            "charged_msat is null or charged_msat <= held_msat", name="jobs_charged"
        ),
        sa.CheckConstraint("held_msat >= 0", name="jobs_held"),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index(
        "jobs_alive_of_account",
        "jobs",
        ["account_id"],
        unique=False,
        postgresql_where=sa.text("state in ('queued', 'running')"),
    )
    op.create_index("jobs_created", "jobs", ["created_at"], unique=False)
    op.create_index("jobs_quote", "jobs", ["quote_id", "index"], unique=False)
    op.create_index(
        "jobs_running",
        "jobs",
        ["lease_ends_at"],
        unique=False,
        postgresql_where=sa.text("state = 'running'"),
    )
    op.create_index(
        "jobs_waiting_until",
        "jobs",
        ["wait_ends_at"],
        unique=False,
        postgresql_where=sa.text("state in ('queued', 'awaiting_payment')"),
    )
    op.create_index(
        "jobs_wipe",
        "jobs",
        ["wipe_at"],
        unique=False,
        postgresql_where=sa.text("wipe_at is not null"),
    )
    op.create_table(
        "lane_edges",
        sa.Column("dimension", sa.Text(), nullable=False),
        sa.Column("edge", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("dimension", "edge"),
    )
    op.create_table(
        "ledger_balances",
        sa.Column("account", sa.Text(), nullable=False),
        sa.Column("balance_msat", sa.BigInteger(), nullable=False),
        sa.CheckConstraint("balance_msat >= 0", name="ledger_balances_not_negative"),
        sa.PrimaryKeyConstraint("account"),
    )
    op.create_table(
        "ledger_transfers",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("debit", sa.Text(), nullable=False),
        sa.Column("credit", sa.Text(), nullable=False),
        sa.Column("amount_msat", sa.BigInteger(), nullable=False),
        sa.Column("code", sa.Text(), nullable=False),
        sa.Column("reference", sa.Text(), nullable=False),
        sa.Column(
            "created_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
        ),
        sa.CheckConstraint("amount_msat > 0", name="ledger_transfers_amount"),
        sa.CheckConstraint("debit <> credit", name="ledger_transfers_two_accounts"),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index("ledger_transfers_reference", "ledger_transfers", ["reference"], unique=False)
    op.create_table(
        "node_cursors",
        sa.Column("backend", sa.Text(), nullable=False),
        sa.Column("cursor", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("backend"),
    )
    op.create_table(
        "payees",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("ln_url", sa.Text(), nullable=True),
        sa.Column("next_ln_url", sa.Text(), nullable=True),
        sa.Column("next_ln_url_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("owed_since", sa.DateTime(timezone=True), nullable=True),
        sa.Column("failures", sa.Integer(), server_default="0", nullable=False),
        sa.Column("failing_since", sa.DateTime(timezone=True), nullable=True),
        sa.Column("failure_code", sa.Text(), nullable=True),
        sa.Column("next_try_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column(
            "created_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
        ),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_table(
        "payout_attempts",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("payout_id", sa.Text(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("address", sa.Text(), nullable=True),
        sa.Column("bolt11", sa.Text(), nullable=True),
        sa.Column("payment_hash", sa.Text(), nullable=True),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("submitted_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("submissions", sa.Integer(), server_default="0", nullable=False),
        sa.Column("backend", sa.Text(), nullable=True),
        sa.Column("node_pubkey", sa.Text(), nullable=True),
        sa.Column("lease_token", sa.BigInteger(), nullable=True),
        sa.Column("last_checked_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("was_known", sa.Boolean(), server_default=sa.text("false"), nullable=False),
        sa.Column("was_missing", sa.Boolean(), server_default=sa.text("false"), nullable=False),
        sa.Column("agreed_state", sa.Text(), nullable=True),
        sa.Column("agreed_since", sa.DateTime(timezone=True), nullable=True),
        sa.Column("alert", sa.Text(), nullable=True),
        sa.Column("preimage", sa.Text(), nullable=True),
        sa.Column("fee_msat", sa.BigInteger(), nullable=True),
        sa.Column("failure_code", sa.Text(), nullable=True),
        sa.Column(
            "created_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
        ),
        sa.Column("ended_at", sa.DateTime(timezone=True), nullable=True),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("payment_hash"),
    )
    op.create_index(
        "payout_attempts_one_live",
        "payout_attempts",
        ["payout_id"],
        unique=True,
        postgresql_where=sa.text("state in ('new', 'invoiced', 'submitted')"),
    )
    op.create_index("payout_attempts_payout", "payout_attempts", ["payout_id"], unique=False)
    op.create_index(
        "payout_attempts_proved",
        "payout_attempts",
        ["submitted_at"],
        unique=False,
        postgresql_where=sa.text("state = 'succeeded'"),
    )
    op.create_table(
        "payouts",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("account", sa.Text(), nullable=False),
        sa.Column("target", sa.Text(), nullable=False),
        sa.Column("amount_msat", sa.BigInteger(), nullable=False),
        sa.Column("fee_cap_msat", sa.BigInteger(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("error_code", sa.Text(), nullable=True),
        sa.Column("fee_msat", sa.BigInteger(), nullable=True),
        sa.Column(
            "created_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
        ),
        sa.Column(
            "next_try_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
        ),
        sa.Column("ended_at", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint("amount_msat > 0", name="payouts_amount"),
        sa.CheckConstraint("fee_cap_msat >= 0", name="payouts_fee_cap"),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index(
        "payouts_due",
        "payouts",
        ["next_try_at"],
        unique=False,
        postgresql_where=sa.text("state in ('planned', 'sending')"),
    )
    op.create_index("payouts_newest", "payouts", ["created_at", "id"], unique=False)
    op.create_index("payouts_of_account", "payouts", ["account", "created_at", "id"], unique=False)
    op.create_index(
        "payouts_one_open_per_payee",
        "payouts",
        ["account"],
        unique=True,
        postgresql_where=sa.text("kind = 'worker' and state in ('planned', 'sending')"),
    )
    op.create_table(
        "queue",
        sa.Column("job_id", sa.Text(), nullable=False),
        sa.Column("lane", sa.Text(), nullable=False),
        sa.Column("multiplier_milli", sa.BigInteger(), nullable=False),
        sa.Column("seq", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("job_id", "lane"),
    )
    op.create_index(
        "queue_order",
        "queue",
        ["lane", sa.literal_column("multiplier_milli desc"), "seq"],
        unique=False,
    )
    op.create_table(
        "quotes",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("account_id", sa.Text(), nullable=True),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("request", sa.Text(), nullable=True),
        sa.Column("request_hash", sa.LargeBinary(), nullable=False),
        sa.Column("base_fee_msat", sa.BigInteger(), nullable=False),
        sa.Column("offer_msat", sa.BigInteger(), nullable=False),
        sa.Column("payment_hash", sa.Text(), nullable=True),
        sa.Column("max_wait_s", sa.Integer(), nullable=False),
        sa.Column(
            "created_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
        ),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=False),
        sa.CheckConstraint("offer_msat >= base_fee_msat", name="quotes_offer"),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("payment_hash"),
    )
    op.create_index(
        "quotes_open",
        "quotes",
        ["expires_at"],
        unique=False,
        postgresql_where=sa.text("state = 'open'"),
    )
    op.create_table(
        "settings",
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("value", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.PrimaryKeyConstraint("key"),
    )
    op.create_table(
        "workers",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("key_hash", sa.LargeBinary(), nullable=False),
        sa.Column("name", sa.Text(), nullable=True),
        sa.Column("models", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.Column("hardware", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.Column("slots", sa.Integer(), nullable=False),
        sa.Column(
            "created_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
        ),
        sa.Column(
            "last_seen_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
        ),
        sa.Column("banned_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("ban_reason", sa.Text(), nullable=True),
        sa.Column("draining", sa.Boolean(), server_default="false", nullable=False),
        sa.Column("jobs_done", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("jobs_failed", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("tokens", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("reliability", sa.Float(), server_default="1", nullable=False),
        sa.Column(
            "speeds", postgresql.JSONB(astext_type=sa.Text()), server_default="{}", nullable=False
        ),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("key_hash"),
    )
    # The queue is small and turns over all the time: vacuum it early, without pauses.
    op.execute(
        "alter table queue set (fillfactor = 90, autovacuum_vacuum_scale_factor = 0.02,"
        " autovacuum_vacuum_cost_delay = 0)"
    )


def downgrade() -> None:
    op.drop_table("workers")
    op.drop_table("settings")
    op.drop_index("quotes_open", table_name="quotes", postgresql_where=sa.text("state = 'open'"))
    op.drop_table("quotes")
    op.drop_index("queue_order", table_name="queue")
    op.drop_table("queue")
    op.drop_index(
        "payouts_one_open_per_payee",
        table_name="payouts",
        postgresql_where=sa.text("kind = 'worker' and state in ('planned', 'sending')"),
    )
    op.drop_index("payouts_of_account", table_name="payouts")
    op.drop_index("payouts_newest", table_name="payouts")
    op.drop_index(
        "payouts_due",
        table_name="payouts",
        postgresql_where=sa.text("state in ('planned', 'sending')"),
    )
    op.drop_table("payouts")
    op.drop_index(
        "payout_attempts_proved",
        table_name="payout_attempts",
        postgresql_where=sa.text("state = 'succeeded'"),
    )
    op.drop_index("payout_attempts_payout", table_name="payout_attempts")
    op.drop_index(
        "payout_attempts_one_live",
        table_name="payout_attempts",
        postgresql_where=sa.text("state in ('new', 'invoiced', 'submitted')"),
    )
    op.drop_table("payout_attempts")
    op.drop_table("payees")
    op.drop_table("node_cursors")
    op.drop_index("ledger_transfers_reference", table_name="ledger_transfers")
    op.drop_table("ledger_transfers")
    op.drop_table("ledger_balances")
    op.drop_table("lane_edges")
    op.drop_index("jobs_wipe", table_name="jobs", postgresql_where=sa.text("wipe_at is not null"))
    op.drop_index(
        "jobs_waiting_until",
        table_name="jobs",
        postgresql_where=sa.text("state in ('queued', 'awaiting_payment')"),
    )
    op.drop_index("jobs_running", table_name="jobs", postgresql_where=sa.text("state = 'running'"))
    op.drop_index("jobs_quote", table_name="jobs")
    op.drop_index("jobs_created", table_name="jobs")
    op.drop_index(
        "jobs_alive_of_account",
        table_name="jobs",
        postgresql_where=sa.text("state in ('queued', 'running')"),
    )
    op.drop_table("jobs")
    op.drop_table("job_chunks")
    op.drop_index(op.f("ix_invoices_account_id"), table_name="invoices")
    op.drop_index("invoices_reference", table_name="invoices")
    op.drop_index("invoices_claim", table_name="invoices")
    op.drop_index(
        "invoices_check",
        table_name="invoices",
        postgresql_where=sa.text("next_check_at is not null"),
    )
    op.drop_table("invoices")
    op.drop_index("idempotency_created", table_name="idempotency")
    op.drop_table("idempotency")
    op.drop_index(op.f("ix_fee_changes_model"), table_name="fee_changes")
    op.drop_table("fee_changes")
    op.drop_table("billing_state")
    op.drop_table("audit")
    op.drop_index("attempts_worker", table_name="attempts")
    op.drop_table("attempts")
    op.drop_table("accounts")
    op.drop_index(op.f("ix_account_keys_account_id"), table_name="account_keys")
    op.drop_table("account_keys")
    op.execute(sa.schema.DropSequence(sa.Sequence("queue_seq")))
