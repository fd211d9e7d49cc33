"use strict";

// Names and paths enter the page as text, never as HTML.
const byId = (id) => document.getElementById(id);
const list = byId("photos");
const readable = (name) => String(name).replaceAll("_", " ");
const percent = (share) => `${(100 * share).toFixed(1)}\u00a0%`;
const EXPLAIN = {
  suggested: "Photos without a label that would teach the model most, the most useful first. Leave out what you cannot name.",
  suspects: "Photos whose label the predictions contradict so clearly that the label is probably wrong (confident learning).",
  losses: "Photos that surprised the model most: wrong labels, rare views, or several subjects.",
  pair: "Photos of each class that were taken for the other. The same number of mistakes both ways hints at look-alikes, one way at labels.",
  duplicates: "Pairs that look the same. Across splits they make the result too optimistic; under two labels one of them is wrong.",
  class: "All photos of the class, with what the model says where it was asked.",
  marked: "Your decisions, the newest first.",
};
let overview;
let isLabeling = false; // photos of a list that have no labels yet
let state = { view: "suspects", which: 0 };
let next = 0;
let isLoading = false;
let isDone = false;
let generation = 0;
let hidden = 0; // decided photos of this view that are not shown

async function ask(path, body) {
  const options = body === undefined ? {} : {
    method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body),
  };
  let response;
  try {
    response = await fetch(path, options);
  } catch {
    throw new Error("The server does not answer. Is `fieldmark review` still running?");
  }
  const content = await response.json();
  if (!response.ok) throw new Error(content.detail || `the server answered ${response.status}`);
  return content;
}

let fading;
function say(text) {
  clearTimeout(fading);
  byId("status").textContent = text;
  fading = setTimeout(() => say(""), 8000); // it lies over the photos
}

function fail(error) {
  say(error.message);
  clearTimeout(fading); // stays until something is done
}

function option(text, value) {
  const item = document.createElement("option");
  item.textContent = text;
  item.value = value;
  return item;
}

async function start() {
  overview = await ask("api/overview");
  isLabeling = overview.suggested > 0;
  if (isLabeling) speakOfLabels();
  else byId("view").querySelector("[value=suggested]").remove();
  const [view, which] = location.hash.slice(1).split("/");
  // Without a wish, the first view that has something to look at.
  const filled = ["suggested", "suspects", "losses", "pair", "duplicates"].find((name) => counts()[name]) || "class";
  state = view in EXPLAIN ? { view, which: Number(which) || 0 } : { view: filled, which: 0 };
  byId("view").value = state.view;
  choices();
  describe();
  await restart();
  if (overview.duplicates_state === "searching") setTimeout(refresh, 2000);
}

function speakOfLabels() {
  document.body.classList.add("labels");
  document.title = "Label – Fieldmark";
  byId("title").textContent = "What do these photos show?";
  byId("new-name").hidden = false;
  byId("choose").setAttribute("aria-label", "Name what the photo shows");
  byId("next").querySelector("span").textContent = "Next, teach the model your labels:";
  for (const verb of document.querySelectorAll(".verb")) verb.textContent = "label";
  for (const verb of document.querySelectorAll(".Verb")) verb.textContent = "Label";
  for (const item of [...byId("view").options]) if (!["suggested", "marked"].includes(item.value)) item.remove();
}

async function refresh() {
  try {
    overview = await ask("api/overview");
  } catch (error) {
    return fail(error);
  }
  describe();
  if (overview.duplicates_state === "searching") setTimeout(refresh, 2000);
  else if (state.view === "duplicates") restart();
}

function counts() {
  return { suggested: overview.suggested, suspects: overview.suspects, losses: overview.losses, pair: overview.pairs.length,
    duplicates: overview.duplicates, class: overview.classes.length, marked: overview.marked };
}

