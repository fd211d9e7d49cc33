"use strict";

// Everything that comes from the server or from a file name enters the page as text, never as HTML.
const byId = (id) => document.getElementById(id);
// An exported page answers by itself (export/page/local.js).
const ask = globalThis.askModel ?? ((path, options) => fetch(path, options));
const results = byId("results");
let model = { has_attention: false, max_photos: 1 };
let names = [];

const percent = (share) => `${(100 * share).toFixed(share < 0.00095 ? 2 : 1)}\u00a0%`;
const readable = (name) => name.replaceAll("_", " ");

function headers() {
  const key = byId("key").value || sessionStorage.getItem("key") || "";
  return key ? { "X-API-Key": key } : {};
}

async function reasonOf(response) {
  try {
    const detail = (await response.json()).detail;
    return typeof detail === "string" ? detail : JSON.stringify(detail);
  } catch {
    return `the server answered ${response.status}`;
  }
}

async function open() {
  try {
    model = await (await ask("health")).json();
    byId("about").textContent = describe(model);
    showExamples(model.examples);
    document.title = `${model.model} – Fieldmark`;
    await loadClasses();
  } catch (error) {
    byId("about").textContent = error.reason ? `Not ready: ${error.reason}.`
      : "The server does not answer. Is it still running?";
  }
}

function describe({ model, classes, accuracy, is_calibrated, version, runtime }) {
  const right = accuracy ? `, ${percent(accuracy.value)} right on validation photos `
    + `(95\u00a0% interval ${percent(accuracy.low)} to ${percent(accuracy.high)})` : "";
  const sure = is_calibrated ? "" : " Its probabilities are not calibrated: they may claim too much.";
  const by = version ? ` Fieldmark ${version}.` : ` A photo takes ${runtime.seconds.toFixed(2)}\u00a0s here.`;
  return `Model ${model}: ${classes} classes${right}.${sure}${by}`;
}

async function loadClasses() {
  const response = await ask("classes", { headers: headers() });
  byId("key-box").hidden = response.ok && !byId("key").value;
  if (response.status === 401) byId("key-box").open = true;
  if (!response.ok) return;
  names = (await response.json()).classes;
  showClasses();
}

function showClasses() {
  const wanted = byId("search").value.trim().toLowerCase();
  const found = names.filter((name) => readable(name).toLowerCase().includes(wanted));
  byId("classes").replaceChildren(...found.map((name) => {
    const item = document.createElement("li");
    item.textContent = readable(name);
    return item;
  }));
}

function showExamples(count) {
  byId("examples").hidden = !count;
  byId("examples").querySelector("div").replaceChildren(...Array.from({ length: count }, (_, number) => {
    const button = document.createElement("button");
    const image = document.createElement("img");
    image.src = `examples/${number}`;
    image.alt = `Example photo ${number + 1}`;
    button.type = "button";
    button.append(image);
    button.addEventListener("click", async () => {
      const photo = await (await fetch(image.src)).blob();
      take([new File([photo], `example ${number + 1}`, { type: photo.type })]);
    });
    return button;
  }));
}

function newCard(file) {
  const card = byId("card").content.cloneNode(true).firstElementChild;
  card.file = file;
  const image = card.querySelector("img");
  image.src = URL.createObjectURL(file);
  image.alt = `Your photo ${file.name || ""}`.trim();
  image.addEventListener("error", () => card.querySelector("figure").remove(), { once: true });
  card.querySelector("h2").textContent = "Looking …";
  return card;
}

function fail(card, reason) {
  card.classList.add("failed");
  card.reason = reason;
  card.querySelector("h2").textContent = "Not answered";
  // The picture of a file that is none is gone, so its name says which it was.
  card.querySelector(".note").textContent = `${card.file.name || "This photo"}: ${reason}`;
}

// How sure an answer is, in words: below one half, the other names together are likelier.
const hedge = (share) => (share < 0.5 ? "Perhaps " : "");

function show(card, answer, threshold) {
  card.answer = answer;
  if (answer.problem) return fail(card, `it ${answer.problem}.`);
  card.classList.toggle("unknown", answer.is_unknown);
  const { group } = answer;
  const best = answer.top[0].probability;
  card.classList.toggle("doubtful", best < 0.5);
  card.querySelector("h2").textContent = group ? readable(group.name)
    : answer.is_unknown ? "Unknown" : hedge(best) + readable(answer.label);
  card.querySelector(".note").textContent = group
    ? `${percent(group.probability)} sure of the ${group.level}, not of the class. The likeliest names:`
    : answer.is_unknown
    ? `Nothing reaches ${percent(threshold)}, what this model needs to answer. The likeliest names:`
    : `${percent(best)} sure${model.is_calibrated ? "" : " by its own account (not calibrated)"}`;
  card.querySelector(".bars").replaceChildren(...answer.top.map(({ label, probability }) => {
    const row = document.createElement("li");
    row.style.setProperty("--share", percent(probability).replace("\u00a0", ""));
    const name = document.createElement("span");
    const share = document.createElement("span");
    name.textContent = readable(label);
    share.textContent = percent(probability);
    share.className = "share";
    row.append(name, share);
    return row;
  }));
  if (answer.attention) addOverlay(card, answer);
}

