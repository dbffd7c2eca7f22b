"""The embedded PostgreSQL: starts, survives kill -9 of each side, and harms nobody on the way."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import asyncpg
import psutil
import pytest

from router import embedded_postgres_folder, embedded_postgres_user
from router.embedded_postgres import (
    CannotStart,
    DataFolderInUse,
    EmbeddedPostgres,
    EmbeddedPostgresError,
    WrongMajorVersion,
    reach,
    throw_away_server,
)
from router.embedded_postgres_user import SOCKET_DIR_LIMIT_BYTES, ServerUser, bin_dir, choose_user

REPOSITORY = Path(__file__).parent.parent
AS_ROOT = os.geteuid() == 0
only_root = pytest.mark.skipif(not AS_ROOT, reason="only root runs a server as somebody else")
only_linux = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's parent death signal")

CONNECTION_LOST = (
    OSError,
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
)

# A program that starts a server, says where, and waits to be killed.
SUPERVISOR = """
import asyncio, sys
from pathlib import Path
import uvloop
from router.embedded_postgres import EmbeddedPostgres

async def main():
    server = EmbeddedPostgres(Path(sys.argv[1]), throw_away=True)
    await server.start()
    print(server.pid, server.url, flush=True)
    await asyncio.Event().wait()

uvloop.run(main())
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "pg"


@pytest.fixture
async def server(folder: Path) -> AsyncIterator[EmbeddedPostgres]:
    async with EmbeddedPostgres(folder, throw_away=True) as running:
        yield running


@pytest.fixture
def stranger() -> Iterator[subprocess.Popen[bytes]]:
    """A program that has nothing to do with us, and whose pid a stale file may name."""
    process = subprocess.Popen(["sleep", "300"])
    yield process
    process.kill()
    process.wait()


async def ask(server: EmbeddedPostgres, query: str) -> object:
    connection = await asyncpg.connect(server.url)
    try:
        return await connection.fetchval(query)
    finally:
        await connection.close()


async def until(condition: Callable[[], bool], timeout_s: float = 20) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.02)


async def until_restarted(server: EmbeddedPostgres, times: int) -> None:
    async with asyncio.timeout(60):
        await until(lambda: server.restarts >= times, 60)
        await server.wait_ready()


async def test_a_first_start_makes_a_database_and_a_second_one_keeps_it(folder: Path) -> None:
    server = EmbeddedPostgres(folder)
    args = await server.start()
    connection = await asyncpg.connect(**args)
    await connection.execute("create table kept (n int); insert into kept values (7)")
    await connection.close()
    await server.stop()
    began = time.monotonic()
    await server.start()
    assert time.monotonic() - began < 20
    assert await ask(server, "select n from kept") == 7
    assert await ask(server, "show fsync") == "on"
    assert await ask(server, "show synchronous_commit") == "on"
    assert await ask(server, "show data_checksums") == "on"
    await server.stop()
    await server.stop()
    assert server.pid is None
    with pytest.raises(OSError):
        await asyncpg.connect(server.url)


def test_a_throw_away_server_can_be_had_without_an_event_loop(folder: Path) -> None:
    async def databases(url: str) -> int:
        connection = await asyncpg.connect(url)
        await connection.execute("create database copied template satherd")
        count = await connection.fetchval("select count(*) from pg_database")
        await connection.close()
        return count

    with throw_away_server(folder) as url:
        assert asyncio.run(databases(url)) == 5
    with pytest.raises(OSError):
        asyncio.run(databases(url))


async def test_nobody_else_can_reach_the_server(server: EmbeddedPostgres) -> None:
    """No port is open, the socket's folder is closed to others, and the kernel names the user."""
    assert await ask(server, "show listen_addresses") == ""
    place = Path(server.connect_args["host"])
    assert stat.S_IMODE(place.stat().st_mode) == 0o700
    methods = "select string_agg(type || ' ' || auth_method, ',') from pg_hba_file_rules"
    assert await ask(server, methods) == "local peer"
    assert server.pid is not None
    kinds = {c.type for c in psutil.Process(server.pid).net_connections("inet")}
    assert kinds == set()


