// Draws /openapi.json. Texts are set as text, never as HTML.
"use strict";

const METHODS = ["get", "post", "put", "patch", "delete"];

function make(tag, content, attributes = {}) {
  const element = document.createElement(tag);
  for (const part of [content].flat()) if (part != null) element.append(part);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  return element;
}

// Text with `code` in it.
function prose(text) {
  return String(text || "").split("`").map((part, i) => (i % 2 ? make("code", part) : part));
}

function table(heads, rows) {
  const head = make("tr", heads.map((words) => make("th", words)));
  const body = rows.map((cells) => make("tr", cells.map((cell) => make("td", cell))));
  return make("table", [make("thead", head), make("tbody", body)]);
}

function curl(method, path, operation, example) {
  const lines = [`curl ${location.origin}${path.replaceAll("{", "").replaceAll("}", "")}`];
  if (method !== "get" && !(method === "post" && example)) lines[0] += ` -X ${method.toUpperCase()}`;
  const ways = (operation.security || []).map((way) => Object.keys(way)[0]);
  const bearer = { key: "sk-…", admin: "ADMIN_TOKEN", worker: "WORKER_KEY" }[ways[0]];
  if (bearer) lines.push(`-H 'Authorization: Bearer ${bearer}'`);
  if (ways[0] === "apikey") lines.push("-H 'apikey: sk-…'");
  if (example) {
    lines.push("-H 'Content-Type: application/json'");
    lines.push(`-d '${JSON.stringify(example, null, 1).replaceAll("'", "'\\''")}'`);
  }
  return lines.join(" \\\n  ");
}

function operationOf(path, method, operation) {
  const example = operation.requestBody?.content?.["application/json"]?.example;
  const words = (operation.description || operation.summary || "").split("\n\n");
  const body = words.slice(1).map((part) => make("p", prose(part)));
  const parameters = (operation.parameters || []).map((p) => [
    p.name, p.in + (p.required ? ", needed" : ""), prose(p.description || p.schema?.type),
  ]);
  if (parameters.length) body.push(table(["parameter", "where", "meaning"], parameters));
  body.push(make("pre", curl(method, path, operation, example)));
  return make("details", [
    make("summary", [
      make("span", method.toUpperCase(), { class: "method" }),
      make("span", path, { class: "path" }),
      make("span", prose(words[0]), { class: "short" }),
    ]),
    make("div", body),
  ], { "data-words": `${method} ${path} ${words.join(" ")}`.toLowerCase() });
}

function section(id, title, content) {
  document.getElementById("contents").append(make("a", title, { href: `#${id}` }));
  return make("section", [make("h2", title, { id }), ...content]);
}

function draw(api) {
  document.getElementById("title").textContent = `${api.info.title} ${api.info.version}`;
  document.getElementById("about").append(...prose(api.info.description));
  const byTag = new Map(api.tags.map((tag) => [tag.name, [make("p", prose(tag.description))]]));
  for (const [path, methods] of Object.entries(api.paths)) {
    for (const method of METHODS.filter((name) => name in methods)) {
      const tag = methods[method].tags?.[0] || "other";
      if (!byTag.has(tag)) byTag.set(tag, []);
      byTag.get(tag).push(operationOf(path, method, methods[method]));
    }
  }
  const paying = Object.entries(api.components.securitySchemes).map(([name, how]) => [
    name, how.name || "Authorization", prose(how.description),
  ]);
  const codes = api["x-error-codes"].map((e) => [e.code, String(e.status), prose(e.meaning)]);
  document.getElementById("main").replaceChildren(
    section("paying", "paying", [table(["way", "header", "what it is"], paying)]),
    ...[...byTag].filter(([, parts]) => parts.length > 1).map(([tag, operations]) => section(`tag-${tag.replace(/\W+/g, "-")}`, tag, operations)),
    section("errors", "errors", [
      make("p", prose('Our own doors answer `{"error": {"code", "message", …facts}}`; the doors of'
        + " other dialects render the same codes in their own shape.")),
      table(["code", "status", "meaning"], codes),
    ]),
  );
}

function filter(words) {
  for (const details of document.querySelectorAll("details")) {
    details.hidden = !details.dataset.words.includes(words.trim().toLowerCase());
  }
}

async function read(path) {
  const answer = await fetch(path);
  if (!answer.ok) throw new Error(`${path} answered ${answer.status}`);
  return answer.json();
}

async function start() {
  document.getElementById("filter").addEventListener("input", (e) => filter(e.target.value));
  try {
    draw(await read("/openapi.json"));
  } catch (error) {
    document.getElementById("main").replaceChildren(make("p", `This page cannot be drawn: ${error.message}`));
  }
  const info = await read("/info").catch(() => null);
  if (info?.simulated) {
    document.getElementById("money").textContent = "Simulated Lightning: no money here is real.";
  }
}

start();