function addOverlay(card, answer) {
  const button = card.querySelector(".overlay");
  const canvas = card.querySelector("canvas");
  const image = card.querySelector("img");
  button.hidden = false;
  draw(canvas, answer.attention);
  const place = () => {
    // object-fit: contain leaves bars beside the picture; the map covers what the model saw of the picture.
    const scale = Math.min(image.clientWidth / image.naturalWidth, image.clientHeight / image.naturalHeight);
    const [width, height] = [image.naturalWidth * scale, image.naturalHeight * scale];
    const [x, y, w, h] = answer.seen;
    Object.assign(canvas.style, {
      left: `${(image.clientWidth - width) / 2 + x * width}px`,
      top: `${(image.clientHeight - height) / 2 + y * height}px`,
      width: `${w * width}px`,
      height: `${h * height}px`,
    });
  };
  button.addEventListener("click", () => {
    canvas.hidden = !canvas.hidden;
    button.setAttribute("aria-pressed", String(!canvas.hidden));
    button.textContent = canvas.hidden ? "Show where it looked" : "Hide where it looked";
    card.querySelector("figcaption").hidden = canvas.hidden || answer.seen[2] * answer.seen[3] > 0.99;
    place();
  });
  addEventListener("resize", place);
}

async function send(files) {
  const cards = files.map(newCard);
  results.prepend(...cards);
  document.body.classList.add("answered");
  byId("tools").hidden = false;
  if (results.children.length > 12 && !wasChosen) showList(true);
  const form = new FormData();
  files.forEach((file) => form.append("photos", file));
  byId("status").className = "";
  byId("status").textContent = `Looking at ${files.length} ${files.length === 1 ? "photo" : "photos"} …`;
  let response;
  try {
    response = await ask(`predict?attention=${model.has_attention}`, { method: "POST", body: form, headers: headers() });
  } catch (error) {
    const reason = error.reason || "the server does not answer";
    cards.forEach((card) => fail(card, `${reason}.`));
    byId("status").textContent = `Not answered: ${reason}.`;
    return;
  }
  if (!response.ok) {
    const reason = await reasonOf(response);
    if (response.status === 401) Object.assign(byId("key-box"), { hidden: false, open: true });
    // Where no photo could be read, the reasons come one for each.
    const reasons = reason.split(/; (?=photo \d+ )/).map((each) => each.replace(/^photo \d+ /, "it "));
    cards.forEach((card, place) => fail(card, reasons.length === cards.length ? reasons[place] : reason));
    byId("status").textContent = `Not answered: ${reason}`;
    return;
  }
  const answers = await response.json();
  answers.photos.forEach((answer, place) => show(cards[place], answer, answers.threshold));
  cards[0].scrollIntoView({ block: "nearest" });
  // Read out, not shown: the cards say it already.
  byId("status").className = "quiet";
  byId("status").textContent = answers.photos
    .map((answer) => (answer.problem ? `could not be read: it ${answer.problem}`
      : answer.group ? `unknown, but ${answer.group.level} ${readable(answer.group.name)}`
      : answer.is_unknown ? "unknown" : `${readable(answer.label)}, ${percent(answer.top[0].probability)}`))
    .join("; ");
}

let wasChosen = false;
function showList(isList) {
  results.classList.toggle("list", isList);
  byId("list").setAttribute("aria-pressed", String(isList));
}

// Columns of its own, not those of `fieldmark predict --out`.
function csv() {
  const cell = (value) => (/[",\r\n]/.test(value) ? `"${String(value).replaceAll('"', '""')}"` : String(value));
  const heads = ["path", "label", "probability", "unknown", ...[1, 2, 3].flatMap((n) => [`top${n}`, `top${n}_probability`]), "problem"];
  const rows = [...results.children].map(({ file, answer, reason }) => {
    const top = answer?.top || [];
    return [file.name, answer?.label ?? "", top[0]?.probability ?? "", answer && !answer.problem ? answer.is_unknown : "",
      ...[0, 1, 2].flatMap((n) => [top[n]?.label ?? "", top[n]?.probability ?? ""]), reason ?? ""];
  });
  return [heads, ...rows].map((row) => row.map(cell).join(",")).join("\r\n") + "\r\n";
}

function download() {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([csv()], { type: "text/csv" }));
  link.download = "answers.csv";
  link.click();
  URL.revokeObjectURL(link.href);
}

function clear() {
  for (const image of results.querySelectorAll("img")) URL.revokeObjectURL(image.src);
  results.replaceChildren();
  byId("tools").hidden = true;
  byId("status").textContent = "";
  document.body.classList.remove("answered");
}

async function take(list) {
  const files = [...list];
  for (let start = 0, count; start < files.length; start += count) {
    count = Math.min(8, model.max_photos); // which may still be unknown at the first
    await send(files.slice(start, start + count));
  }
}

for (const id of ["files", "camera"]) {
  byId(id).addEventListener("change", (event) => {
    take(event.target.files);
    event.target.value = ""; // so that the same photo can be chosen again
  });
}
const drop = byId("drop");
addEventListener("dragover", (event) => { event.preventDefault(); drop.classList.add("over"); });
addEventListener("dragleave", (event) => { if (!event.relatedTarget) drop.classList.remove("over"); });
addEventListener("drop", (event) => {
  event.preventDefault();
  drop.classList.remove("over");
  take(event.dataTransfer.files);
});
addEventListener("paste", (event) => take(event.clipboardData.files));
byId("list").addEventListener("click", () => {
  wasChosen = true;
  showList(!results.classList.contains("list"));
});
byId("csv").addEventListener("click", download);
byId("clear").addEventListener("click", clear);
byId("search").addEventListener("input", showClasses);
byId("key").addEventListener("change", () => {
  sessionStorage.setItem("key", byId("key").value);
  loadClasses();
});
open();