async def test_killing_the_server_under_writes_loses_no_acknowledged_row(folder: Path) -> None:
    acknowledged: list[int] = []
    ids = iter(range(1_000_000))

    async def write_on(server: EmbeddedPostgres) -> None:
        while True:
            with contextlib.suppress(*CONNECTION_LOST):
                await server.wait_ready()
                connection = await asyncpg.connect(server.url, timeout=5)
                try:
                    while True:
                        n = next(ids)
                        await connection.execute("insert into written values ($1)", n)
                        acknowledged.append(n)
                finally:
                    connection.terminate()
            # A socket file that refuses does so without ever giving way to the event loop.
            await asyncio.sleep(0.01)

    async with EmbeddedPostgres(folder) as server:
        await ask(server, "create table written (n int primary key)")
        writers = [asyncio.create_task(write_on(server)) for _ in range(4)]
        try:
            for kills in (1, 2):
                enough = len(acknowledged) + 100
                await until(lambda enough=enough: len(acknowledged) > enough)
                assert server.pid is not None
                os.kill(server.pid, signal.SIGKILL)
                await until_restarted(server, kills)
            enough = len(acknowledged) + 20
            await until(lambda: len(acknowledged) > enough)
        finally:
            for writer in writers:
                writer.cancel()
            await asyncio.gather(*writers, return_exceptions=True)
        connection = await asyncpg.connect(server.url)
        stored = {row["n"] for row in await connection.fetch("select n from written")}
        await connection.close()
    assert set(acknowledged) <= stored
    assert server.restarts == 2


