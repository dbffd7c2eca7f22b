"""Dockerfile, .dockerignore and docker-compose.yml agree with the code they run."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from billing.ln_url import parse_ln_url
from router.settings import Settings
from worker.llama_install import VERSION as LLAMA_VERSION
from worker.llama_install import build_environment
from worker.settings import WorkerSettings, socket_url, socket_urls

REPOSITORY = Path(__file__).parent.parent
SECRETS = {
    "SATHERD_POSTGRES_PASSWORD": "a$strange:pass@word/",
    "SATHERD_ADMIN_TOKEN": "0123456789abcdef0123456789abcdef",
}
OURS = ("simulated-lightning", "migrate", "router", "worker", "client")
# Of the profile with two routers; old versions show them without it.
MANY = ("router-2", "nats", "load-balancer")


def compose_command() -> list[str]:
    """Debian's docker-compose, or Docker's plugin. Skips without either, but not in CI."""
    if shutil.which("docker-compose"):
        return ["docker-compose"]
    plugin = ["docker", "compose"]
    if (
        shutil.which("docker")
        and not subprocess.run([*plugin, "version"], capture_output=True).returncode
    ):
        return plugin
    if os.environ.get("CI") == "true":
        pytest.fail("docker-compose is missing: apt-get install docker-compose")
    pytest.skip("docker-compose is not installed")


def config(*options: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """`docker-compose config`, with nothing of our own environment's settings."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    return subprocess.run(
        [*compose_command(), "--project-directory", str(REPOSITORY), *options, "config"],
        cwd=REPOSITORY,
        env=kept | environ,
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.fixture(scope="module")
def services() -> dict[str, dict[str, Any]]:
    """The services as compose understands them: merged, with the secrets filled in."""
    done = config(**SECRETS)
    assert done.returncode == 0, done.stderr
    return yaml.safe_load(done.stdout)["services"]


