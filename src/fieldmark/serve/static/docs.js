"use strict";

// openapi.json as a page. Everything enters as text, and nothing is loaded from elsewhere.
const byId = (id) => document.getElementById(id);

function add(parent, tag, text = "") {
  const element = document.createElement(tag);
  element.textContent = text;
  parent.append(element);
  return element;
}

function addTable(parent, heads, rows) {
  if (!rows.length) return;
  const table = add(parent, "table");
  for (const head of heads) add(table, "th", head).scope = "col";
  for (const row of rows) {
    const line = add(table, "tr");
    row.forEach((cell) => add(line, "td", cell));
  }
}

function typeOf(schema = {}) {
  const name = schema.$ref?.split("/").at(-1);
  if (name) return name;
  if (schema.anyOf) return schema.anyOf.map(typeOf).join(" or ");
  return schema.items ? `list of ${typeOf(schema.items)}` : schema.format || schema.type || "";
}

function addOperation(path, method, operation) {
  const section = add(byId("paths"), "section");
  add(section, "h2", `${method.toUpperCase()} ${path}`);
  add(section, "p", operation.description || operation.summary || "");
  addTable(section, ["Parameter", "Default", "Meaning"],
    (operation.parameters || []).map(({ name, schema, description }) => [name, String(schema.default ?? ""), description || ""]));
  addTable(section, ["Body", "Content"],
    Object.entries(operation.requestBody?.content || {}).map(([kind, { schema }]) =>
      [kind, schema.properties ? Object.entries(schema.properties).map(([name, type]) => `${name}: ${typeOf(type)}`).join(", ") : "one photo"]));
  addTable(section, ["Status", "Meaning", "Content"], Object.entries(operation.responses).map(([status, { description, content }]) =>
    [status, description, Object.entries(content || {}).map(([kind, { schema }]) => typeOf(schema) || kind).join(", ")]));
}

async function open() {
  const key = sessionStorage.getItem("key");
  const response = await fetch("openapi.json", { headers: key ? { "X-API-Key": key } : {} });
  byId("example").textContent = `curl -F photos=@photo.jpg ${location.origin}/predict\n`
    + `curl --data-binary @photo.jpg -H "Content-Type: image/jpeg" ${location.origin}/predict`;
  if (!response.ok) {
    byId("about").textContent = "This server asks for a key: enter it on the first page, then come back.";
    return;
  }
  const api = await response.json();
  byId("about").textContent = `${api.info.summary} Version ${api.info.version}.`;
  for (const [path, methods] of Object.entries(api.paths)) {
    for (const [method, operation] of Object.entries(methods)) addOperation(path, method, operation);
  }
  for (const [name, schema] of Object.entries(api.components?.schemas || {})) {
    const section = add(byId("paths"), "section");
    add(section, "h2", name);
    addTable(section, ["Field", "Type", "Meaning"],
      Object.entries(schema.properties || {}).map(([field, type]) => [field, typeOf(type), type.description || ""]));
  }
}

open().catch(() => { byId("about").textContent = "The server does not answer. Is it still running?"; });