async def test_orphans_of_a_killed_server_are_ended_before_the_next_one_starts(
    server: EmbeddedPostgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A backend in the middle of a statement does not notice that its postmaster died."""
    monkeypatch.setattr(
        embedded_postgres_folder, "LEFT_OVER_STEPS", ((0.3, signal.SIGINT), (5.0, signal.SIGKILL))
    )
    connection = await asyncpg.connect(server.url)
    orphan = await connection.fetchval("select pg_backend_pid()")
    busy = asyncio.create_task(connection.execute("do $$ begin loop end loop; end $$"))
    watcher = await asyncpg.connect(server.url)
    async with asyncio.timeout(10):
        active = "select state from pg_stat_activity where pid = $1"
        while await watcher.fetchval(active, orphan) != "active":
            await asyncio.sleep(0.02)
    watcher.terminate()
    assert server.pid is not None
    os.kill(server.pid, signal.SIGKILL)
    await until_restarted(server, 1)
    with pytest.raises(CONNECTION_LOST):
        await busy
    connection.terminate()
    assert not _alive(orphan)
    assert await ask(server, "select 1") == 1


def _alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@only_linux
async def test_the_server_goes_away_with_its_killed_parent_and_the_next_start_works(
    folder: Path,
) -> None:
    parent = await asyncio.create_subprocess_exec(
        sys.executable, "-c", SUPERVISOR, folder, cwd=REPOSITORY, stdout=asyncio.subprocess.PIPE
    )
    assert parent.stdout is not None
    pid_text, url = (await asyncio.wait_for(parent.stdout.readline(), 30)).decode().split()
    connection = await asyncpg.connect(url)
    await connection.execute("create table kept (n int); insert into kept values (7)")
    connection.terminate()
    with pytest.raises(DataFolderInUse, match=f"pid {parent.pid}"):
        await EmbeddedPostgres(folder, throw_away=True).start()
    parent.kill()
    await parent.wait()
    # At once, while the old server may still be shutting down.
    async with EmbeddedPostgres(folder, throw_away=True) as server:
        assert not _alive(int(pid_text))
        assert server.pid != int(pid_text)
        assert await ask(server, "select n from kept") == 7


@pytest.mark.parametrize("contents", ["{pid}\n/elsewhere\n1700000000\n5432\n", "{pid}", ""])
async def test_a_stale_pid_file_stops_nobody_and_the_foreign_process_lives(
    folder: Path, stranger: subprocess.Popen[bytes], contents: str
) -> None:
    """After a reboot the number in the file is another program's; after a crash it may be cut."""
    async with EmbeddedPostgres(folder, throw_away=True) as first:
        lock_file = Path(first.connect_args["host"]) / ".s.PGSQL.5432.lock"
    text = contents.format(pid=stranger.pid)
    (folder / "data" / "postmaster.pid").write_text(text)
    lock_file.parent.mkdir(mode=0o700, exist_ok=True)
    lock_file.write_text(text)
    async with EmbeddedPostgres(folder, throw_away=True) as second:
        assert await ask(second, "select 1") == 1
    assert stranger.poll() is None


async def test_a_second_start_is_refused_and_the_first_goes_on(server: EmbeddedPostgres) -> None:
    second = EmbeddedPostgres(server.folder.path, throw_away=True)
    with pytest.raises(DataFolderInUse, match=f"pid {os.getpid()}"):
        await second.start()
    await second.stop()
    with pytest.raises(DataFolderInUse, match="already started"):
        await server.start()
    assert await ask(server, "select 1") == 1


async def test_a_database_can_be_reached_whether_or_not_its_satherd_runs(folder: Path) -> None:
    async def look() -> tuple[str, int]:
        async with reach(folder) as url:
            connection = await asyncpg.connect(url)
            kept = await connection.fetchval("select n from kept")
            await connection.close()
            return url, kept

    with pytest.raises(EmbeddedPostgresError, match="there is no database"):
        await look()
    assert not folder.exists()
    async with EmbeddedPostgres(folder, throw_away=True) as server:
        await ask(server, "create table kept as select 7 as n")
        assert await look() == (server.url, 7)
        assert await ask(server, "select 1") == 1
    assert await look() == (server.url, 7)
    with pytest.raises(OSError):
        await asyncpg.connect(server.url)


async def test_a_server_that_somebody_started_by_hand_is_left_alone(folder: Path) -> None:
    async with EmbeddedPostgres(folder, throw_away=True) as first:
        settings = first.folder.fixed_settings(Path(first.connect_args["host"]))
        user = first._user
        assert user is not None
    place = Path(first.connect_args["host"])
    place.mkdir(mode=0o700, exist_ok=True)
    argv = [bin_dir() / "postgres", "-D", folder / "data"]
    argv += [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
    with open(folder / "by_hand.log", "wb") as out:
        by_hand = await asyncio.create_subprocess_exec(
            *user.command(*argv, death_signal="INT"), stdout=out, stderr=out, cwd="/"
        )
    try:
        await until((place / ".s.PGSQL.5432").exists)
        with pytest.raises(DataFolderInUse, match=f"pid {by_hand.pid}"):
            await EmbeddedPostgres(folder, throw_away=True).start()
        assert by_hand.returncode is None
    finally:
        by_hand.send_signal(signal.SIGINT)
        await asyncio.wait_for(by_hand.wait(), 20)


async def test_a_path_too_long_for_a_socket_gets_a_short_private_place(tmp_path: Path) -> None:
    deep = tmp_path / ("x" * 60) / ("y" * 60) / "pg"
    server = EmbeddedPostgres(deep, throw_away=True)
    await server.start()
    place = Path(server.connect_args["host"])
    assert len(os.fsencode(place)) <= SOCKET_DIR_LIMIT_BYTES
    assert stat.S_IMODE(place.stat().st_mode) == 0o700
    assert await ask(server, "select 1") == 1
    await server.stop()
    assert not place.exists()


async def test_a_socket_place_that_somebody_else_prepared_is_not_used(tmp_path: Path) -> None:
    deep = tmp_path / ("x" * 60) / ("y" * 60) / "pg"
    async with EmbeddedPostgres(deep, throw_away=True) as server:
        usual = Path(server.connect_args["host"])
    usual.mkdir()
    usual.chmod(0o777)
    try:
        async with EmbeddedPostgres(deep, throw_away=True) as server:
            other = Path(server.connect_args["host"])
            assert other != usual
            assert stat.S_IMODE(other.stat().st_mode) == 0o700
            assert await ask(server, "select 1") == 1
        assert not any(usual.iterdir())
    finally:
        usual.rmdir()


async def test_data_of_another_major_version_is_refused_untouched(folder: Path) -> None:
    data = folder / "data"
    data.mkdir(parents=True)
    (data / "PG_VERSION").write_text("17\n")
    with pytest.raises(WrongMajorVersion, match="PostgreSQL 17 and was not touched"):
        await EmbeddedPostgres(folder, throw_away=True).start()
    assert [path.name for path in data.iterdir()] == ["PG_VERSION"]


async def test_a_folder_that_is_no_database_is_refused_untouched(folder: Path) -> None:
    data = folder / "data"
    data.mkdir(parents=True)
    (data / "letters.txt").write_text("mine")
    with pytest.raises(EmbeddedPostgresError, match="holds no PostgreSQL database"):
        await EmbeddedPostgres(folder, throw_away=True).start()
    assert [path.name for path in data.iterdir()] == ["letters.txt"]


async def test_half_a_database_of_an_interrupted_first_start_is_made_anew(folder: Path) -> None:
    draft = folder / "data.new"
    draft.mkdir(parents=True)
    (draft / "PG_VERSION").write_text("18\n")
    async with EmbeddedPostgres(folder, throw_away=True) as server:
        assert await ask(server, "select 1") == 1
    assert not draft.exists()


async def test_a_server_that_cannot_start_says_why_and_where_its_log_is(folder: Path) -> None:
    folder.mkdir()
    (folder / "local.conf").write_text("shared_buffers = 'plenty'\n")
    server = EmbeddedPostgres(folder, throw_away=True)
    with pytest.raises(CannotStart, match="shared_buffers") as caught:
        await server.start()
    assert caught.value.log_path == folder / "server.log"
    assert str(folder / "server.log") in str(caught.value)
    (folder / "local.conf").unlink()
    await server.start()
    assert await ask(server, "select 1") == 1
    await server.stop()


async def test_the_operators_settings_win_except_where_they_would_open_the_server(
    folder: Path,
) -> None:
    folder.mkdir()
    (folder / "local.conf").write_text("work_mem = '5MB'\nlisten_addresses = '*'\n")
    async with EmbeddedPostgres(folder, throw_away=True) as server:
        assert await ask(server, "show work_mem") == "5MB"
        assert await ask(server, "show listen_addresses") == ""


async def test_the_servers_log_holds_neither_statements_nor_values(
    server: EmbeddedPostgres,
) -> None:
    connection = await asyncpg.connect(server.url)
    await connection.execute("create table said (prompt text check (length(prompt) < 9))")
    with pytest.raises(asyncpg.CheckViolationError):
        await connection.execute("insert into said values ($1)", "a secret prompt")
    with pytest.raises(asyncpg.CheckViolationError):
        await connection.execute("insert into said values ('another secret prompt')")
    await connection.close()
    text = server.folder.log_path.read_text()
    assert "violates check constraint" in text
    assert "secret" not in text


async def test_a_database_that_vanishes_is_not_replaced_by_an_empty_one(folder: Path) -> None:
    server = EmbeddedPostgres(folder, throw_away=True)
    await server.start()
    aside = folder / "aside"
    (folder / "data").rename(aside)
    assert server.pid is not None
    os.kill(server.pid, signal.SIGKILL)
    await until(lambda: server.restarts >= 2)
    assert not (folder / "data").exists()
    aside.rename(folder / "data")
    async with asyncio.timeout(20):
        await server.wait_ready()
    assert await ask(server, "select 1") == 1
    await server.stop()


def test_a_long_log_is_put_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded_postgres_folder, "LOG_LIMIT_BYTES", 10)
    folder = embedded_postgres_folder.ServerFolder(tmp_path)
    for text in (b"0123456789", b"1", b"new"):
        fd = folder.open_log()
        os.write(fd, text)
        os.close(fd)
    assert folder.log_path.read_text() == "new"
    assert (tmp_path / "server.log.1").read_text() == "01234567891"
    assert stat.S_IMODE(folder.log_path.stat().st_mode) == 0o600


@only_root
async def test_root_lends_the_server_to_a_user_without_rights_where_that_user_gets_in() -> None:
    base = Path(tempfile.mkdtemp(prefix="satherd-test-"))
    base.chmod(0o711)
    try:
        async with EmbeddedPostgres(base / "pg", throw_away=True) as server:
            assert server.pid is not None
            assert psutil.Process(server.pid).uids().real != 0
            assert await ask(server, "select current_user") == "satherd"
        # The folder is that user's now, and stays so.
        async with EmbeddedPostgres(base / "pg", throw_away=True) as server:
            assert server.pid is not None
            uid = psutil.Process(server.pid).uids().real
            assert uid == (base / "pg" / "data").stat().st_uid
        assert stat.S_IMODE(base.stat().st_mode) == 0o711
    finally:
        shutil.rmtree(base)


@only_root
async def test_root_keeps_the_data_below_a_closed_folder_by_a_user_namespace(
    tmp_path: Path,
) -> None:
    home = tmp_path / "home"
    home.mkdir(mode=0o700)
    async with EmbeddedPostgres(home / "pg", throw_away=True) as server:
        assert await ask(server, "select current_user") == "satherd"
        assert (home / "pg" / "data").stat().st_uid == 0
        assert stat.S_IMODE((home / "pg").stat().st_mode) == 0o700
    assert stat.S_IMODE(home.stat().st_mode) == 0o700


@only_root
async def test_root_where_namespaces_are_forbidden_lets_another_user_pass_closed_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A container's root has its home closed to others, and mostly no right to a namespace."""
    which = shutil.which
    monkeypatch.setattr(
        embedded_postgres_user.shutil, "which", lambda w: None if w == "unshare" else which(w)
    )
    home = tmp_path / "home"
    home.mkdir(mode=0o700)
    for _ in ("made", "found"):
        async with EmbeddedPostgres(home / "pg", throw_away=True) as server:
            assert server.pid is not None
            assert psutil.Process(server.pid).uids().real != 0
            assert await ask(server, "select current_user") == "satherd"
    assert stat.S_IMODE(home.stat().st_mode) == 0o700


@only_root
def test_root_without_any_way_to_another_user_is_told_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded_postgres_user.shutil, "which", lambda _: None)
    with pytest.raises(EmbeddedPostgresError, match="Run as an ordinary user"):
        choose_user(tmp_path, None)