function describe() {
  byId("labels").replaceChildren(...overview.classes.map(({ name }) => option(readable(name), name)));
  const scored = overview.held_out === overview.photos ? "all with a prediction"
    : `${overview.held_out} with a prediction (those it was not trained on; give the runs of all folds to have all)`;
  byId("about").textContent = isLabeling
    ? `${overview.photos} photos to label. ${overview.marked} labeled, kept in ${overview.table}; your photos are not changed.`
    : `${overview.photos} photos, ${scored}. ${overview.marked} decided, kept in ${overview.table}; your photos are not changed.`;
  const titles = { suggested: "To label", suspects: "Likely label errors", losses: "Highest losses", pair: "Confused classes",
    duplicates: "Near-duplicates", class: "All photos of a class", marked: "Decided" };
  for (const item of byId("view").options) item.textContent = `${titles[item.value]} (${counts()[item.value]})`;
  byId("explain").textContent = state.view === "duplicates" && overview.duplicates_state !== "done"
    ? `The search is ${overview.duplicates_state} …` : EXPLAIN[state.view];
  byId("next").hidden = !overview.marked;
  byId("next").querySelector("code").textContent = overview.command;
}

function choices() {
  const isPair = state.view === "pair";
  const entries = isPair
    ? overview.pairs.map((pair) => `${readable(pair.first)} – ${readable(pair.second)} (${pair.photos})`)
    : state.view === "class" ? overview.classes.map(({ name, photos }) => `${readable(name)} (${photos})`) : [];
  byId("which-label").hidden = !entries.length;
  byId("which-label").firstElementChild.textContent = isPair ? "Pair" : "Class";
  byId("which").replaceChildren(...entries.map(option));
  byId("which").value = String(state.which);
}

async function restart() {
  generation += 1;
  next = 0;
  isDone = isLoading = false;
  list.className = state.view;
  hidden = 0;
  list.replaceChildren();
  location.replace(`#${state.view}/${state.which}`);
  describe();
  await loadMore();
  list.querySelector(".item")?.setAttribute("tabindex", "0");
}

async function loadMore() {
  if (isLoading || isDone) return;
  isLoading = true;
  const mine = generation;
  byId("more").textContent = "Loading …";
  try {
    const page = await ask(`api/photos?view=${state.view}&which=${state.which}&offset=${next}&limit=60`);
    if (mine !== generation) return;
    const isHiding = byId("hide").checked && state.view !== "marked";
    const photos = page.photos.filter((photo) => !isHiding || !photo.action);
    hidden += page.photos.length - photos.length;
    list.append(...photos.map(newItem));
    if (state.view === "pair") sortPair();
    next = page.next;
    isDone = next >= page.total;
    const rest = hidden ? `, ${hidden} of them decided and hidden` : "";
    byId("more").textContent = isDone ? (page.total ? `That was all: ${page.total}${rest}.` : "Nothing here.") : "More below …";
    if (!photos.length && !isDone) setTimeout(loadMore);
  } catch (error) {
    byId("more").textContent = error.message;
  } finally {
    if (mine === generation) isLoading = false;
  }
}

// A column for each class as labeled, so that look-alikes stand side by side; where mistakes go one way, one list.
function sortPair() {
  const pair = overview.pairs[state.which];
  if (!pair) return;
  const items = [...list.querySelectorAll(".item")];
  const columns = [pair.first, pair.second].map((name) => [name, items.filter((item) => item.photo.label === name)])
    .filter(([, found]) => found.length);
  list.className = columns.length > 1 ? "pair" : "losses";
  list.replaceChildren(...columns.flatMap(([name, found], column) => {
    const head = document.createElement("li");
    head.className = "column-head";
    head.textContent = `${readable(name)}, taken for the other`;
    const cells = [head, ...found];
    cells.forEach((cell, row) => {
      cell.style.setProperty("--column", column + 1);
      cell.style.setProperty("--row", row + 1);
    });
    return cells;
  }));
}