def words(value: str | list[str]) -> list[str]:
    return shlex.split(value) if isinstance(value, str) else value


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions, continued lines joined, comments left out."""
    lines = [
        line
        for line in (REPOSITORY / "Dockerfile").read_text().splitlines()
        if not line.lstrip().startswith("#")
    ]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [
        (word, rest)
        for word, _, rest in (line.partition(" ") for line in joined.splitlines() if line)
    ]


@pytest.mark.parametrize("missing", SECRETS)
def test_compose_refuses_to_run_without_a_secret(missing: str) -> None:
    rest = {name: value for name, value in SECRETS.items() if name != missing}
    for environ in (rest, rest | {missing: ""}):
        done = config(**environ)
        assert done.returncode != 0
        assert "random secret" in done.stderr


def test_compose_brings_up_a_database_a_network_a_router_and_a_worker(
    services: dict[str, dict[str, Any]],
) -> None:
    assert {*OURS, *MANY, "postgres"} >= set(services) >= {"postgres", *OURS[:4]}
    for name in OURS[:4]:
        assert services[name]["image"] == services["router"]["image"]
        assert "entrypoint" not in services[name], "the commands inside are those outside"


@pytest.mark.parametrize("name", OURS[:4])
def test_a_services_command_is_one_that_satherd_has(
    services: dict[str, dict[str, Any]], name: str
) -> None:
    command, *options = words(services[name]["command"])
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys; from cli.main import main; sys.exit(main())",
            command,
            "--help",
        ],
        cwd=REPOSITORY,
        env=os.environ | {"COLUMNS": "200", "NO_COLOR": "1"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    for option in options:
        if option.startswith("--"):
            assert option in done.stdout


def test_the_routers_settings_are_ones_it_knows_and_takes(
    services: dict[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    environ = services["router"]["environment"]
    ours = {name for name in environ if name.startswith("SATHERD_")}
    assert ours <= {f"SATHERD_{field.upper()}" for field in Settings.model_fields}
    monkeypatch.chdir(tmp_path)
    for name in ours:
        if environ[name] is not None:
            monkeypatch.setenv(name, str(environ[name]))
    settings = Settings()
    assert settings.simulated and settings.lnurl_allow_private
    assert settings.admin_token.get_secret_value() == SECRETS["SATHERD_ADMIN_TOKEN"]
    assert settings.database_url is not None
    url = settings.database_url.get_secret_value()
    # asyncpg takes PGPASSWORD where the URL has no password.
    assert SECRETS["SATHERD_POSTGRES_PASSWORD"] not in url
    assert ":" not in url.split("://")[1].split("@")[0]
    # Compose writes a `$` twice in what it shows.
    assert environ["PGPASSWORD"].replace("$$", "$") == SECRETS["SATHERD_POSTGRES_PASSWORD"]


def test_the_workers_settings_are_ones_it_knows_and_takes(
    services: dict[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    environ = services["worker"]["environment"]
    assert set(environ) <= {f"SATHERD_{field.upper()}" for field in WorkerSettings.model_fields}
    monkeypatch.chdir(tmp_path)
    for name, value in environ.items():
        if value is not None:
            monkeypatch.setenv(name, str(value))
    settings = WorkerSettings()
    assert socket_url(settings.router_url) == "ws://router:8000/worker"
    assert settings.ln_url is not None
    payee = parse_ln_url(settings.ln_url, allow_private=True)
    assert payee is not None
    port = words(services["simulated-lightning"]["command"])[-1]
    assert f"//simulated-lightning:{port}/" in str(payee.url)


def test_only_the_router_is_reached_from_outside_and_only_from_this_machine(
    services: dict[str, dict[str, Any]],
) -> None:
    published = {name: service["ports"] for name, service in services.items() if "ports" in service}
    assert set(published) - {"load-balancer"} == {"router"}
    for ports in published.values():
        assert "127.0.0.1" in json.dumps(ports)
    for name in ("postgres", "simulated-lightning"):
        assert list(services[name]["networks"]) == ["back"]
    for name in ("worker", "client"):
        if name in services:
            assert "back" not in services[name]["networks"]
    assert yaml.safe_load((REPOSITORY / "docker-compose.yml").read_text())["networks"]["back"] == {
        "internal": True
    }


def test_the_profile_many_has_two_routers_that_are_one_market(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The same database, secret and NATS server; a load balancer before both, with its file."""
    environ = {
        "SATHERD_SECRET": "6" * 64,
        "SATHERD_NATS_URL": "nats://nats:4222",
        "SATHERD_ROUTER_URLS": "http://router:8000,http://router-2:8000",
    }
    done = config("--profile", "many", **SECRETS, **environ)
    assert done.returncode == 0, done.stderr
    services = yaml.safe_load(done.stdout)["services"]
    assert set(services) >= {"postgres", *OURS[:4], *MANY}
    first, second = services["router"], services["router-2"]
    assert first["environment"] == second["environment"]
    assert first["volumes"] != second["volumes"]
    assert list(services["nats"]["networks"]) == ["back"]
    monkeypatch.chdir(tmp_path)
    for name, value in first["environment"].items():
        if name.startswith("SATHERD_") and value is not None:
            monkeypatch.setenv(name, str(value))
    settings = Settings()
    assert settings.nats_url is not None and settings.secret is not None
    port = words(services["nats"]["command"])[-1]
    assert settings.nats_url.get_secret_value() == f"nats://nats:{port}"
    balanced = re.findall(r"server ([\w-]+):8000", (REPOSITORY / "deploy/nginx.conf").read_text())
    assert balanced == ["router", "router-2"]
    told = services["worker"]["environment"]["SATHERD_ROUTER_URL"]
    assert socket_urls(told) == ["ws://router:8000/worker", "ws://router-2:8000/worker"]


def with_a_third(text: str) -> str:
    """What the file tells an operator: wherever `router-2` is named, `router-3` is named as well."""
    lines: list[str] = []
    copy: list[str] = []
    for line in [*text.splitlines(), ""]:
        deeper = bool(copy) and line.startswith(_indent(copy[0]) + " ")
        if not deeper:
            lines += [each.replace("router-2", "router-3") for each in copy]
            copy = []
        if deeper or re.match(r"\s*(server )?router-2:", line):
            copy.append(line)
        lines.append(line)
    return "\n".join(lines)


def _indent(line: str) -> str:
    return line[: len(line) - len(line.lstrip())]