def test_data_of_another_user_is_refused_to_an_ordinary_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded_postgres_user.os, "geteuid", lambda: 4321)
    with pytest.raises(EmbeddedPostgresError, match="belongs to user number 0"):
        choose_user(tmp_path, 0)
    with pytest.raises(EmbeddedPostgresError, match="user number 4321 has no name"):
        choose_user(tmp_path, 4321)


def test_a_missing_wheel_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded_postgres_user, "WHEEL_MODULE", "no_such_wheel")
    with pytest.raises(EmbeddedPostgresError, match="SATHERD_DATABASE_URL"):
        bin_dir()


def test_a_server_sees_nothing_of_our_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SATHERD_ADMIN_TOKEN", "secret")
    monkeypatch.setenv("PGPORT", "1")
    assert set(embedded_postgres_user.server_environment()) <= {"PATH", "TMPDIR", "LC_ALL", "TZ"}


# Starts, asks, is killed (the server, not the program) and stops; prints the user it ran as.
ORDINARY = """
import asyncio, os, signal, sys
from pathlib import Path
import asyncpg, uvloop
from router.embedded_postgres import EmbeddedPostgres

async def main():
    async with EmbeddedPostgres(Path(sys.argv[1]), throw_away=True) as server:
        connection = await asyncpg.connect(server.url)
        assert await connection.fetchval("select current_user") == "satherd"
        await connection.close()
        os.kill(server.pid, signal.SIGKILL)
        while not server.restarts:
            await asyncio.sleep(0.02)
        await asyncio.wait_for(server.wait_ready(), 30)
        connection = await asyncpg.connect(server.url)
        assert await connection.fetchval("select 1") == 1
        await connection.close()
    print(os.geteuid(), server._user.prefix)

uvloop.run(main())
"""