function newItem(photo) {
  const item = byId("item").content.cloneNode(true).firstElementChild;
  item.photo = photo;
  const image = item.querySelector("img");
  image.src = `photo/${photo.number}?side=240`;
  image.alt = `Photo ${photo.path}`;
  image.addEventListener("error", () => { image.alt = "This photo cannot be read."; });
  item.querySelector(".actions").setAttribute("aria-label", `Decide about ${photo.path}`);
  item.querySelector(".look").hidden = !overview.has_attention;
  show(item);
  return item;
}

function show(item) {
  const { photo } = item;
  const says = item.querySelector(".says");
  const label = document.createElement("strong");
  label.textContent = readable(photo.label);
  if (isLabeling) label.textContent = photo.action ? readable(photo.new_label) : "Not labeled";
  says.replaceChildren(isLabeling && !photo.action ? "" : "Labeled ", label);
  if (photo.action === "relabel" && !isLabeling) says.append(" → ", readable(photo.new_label));
  const isOther = photo.guess !== null && photo.guess !== photo.label;
  const relabel = item.querySelector("[data-action=relabel]");
  relabel.hidden = !isOther && photo.action !== "relabel";
  relabel.textContent = `${isLabeling ? "Label" : "Relabel"} as ${readable(photo.action === "relabel" ? photo.new_label : photo.guess)}`;
  relabel.classList.toggle("primary", !relabel.hidden);
  item.querySelector("[data-action=keep]").classList.toggle("primary", relabel.hidden);
  item.querySelector(".guess").textContent = isLabeling ? photo.why
    : photo.guess === null ? "No prediction: it was trained on."
    : photo.guess === photo.label ? `Guessed right, ${percent(photo.probability)}`
      : `Guessed ${readable(photo.guess)}, ${percent(photo.probability)}`;
  const bits = photo.bits === undefined ? "" : ` – pair ${photo.near + 1}, ${photo.bits} bits apart`;
  item.querySelector(".path").textContent = `${photo.path}${photo.split && ` (${photo.split})`}${bits}`;
  item.classList.toggle("drop", photo.action === "drop");
  for (const button of item.querySelectorAll("[data-action]")) {
    button.setAttribute("aria-pressed", String(button.dataset.action === photo.action));
  }
}

async function decide(item, action, label = "") {
  if (isLabeling && action !== "relabel") return;
  if (action === "relabel" && !label) {
    const { guess } = item.photo;
    if (guess === null || guess === item.photo.label) return chooseLabel(item);
    label = guess;
  }
  try {
    update(await ask("api/decide", { number: item.photo.number, action, label }));
    const isNew = !overview.classes.some(({ name }) => name === label);
    overview = await ask("api/overview");
    describe();
    say(isLabeling ? `Labeled as ${readable(label)}${isNew ? ", a new class" : ""}.`
      : action === "relabel" ? `Relabeled as ${readable(label)}.` : action === "drop" ? "Dropped." : "Kept.");
  } catch (error) {
    fail(error);
  }
}

function update(photo) {
  for (const item of list.querySelectorAll(".item")) {
    if (item.photo.number !== photo.number) continue;
    item.photo = { ...item.photo, ...photo };
    show(item);
  }
}

function chooseLabel(item) {
  const dialog = byId("choose");
  byId("label").value = "";
  dialog.returnValue = "";
  dialog.onclose = () => {
    const label = classNamed(byId("label").value);
    item.focus();
    if (dialog.returnValue === "ok" && label) decide(item, "relabel", label);
  };
  dialog.showModal();
}

// What was typed, as the class is named: with spaces and in any case it is understood, if it can only be one.
function classNamed(typed) {
  const wanted = readable(typed.trim()).toLowerCase();
  const found = overview.classes.map(({ name }) => name).filter((name) => readable(name).toLowerCase() === wanted);
  return found.length === 1 ? found[0] : typed.trim();
}

async function undo() {
  let photo;
  try {
    ({ photo } = await ask("api/undo", {}));
  } catch (error) {
    return fail(error);
  }
  if (photo) update(photo);
  await refresh();
  if (state.view === "marked") await restart();
  say(photo ? `Taken back: ${photo.path}` : "There is nothing to take back.");
}