def test_a_third_router_is_the_second_once_more(tmp_path: Path) -> None:
    file = tmp_path / "docker-compose.yml"
    file.write_text(with_a_third((REPOSITORY / "docker-compose.yml").read_text()))
    environ = {"SATHERD_SECRET": "6" * 64, "SATHERD_NATS_URL": "nats://nats:4222"}
    done = config("-f", str(file), "--profile", "many", **SECRETS, **environ)
    assert done.returncode == 0, done.stderr
    known = yaml.safe_load(done.stdout)
    second, third = known["services"]["router-2"], known["services"]["router-3"]
    assert second["environment"] == third["environment"]
    assert second["volumes"] != third["volumes"] and "router-3" in known["volumes"]
    assert set(known["services"]["load-balancer"]["depends_on"]) == {
        "router",
        "router-2",
        "router-3",
    }
    balancer = with_a_third((REPOSITORY / "deploy/nginx.conf").read_text())
    assert re.findall(r"server ([\w-]+):8000", balancer) == ["router", "router-2", "router-3"]


def test_everything_that_keeps_state_keeps_it_in_a_volume(
    services: dict[str, dict[str, Any]],
) -> None:
    for name in ("simulated-lightning", "router", "worker"):
        assert any(f"{name}:/data" in json.dumps(v) or _mounts(v, name, "/data")
                   for v in services[name]["volumes"])  # fmt: skip
    assert any("/var/lib/postgresql" in json.dumps(v) for v in services["postgres"]["volumes"])


def _mounts(volume: object, source: str, target: str) -> bool:
    """Docker's plugin shows volumes in the long form."""
    return (
        isinstance(volume, dict) and volume.get("source") == source and volume["target"] == target
    )


def test_the_image_does_not_run_as_root_and_its_user_has_a_name_and_a_home() -> None:
    final = instructions()
    last_from = max(i for i, (word, _) in enumerate(final) if word == "FROM")
    stage = final[last_from:]
    users = [rest for word, rest in stage if word == "USER"]
    assert re.fullmatch(r"([1-9]\d+):([1-9]\d+)", users[-1])
    uid = users[-1].split(":")[0]
    shell = " ".join(rest for word, rest in stage if word == "RUN")
    # The embedded PostgreSQL insists on a name for its user.
    assert re.search(rf"useradd --uid {uid} .*--home-dir /data", shell)
    assert ("VOLUME", "/data") in stage
    assert ("ENTRYPOINT", '["satherd"]') in stage
    assert "SATHERD_DATA_DIR=/data" in " ".join(rest for word, rest in stage if word == "ENV")


def test_the_image_builds_llama_cpp_as_the_worker_would() -> None:
    text = "\n".join(f"{word} {rest}" for word, rest in instructions())
    assert f"ARG LLAMA_VERSION={LLAMA_VERSION}" in text
    wanted = build_environment({}, cuda=False)
    assert f"SKBUILD_BUILD_TARGETS={wanted['SKBUILD_BUILD_TARGETS']}" in text
    for argument in shlex.split(wanted["CMAKE_ARGS"]):
        assert argument.replace(str(REPOSITORY), "/src") in text
    # It may run on another machine than the one that builds it.
    assert "-DGGML_NATIVE=OFF" in text
    # Compiled once: its layer comes before anything that changes often.
    assert text.index("llama-cpp-python==") < text.index("COPY pyproject.toml")


def test_what_the_image_copies_is_there_and_is_let_through() -> None:
    lines = (REPOSITORY / ".dockerignore").read_text().split()
    let_through = {line[1:].rstrip("/") for line in lines if line.startswith("!")}
    assert "*" in lines
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    packages = project["tool"]["setuptools"]["packages"]["find"]["include"]
    assert let_through >= {package.rstrip("*") for package in packages}
    copied = [
        source
        for word, rest in instructions()
        if word == "COPY" and not rest.startswith("--from")
        for source in rest.split()[:-1]
        if source != "."
    ]
    assert copied
    for source in copied:
        assert (REPOSITORY / source).exists(), source
        assert source.split("/")[0] in let_through, source
    assert not any(name.startswith((".env", ".git")) for name in let_through)


def test_no_secret_is_written_into_the_image() -> None:
    for word, rest in instructions():
        if word in ("ENV", "ARG"):
            assert not re.search(r"TOKEN|PASSWORD|SECRET|_KEY|MACAROON", rest)