@pytest.mark.skipif(AS_ROOT and not shutil.which("unshare"), reason="root needs unshare for this")
def test_an_ordinary_user_runs_the_server_as_itself() -> None:
    """As root: by setpriv as nobody, or, where nobody cannot reach Python, in a user namespace."""
    base = Path(tempfile.mkdtemp(prefix="satherd-test-"))
    try:
        for prefix in _ways_to_be_ordinary(base):
            done = subprocess.run(
                [*prefix, sys.executable, "-c", ORDINARY, base / "pg"],
                cwd=REPOSITORY,
                capture_output=True,
                text=True,
                timeout=60,
            )
            assert done.returncode == 0, done.stderr
            uid, words = done.stdout.split(" ", 1)
            assert int(uid) != 0
            assert words.strip() == "()"
    finally:
        shutil.rmtree(base)


def _ways_to_be_ordinary(base: Path) -> list[list[str]]:
    if not AS_ROOT:
        return [[]]
    nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    reach = [*nobody, sys.executable, "-c", "import asyncpg, psutil"]
    if subprocess.run(reach, capture_output=True, cwd="/").returncode == 0:
        os.chown(base, 65534, 65534)
        return [nobody]
    return [["unshare", "--map-user=1", "--map-group=1"]]


def test_the_parent_death_signal_is_asked_for_on_linux(monkeypatch: pytest.MonkeyPatch) -> None:
    user = ServerUser(1, 1, ("setpriv", "--reuid", "1"), "daemon", "root")
    monkeypatch.setattr(embedded_postgres_user.sys, "platform", "linux")
    monkeypatch.setattr(embedded_postgres_user.shutil, "which", lambda name: f"/usr/bin/{name}")
    assert user.command("postgres", death_signal="INT") == [
        *("setpriv", "--reuid", "1", "--pdeathsig", "INT", "postgres")
    ]
    monkeypatch.setattr(embedded_postgres_user.sys, "platform", "darwin")
    assert user.command("postgres", death_signal="INT") == ["setpriv", "--reuid", "1", "postgres"]
