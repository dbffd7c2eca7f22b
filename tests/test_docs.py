"""The pages of docs/ against the code, and the page at /docs."""

from __future__ import annotations

import asyncio
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from billing import fees, ledger, settlement
from billing.fees import Rates
from billing.payout_settings import fee_cap_msat
from cli import doc_pages
from router import job_states
from router.api.docs import EXAMPLES
from router.api.errors import STATUSES
from router.app import create_app
from router.job_states import Event, State
from router.settings import Settings
from tests.router_rig import MODEL, Rig
from worker.settings import WorkerSettings

REPOSITORY = Path(__file__).parent.parent
DOCS = REPOSITORY / "docs"
PAGES = sorted([*REPOSITORY.glob("*.md"), *DOCS.rglob("*.md")])


@pytest.mark.parametrize("name", doc_pages.PAGES)
def test_a_made_page_is_what_the_code_says_now(name: str) -> None:
    """When this fails: `python -m cli.doc_pages docs`."""
    assert (DOCS / name).read_text() == doc_pages.PAGES[name]()


def test_the_drawn_states_are_the_table_of_moves() -> None:
    assert f"```mermaid\n{job_states.as_mermaid()}\n```" in (DOCS / "job_states.md").read_text()
    assert set(doc_pages.STATE_WORDS) == set(State)
    assert set(doc_pages.EVENT_WORDS) == set(Event)


@pytest.mark.parametrize("shape", [Settings, WorkerSettings])
def test_every_setting_says_what_it_means(shape: type) -> None:
    for name, field in shape.model_fields.items():
        assert field.description and field.description.endswith("."), name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_links_and_paths_in_a_page_lead_somewhere(page: Path) -> None:
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
    for path in re.findall(r"`((?:router|worker|billing|cli|client|tests|docs)/[\w./-]+)`", text):
        assert (REPOSITORY / path).exists(), f"{page.name} names {path}"


def test_money_md_names_every_account_of_the_ledger() -> None:
    text = (DOCS / "money.md").read_text()
    accounts = [
        value
        for name, value in vars(ledger).items()
        if name.isupper() and not name.startswith("_") and isinstance(value, str)
    ]
    assert len(accounts) >= 6
    for account in accounts:
        assert f"`{account}`" in text, account


def test_the_worked_example_of_money_md_is_what_the_code_reckons() -> None:
    rates = Rates(prompt_fee_msat=1000, input_msat_per_mtok=200_000, output_msat_per_mtok=600_000)
    base_msat = fees.base_fee_msat(rates, prompt_tokens=10, max_tokens=160)
    offer_msat = fees.offer_for_multiplier_msat(base_msat, fees.Decimal("1.5"))
    charged_msat = fees.charge_msat(
        rates,
        prompt_tokens=10,
        output_tokens=128,
        multiplier_milli=fees.multiplier_milli(offer_msat, base_msat),
        held_msat=offer_msat,
    )
    parts = settlement.divide(
        escrow_msat=offer_msat, charge_msat=charged_msat, commission_ppm=50_000, payable=True
    )
    assert (base_msat, offer_msat, charged_msat) == (1098, 1647, 1619)
    assert parts == settlement.Division(worker_msat=1539, router_msat=80, refund_msat=28)
    assert fee_cap_msat(20_000) == 5000
    text = (DOCS / "money.md").read_text()
    for amount in (base_msat, offer_msat, charged_msat, parts.worker_msat, parts.router_msat):
        assert str(amount) in text


def test_decisions_are_numbered_without_gaps() -> None:
    pages = sorted((DOCS / "decisions").glob("[0-9]*.md"))
    assert [int(page.name[:4]) for page in pages] == list(range(1, len(pages) + 1))
    index = (DOCS / "decisions" / "README.md").read_text()
    for page in pages:
        number, _, title = page.read_text().partition("\n")[0].removeprefix("# ").partition(". ")
        assert int(number) == int(page.name[:4]), page.name
        assert f"{number}. [{title}]({page.name})" in index