async function toggleAttention(item) {
  const canvas = item.querySelector("canvas");
  if (!overview.has_attention) return say("This model has no attention maps.");
  const look = item.querySelector(".look");
  if (canvas.dataset.ready) {
    canvas.hidden = !canvas.hidden;
    look.setAttribute("aria-pressed", String(!canvas.hidden));
    return;
  }
  const { photo } = item;
  try {
    const found = await ask(`api/attention/${photo.number}?label=${encodeURIComponent(photo.guess ?? photo.label)}`);
    draw(canvas, found.attention);
    const image = item.querySelector("img");
    const scale = Math.min(image.clientWidth / image.naturalWidth, image.clientHeight / image.naturalHeight);
    const [width, height] = [image.naturalWidth * scale, image.naturalHeight * scale];
    const [x, y, w, h] = found.seen;
    Object.assign(canvas.style, {
      left: `${(image.clientWidth - width) / 2 + x * width}px`, top: `${(image.clientHeight - height) / 2 + y * height}px`,
      width: `${w * width}px`, height: `${h * height}px`,
    });
    canvas.dataset.ready = "yes";
    canvas.hidden = false;
    look.setAttribute("aria-pressed", "true");
  } catch (error) {
    fail(error);
  }
}

function enlarge(item) {
  const dialog = byId("large");
  dialog.querySelector("img").src = `photo/${item.photo.number}?side=1200`;
  dialog.querySelector("img").alt = `Photo ${item.photo.path}`;
  dialog.showModal();
}

function move(item, step) {
  const items = [...list.querySelectorAll(".item")];
  const target = items[items.indexOf(item) + step];
  if (!target) return;
  item.tabIndex = -1;
  target.tabIndex = 0;
  target.focus();
}

function rowLength() {
  const items = list.querySelectorAll(".item");
  const top = items[0]?.offsetTop;
  return [...items].filter((item) => item.offsetTop === top).length || 1;
}

list.addEventListener("click", (event) => {
  const item = event.target.closest(".item");
  if (!item) return;
  const { action } = event.target.dataset;
  if (action) decide(item, action);
  else if (event.target.matches(".other")) chooseLabel(item);
  else if (event.target.matches(".look")) toggleAttention(item);
  else if (event.target.tagName === "IMG") enlarge(item);
});

addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || document.querySelector("dialog[open]")) return;
  if (event.target.matches?.("select, input:not([type=checkbox])")) return;
  if (event.key === "u") return void undo();
  const item = event.target.closest?.(".item") || (/^[krlda]$|^Arrow/.test(event.key) && list.querySelector(".item"));
  if (!item) return;
  const actions = {
    k: () => decide(item, "keep"), r: () => decide(item, "relabel"), d: () => decide(item, "drop"),
    l: () => chooseLabel(item), a: () => toggleAttention(item),
    ArrowRight: () => move(item, 1), ArrowLeft: () => move(item, -1),
    ArrowDown: () => move(item, rowLength()), ArrowUp: () => move(item, -rowLength()),
  };
  if (event.key === "Enter" && event.target === item) actions.Enter = () => enlarge(item);
  if (!(event.key in actions)) return;
  event.preventDefault();
  if (!event.target.closest?.(".item")) item.focus();
  actions[event.key]();
});

byId("view").addEventListener("change", (event) => {
  state = { view: event.target.value, which: 0 };
  choices();
  restart();
});
byId("which").addEventListener("change", (event) => {
  state.which = Number(event.target.value);
  restart();
});
byId("undo").addEventListener("click", undo);
byId("hide").addEventListener("change", restart);
new IntersectionObserver((entries) => { if (entries.some((entry) => entry.isIntersecting)) loadMore(); },
  { rootMargin: "800px" }).observe(byId("more"));
start().catch(fail);
