"""The script of the page at /docs, run by Node.js on a document that only remembers what is put in."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from router.api.errors import STATUSES
from router.app import create_app
from router.settings import Settings

SCRIPT = Path(__file__).parent.parent / "router" / "web" / "docs.js"
NODE = shutil.which("node")

# argv: the script, the OpenAPI document. Prints the text of each part of the page as JSON.
DOCUMENT = """
const fs = require("fs"), vm = require("vm");
class Element {
  constructor() { this.parts = []; this.dataset = {}; }
  append(...parts) { this.parts.push(...parts); }
  replaceChildren(...parts) { this.parts = parts; }
  setAttribute(name, value) { if (name.startsWith("data-")) this.dataset[name.slice(5)] = value; }
  addEventListener() {}
  set textContent(text) { this.parts = [text]; }
  set innerHTML(_) { throw new Error("texts are never set as HTML"); }
  text() { return this.parts.map((p) => p instanceof Element ? p.text() : String(p)).join("\\n"); }
}
const known = {};
const document = {
  createElement: () => new Element(),
  getElementById: (id) => known[id] ??= new Element(),
  querySelectorAll: () => [],
};
const answers = {
  "/openapi.json": () => JSON.parse(fs.readFileSync(process.argv[2])),
  "/info": () => ({ simulated: true }),
};
const fetch = async (path) => ({ ok: path in answers, status: 404, json: async () => answers[path]() });
const location = { origin: "http://router.test" };
vm.runInNewContext(fs.readFileSync(process.argv[1], "utf8"), { document, fetch, location });
setTimeout(() => {
  const texts = Object.entries(known).map(([id, element]) => [id, element.text()]);
  console.log(JSON.stringify(Object.fromEntries(texts)));
}, 100);
"""


def drawn(openapi: Path) -> dict[str, str]:
    assert NODE is not None
    ran = subprocess.run(
        [NODE, "-e", DOCUMENT, str(SCRIPT), str(openapi)],
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


@pytest.mark.skipif(NODE is None, reason="needs Node.js")
def test_every_operation_and_every_error_is_drawn(tmp_path: Path) -> None:
    document = create_app(Settings(_env_file=None)).openapi()  # pyright: ignore[reportCallIssue]
    (tmp_path / "openapi.json").write_text(json.dumps(document))
    page = drawn(tmp_path / "openapi.json")
    assert page["title"].startswith("Satherd ")
    assert page["money"] == "Simulated Lightning: no money here is real."
    for path in document["paths"]:
        assert f"\n{path}\n" in page["main"]
    for code, (status, _) in STATUSES.items():
        assert f"{code}\n{status}\n" in page["main"]
    curl = page["main"].partition("curl http://router.test/v1/chat/completions \\")[2]
    assert curl.lstrip().startswith("-H 'Authorization: Bearer sk-…' \\")
    assert "prices" in page["contents"] and "errors" in page["contents"]


@pytest.mark.skipif(NODE is None, reason="needs Node.js")
def test_a_document_that_cannot_be_read_is_said_on_the_page(tmp_path: Path) -> None:
    (tmp_path / "openapi.json").write_text("{")
    assert "This page cannot be drawn" in drawn(tmp_path / "openapi.json")["main"]