class _Loads(HTMLParser):
    """What a page would fetch by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.urls: list[str] = []
        self.inline = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag == "link":
            self.urls.append(given["href"] or "")
        if tag in ("script", "img", "iframe"):
            self.urls.append(given.get("src") or "")
        self.inline += tag == "style" or "style" in given


async def test_the_docs_page_needs_nothing_from_outside(router: Rig) -> None:
    page = await router.http.get("/docs")
    assert page.status_code == 200
    assert page.headers["content-type"].startswith("text/html")
    assert "script-src 'self'" in page.headers["content-security-policy"]
    loads = _Loads()
    loads.feed(page.text)
    assert sorted(loads.urls) == ["/docs/docs.css", "/docs/docs.js"]
    assert loads.inline == 0
    for url in loads.urls:
        part = await router.http.get(url)
        assert part.status_code == 200
        assert not re.search(r"https?://(?!www\.w3\.org)", part.text), url
    assert (await router.http.get("/docs/other.js")).status_code == 404


async def test_openapi_holds_the_error_codes_and_the_ways_to_pay(router: Rig) -> None:
    document = (await router.http.get("/openapi.json")).json()
    listed = {row["code"]: (row["status"], row["meaning"]) for row in document["x-error-codes"]}
    assert listed == STATUSES
    codes = document["components"]["schemas"]["Problem"]["properties"]["error"]["properties"]
    assert codes["code"]["enum"] == list(STATUSES)
    ways = document["components"]["securitySchemes"]
    assert set(ways) == {"key", "l402", "payment", "claim", "apikey", "admin", "worker"}
    assert document["paths"]["/admin/fees"]["put"]["security"] == [{"admin": []}]
    assert {"key": []} in document["paths"]["/v1/chat/completions"]["post"]["security"]
    assert "security" not in document["paths"]["/info"]["get"]
    groups = {tag["name"] for tag in document["tags"] if tag["description"]}
    for path, methods in document["paths"].items():
        for operation in methods.values():
            assert set(operation["tags"]) <= groups, path
            assert operation["description"] and "(QB-" not in operation["description"], path
            assert "422" not in operation["responses"], path
            assert operation["responses"]["default"] == {"$ref": "#/components/responses/Problem"}


def test_the_operations_of_api_md_exist() -> None:
    paths = create_app(Settings(_env_file=None)).openapi()["paths"]  # pyright: ignore[reportCallIssue]
    named = re.findall(r"`(GET|POST|PUT|DELETE) (/[^\s`]*)", (DOCS / "api.md").read_text())
    assert len(named) > 15
    for method, path in named:
        assert method.lower() in paths.get(path, {}), f"{method} {path}"


async def test_the_headers_of_api_md_are_those_of_an_answer(router: Rig) -> None:
    text = (DOCS / "api.md").read_text()
    headers = re.findall(r"`(X-Satherd-[\w-]+)`", text)
    assert len(headers) == 4
    body = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 9}
    key = await router.bearer()
    async with router.worker() as worker:
        asked = asyncio.create_task(
            router.http.post("/v1/chat/completions", json=body, headers=key)
        )
        await worker.serve()
        answer = await asked
    assert set(headers) <= {name.title() for name in answer.headers}


def test_each_example_body_belongs_to_an_operation() -> None:
    paths = create_app(Settings(_env_file=None)).openapi()["paths"]  # pyright: ignore[reportCallIssue]
    for method, path in EXAMPLES:
        body = paths[path][method]["requestBody"]["content"]["application/json"]
        assert body["example"] == EXAMPLES[method, path]


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/quotes", 201),
        ("/jobs", 402),
        ("/v1/chat/completions", 402),
        ("/v1/completions", 402),
        ("/balance/topups", 201),
        ("/generate/prompt", 402),
        ("/api/v2/generate/text/async", 402),
    ],
)
async def test_an_example_body_is_accepted_as_it_stands(
    router: Rig, path: str, status: int
) -> None:
    async with router.worker():
        body = EXAMPLES["post", path]
        if "model" in body:
            body = body | {"model": MODEL}
        answer = await router.http.post(path, json=body)
    assert answer.status_code == status, answer.text
