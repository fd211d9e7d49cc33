"use strict";

// Names and paths enter the page as text, never as HTML.
const byId = (id) => document.getElementById(id);
const readable = (name) => String(name).replaceAll("_", " ");
const percent = (share) => `${(100 * share).toFixed(1)}\u00a0%`;
const baseName = (path) => path.split("/").at(-1);
const CHOICES = [1, 2, 3, 5, 10, 20, 30, 60, 120, 240, 480];
const STATES = { queued: "waits for its turn", running: "running", finished: "finished", stopped: "stopped",
  failed: "did not work" };
let shown = 0; // what is loaded for a view that was left is not shown
let timer;

async function ask(path, { posts = false, ...query } = {}) {
  const options = posts ? { method: "POST", headers: { "Content-Type": "application/json" }, body: "{}" } : {};
  const words = new URLSearchParams(Object.entries(query).map(([key, value]) => [key, String(value).toWellFormed()]));
  let response;
  try {
    response = await fetch(`api/${path}?${words}`, options);
  } catch {
    throw new Error("The server does not answer. Is `fieldmark app` still running? Trainings go on without it.");
  }
  const content = await response.json();
  if (!response.ok) throw new Error(content.detail || `the server answered ${response.status}`);
  return content;
}

function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

function fill(section, items) {
  section.hidden = !items.length;
  section.querySelector("ul").replaceChildren(...items);
}

const say = (text) => { byId("status").textContent = text; };
const link = (view, path) => `#${view}/${encodeURIComponent(String(path).toWellFormed())}`;

function picture(path, alt, side = 240) {
  const image = make("img", { loading: "lazy", alt });
  image.src = `photo?path=${encodeURIComponent(String(path).toWellFormed())}&side=${side}`;
  image.addEventListener("error", () => { image.alt = `${alt} (cannot be shown)`; }, { once: true });
  return image;
}

function duration(seconds) {
  if (seconds < 90) return `${Math.max(Math.round(seconds), 0)} s`;
  return seconds < 5400 ? `${Math.round(seconds / 60)} min` : `${(seconds / 3600).toFixed(1)} h`;
}

const timeLeft = ({ left }) => (left > 0 ? `${duration(left)} left` : "Nearly done");

const photoCount = (count) => `${count}${count > 1999 ? " or more" : ""} photo${count > 1 ? "s" : ""}`; // more are not counted

// Views

const VIEWS = { home: showHome, photos: showPhotos, run: showRun };

async function open() {
  const [wanted, ...rest] = location.hash.slice(1).split("/");
  const name = wanted in VIEWS ? wanted : "home";
  const path = rest.length ? decodeURIComponent(rest.join("/")) : "";
  clearTimeout(timer);
  shown += 1;
  say("");
  for (const one of Object.keys(VIEWS)) byId(one).hidden = true;
  byId("back").hidden = name === "home";
  const view = shown;
  try {
    await VIEWS[name](path, view);
    if (view === shown) byId(name).hidden = false;
  } catch (error) {
    byId("about").textContent = "";
    say(error.message);
  }
}

function headline(title, about) {
  const isNew = byId("title").textContent !== title;
  byId("title").textContent = title;
  byId("about").textContent = about;
  document.title = `${title} – Fieldmark`;
  if (isNew && location.hash) byId("title").focus(); // a screen reader says where we are
}

function later(view, milliseconds) {
  timer = setTimeout(() => view().catch((error) => { say(error.message); later(view, 5000); }), milliseconds);
}

// Folders, and trainings so far

async function showHome(path, view) {
  const found = await ask("list_folder", { path });
  if (view !== shown) return;
  headline("Fieldmark", `Trains a model that names your photos. Photos are looked for in ${found.root}.`);
  const refresh = async () => {
    const runs = await ask("list_runs");
    if (view !== shown) return;
    fill(byId("trainings"), runs.map(trainingRow));
    if (runs.some(({ state }) => state === "running" || state === "queued")) later(refresh, 3000);
  };
  await refresh();
  const parts = found.path === "." ? [] : found.path.split("/");
  byId("crumbs").replaceChildren(...["", ...parts].map((part, place) => {
    const name = part || baseName(found.root) || found.root;
    return make("li", {}, place === parts.length ? make("strong", {}, name)
      : make("a", { href: link("home", parts.slice(0, place).join("/")) }, name));
  }));
  byId("samples").replaceChildren(...found.samples.map((photo) => make("li", {}, picture(photo, photo))));
  byId("folders").replaceChildren(...found.folders.map((folder) => make("li", {}, make("a", { href: link("home", folder.path) },
    baseName(folder.path), make("span", { className: "note" }, folder.photos ? photoCount(folder.photos) : "")))));
  byId("no-folders").hidden = found.folders.length > 0;
  byId("use").hidden = !found.folders.length;
  byId("use").href = link("photos", found.path);
}

function trainingRow(run) {
  const { state, summary } = run;
  const right = summary.val?.top1 ?? summary.history?.at(-1)?.top1;
  const words = [STATES[state], state === "running" ? timeLeft(run) : "",
    right === undefined || right === null ? "" : `${percent(right)} right`].filter(Boolean).join(", ");
  return make("li", {}, make("a", { href: link("run", run.name), className: state }, run.name,
    make("span", { className: "note" }, `${words}`)));
}

// What is in the photos, and how long to train

async function showPhotos(path, view, isNew = true) {
  const { is_done: isDone, said, found } = await ask("check", { posts: true, path, is_new: isNew });
  if (view !== shown) return;
  headline(path === "." ? "All folders" : baseName(path), path);
  byId("checking").hidden = isDone;
  byId("checked").hidden = !found;
  if (!isDone) {
    const [, done, total] = said.findLast((line) => line.startsWith("check: "))?.match(/(\d+)\/(\d+)/) ?? [];
    if (total) Object.assign(byId("check-bar"), { max: total, value: done });
    return later(() => showPhotos(path, view, false), 1000);
  }
  if (!found) return say(said.join("\n").trim() || "The check was broken off: look at the photos again.");
  showChecked(path, found);
  if (!found.must_fix.length) showPlan(path, found, said.join("\n"), (await ask("list_runs")).filter(({ data }) => data === path));
}

function showChecked(path, found) {
  const at = (photo) => (path === "." ? photo : `${path}/${photo}`);
  const list = (texts) => texts.map((text) => make("li", {}, text));
  const total = (counts) => Object.values(counts).reduce((sum, count) => sum + count, 0);
  const classes = Object.entries(found.counts);
  byId("about").textContent = `${found.num_photos} photos, ${classes.length} classes.`;
  fill(byId("must"), list(found.must_fix));
  fill(byId("warnings"), list(found.warnings));
  fill(byId("broken"), list(found.broken.slice(0, 50).map(({ path: photo, reason }) => `${photo}: ${reason}`)));
  const alike = [ // a file with two labels is among the doubles too
    ...found.conflicting_labels.map(([first, second]) => [first, second, "The same file with two labels"]),
    ...found.exact_duplicates.map(([first, second]) => [first, second, "The same file twice"]),
    ...found.near_duplicates.map((pair) => [pair.path, pair.other_path,
      `Alike, in ${pair.split} and ${pair.other_split}`]),
  ];
  const isFirst = ([first, second], place) => alike.findIndex((one) => one[0] === first && one[1] === second) === place;
  fill(byId("alike"), alike.filter(isFirst).slice(0, 12).map(([first, second, why]) => make("li", {}, make("h3", {}, why),
    make("div", { className: "two" }, ...[first, second].map((photo) => make("figure", {}, picture(at(photo), photo),
      make("figcaption", {}, photo)))))));
  byId("reading").textContent = found.reading;
  byId("class-list").replaceChildren(...classes.map(([name, counts]) => make("li", {},
    make("h3", {}, `${readable(name)}: ${total(counts)} photos`),
    make("div", {}, ...(found.samples[name] ?? []).map((photo) => picture(at(photo), `A photo of ${readable(name)}`))))));
  byId("start").hidden = found.must_fix.length > 0;
}

function showPlan(path, { plan: { floor, race, probe, least_epochs: leastEpochs } }, said, runs) {
  const slider = byId("minutes");
  const usual = Number(said.match(/: ([\d.]+) minutes on this machine/)?.[1]);
  const [cheapest, ...others] = [...said.matchAll(/a head on all photos takes (\d+) s/g)].map((found) => Number(found[1]));
  byId("start").hidden = !usual;
  if (!usual) return say(said.trim()); // without weights there is nothing to train
  slider.max = CHOICES.length - 1;
  slider.value = Math.max(CHOICES.findIndex((minutes) => minutes >= usual), 0);
  const update = () => {
    const minutes = CHOICES[slider.value];
    const text = minutes < 60 ? `${minutes} minute${minutes > 1 ? "s" : ""}` : `${minutes / 60} hour${minutes > 60 ? "s" : ""}`;
    const end = new Date(Date.now() + 60000 * minutes).toLocaleTimeString([], { hour: "2-digit", minute: "2-digit" });
    const seconds = 60 * minutes;
    const epochs = (seconds * (1 - race)) / (3 * cheapest);
    const isTuned = epochs >= leastEpochs;
    let left = seconds * (isTuned ? race : probe) - cheapest - 15; // about what the start takes
    const fitting = others.filter((needed) => (left -= needed) > 0).length;
    byId("shown-minutes").textContent = text;
    slider.setAttribute("aria-valuetext", text);
    byId("plan").replaceChildren(...[
      `After about ${duration(15 + Math.min(seconds * floor, cheapest))} a first model answers. From then on you can stop at any time.`,
      fitting ? `Then it is compared with ${fitting} larger network${fitting > 1 ? "s" : ""}, and other sizes of the pictures.`
        : "There is time for one network only, perhaps not on all photos.",
      !isTuned ? "There is too little time for fine-tuning." : `The rest, enough for about ${Math.round(epochs)} rounds over the photos, goes into fine-tuning.`,
      `It ends at ${end}, or after the trainings before it.`,
    ].map((step) => make("li", {}, step)));
  };
  slider.oninput = update;
  update();
  const known = runs.filter(({ summary }) => summary.val?.top1_interval).slice(0, 3).map(({ minutes, summary }) =>
    `${minutes} min gave ${percent(summary.val.top1)} (${summary.val.top1_interval.map(percent).join(" to ")})`);
  byId("before").textContent = known.length ? `With these photos, ${known.join("; ")}.`
    : `How right it will be is known from the first model on. ${Math.round(usual)} minutes suit this machine.`;
  const mended = runs.find((run) => run.is_mended)?.name; // the latest
  byId("mended-row").hidden = !mended;
  byId("mended-row").querySelector("span").textContent = `With the labels that were mended after ${mended}`;
  byId("train").onclick = async () => {
    byId("train").disabled = true; // a second press is no second training
    try {
      const { name } = await ask("ask", { posts: true, path, minutes: CHOICES[slider.value],
        is_single: byId("single").checked, mended: mended && byId("mended").checked ? mended : "" });
      location.hash = link("run", name);
    } catch (error) {
      say(error.message);
    }
    byId("train").disabled = false;
  };
}

// One training

async function showRun(name, view) {
  const run = await ask("describe", { name });
  if (view !== shown) return;
  const { state, summary } = run;
  const isOpen = state === "running" || state === "queued";
  say("");
  headline(name, `${run.minutes} min on ${run.data === "." ? "all folders" : run.data}: ${STATES[state]}.`);
  byId("live").hidden = !isOpen;
  const doing = state === "queued" ? "Waits until the training before it ends." : doingNow(run);
  if (byId("doing").textContent !== doing) byId("doing").textContent = doing; // is read out
  byId("left").textContent = state === "queued" ? "" : timeLeft(run);
  byId("time").value = state === "queued" ? 0 : Math.min(1 - run.left / (60 * run.minutes), 1);
  byId("stop").textContent = state === "queued" ? "Take it out of the queue"
    : run.has_model ? "Stop, and keep the best so far" : "Stop";
  byId("stop").onclick = async () => {
    byId("stop").disabled = true;
    try {
      await ask("stop", { posts: true, name });
      if (state === "queued") location.hash = "";
      else say("It stops as soon as its best model is complete.");
    } catch (error) {
      say(error.message);
    }
    byId("stop").disabled = false;
  };
  byId("printed").hidden = state !== "failed";
  byId("printed").textContent = run.printed.join("\n").trim() || "It ended before there was a model.";
  showAnswer(run, isOpen);
  byId("log").hidden = !run.log.length;
  byId("log").querySelector("pre").textContent = run.log.join("\n");
  fill(byId("next"), isOpen || !run.accuracy ? [] : nextSteps(run));
  byId("uses").hidden = !run.has_model;
  byId("try").href = `try/${name}/`;
  byId("review").hidden = byId("again").hidden = isOpen;
  byId("review").href = `review/${name}/`;
  byId("again").href = link("photos", run.data);
  showTaking(run, isOpen);
  showExamples(run.examples ?? []);
  const isBusy = isOpen || run.exports.some((one) => !one.is_there && !one.said.length);
  if (isBusy) later(() => showRun(name, view), 2000);
  if (run.accuracy && !isOpen && byId("confused").dataset.run !== name) showConfused(name, view);
}

// The photos of the classes that are confused, as the review of the run has them.
async function showConfused(name, view) {
  const section = byId("confused");
  section.dataset.run = name;
  fill(section, []);
  const get = async (path) => {
    const response = await fetch(`review/${name}/api/${path}`);
    const content = await response.json();
    if (!response.ok) throw new Error(content.detail);
    return content;
  };
  try {
    const { pairs } = await get("overview");
    const pages = await Promise.all(pairs.slice(0, 6).map((_, which) => get(`photos?view=pair&which=${which}&limit=4`)));
    if (view !== shown) return;
    fill(section, pages.map(({ photos, total }, which) => make("li", {},
      make("h3", {}, `${readable(pairs[which].first)} – ${readable(pairs[which].second)}: ${total}`),
      make("div", { className: "two" }, ...photos.map((photo) => {
        const image = make("img", { alt: `Photo of ${readable(photo.label)}` });
        image.src = `review/${name}/photo/${photo.number}`;
        return make("figure", {}, image, make("figcaption", { className: "wrong" },
          `✗ ${readable(photo.guess)}, ${percent(photo.probability)} – is ${readable(photo.label)}`));
      })))));
  } catch (error) {
    section.dataset.run = "";
    if (view === shown) say(`Confused classes cannot be shown: ${error.message}`);
  }
}

function showTaking(run, isOpen) {
  const { name } = run;
  byId("take").hidden = isOpen || !run.has_model;
  byId("export").hidden = run.is_ensemble;
  byId("several").hidden = !run.is_ensemble;
  byId("download").href = `download/${name}`;
  const rows = run.exports.map(({ to, is_there: isThere, said }) => make("li", {}, isThere
    ? make("a", { href: `download/${name}?to=${to}`, download: "" }, `Download ${to}`) : `${to}: ${said[0] ?? "is made …"}`));
  if (byId("exports").textContent !== rows.map((row) => row.textContent).join("")) byId("exports").replaceChildren(...rows);
  byId("make").onclick = async () => {
    try {
      await ask("export", { posts: true, name, to: byId("to").value });
      open();
    } catch (error) {
      say(error.message);
    }
  };
}

// Photos that are dropped, or chosen

const PIECE = 2 ** 23;

async function send(file, to, path) {
  let place;
  for (let offset = 0; offset === 0 || offset < file.size; offset += PIECE) {
    const words = new URLSearchParams({ to, path, offset, is_last: offset + PIECE >= file.size });
    const response = await fetch(`api/add?${words}`, { method: "POST", body: file.slice(offset, offset + PIECE),
      headers: { "Content-Type": "application/octet-stream" } });
    const content = await response.json();
    if (!response.ok) throw new Error(content.detail);
    place = content.path;
  }
  return place;
}

let bringing = Promise.resolve(); // one drop after another
function bring(found) { // the fields count as they are now, not when the turn comes
  const [to, label] = ["collection", "label"].map((id) => byId(id).value.trim());
  bringing = bringing.then(() => sendAll(found, to, label));
  return bringing;
}

async function sendAll(found, to, label) { // of [file, class, or "" where the page's field says it]
  const brought = byId("brought");
  let place;
  try {
    if (!to) throw new Error("Give the collection a name first.");
    for (const [number, [file, folder]] of found.entries()) {
      brought.textContent = `${number + 1} of ${found.length}: ${file.name}`;
      const isZip = /\.zip$/i.test(file.name);
      if (!isZip && !folder && !label) throw new Error("Say first what these photos show.");
      place = await send(file, to, isZip ? file.name : `${folder || label}/${file.name}`);
    }
    if (place === undefined) throw new Error("There are no photos in this.");
    brought.replaceChildren(`${found.length === 1 ? found[0][0].name : `${found.length} files`} copied. `,
      make("a", { href: link("home", place) }, `Go to ${place}`));
  } catch (error) {
    brought.textContent = error.message;
  }
}

// The photos in what was dropped, each with the folder that it was in.
async function* walk(entry, folder) {
  if (entry.isFile) yield [await new Promise((resolve, reject) => { entry.file(resolve, reject); }), folder];
  if (!entry.isDirectory) return;
  const reader = entry.createReader();
  for (;;) {
    const part = await new Promise((resolve, reject) => { reader.readEntries(resolve, reject); });
    if (!part.length) return;
    for (const one of part) if (!one.name.startsWith(".")) yield* walk(one, entry.name);
  }
}

for (const name of ["dragover", "drop"]) {
  addEventListener(name, async (event) => {
    event.preventDefault(); // else the browser shows the photo instead of the page
    byId("drop").classList.toggle("over", name === "dragover");
    if (name !== "drop" || byId("home").hidden) return;
    const entries = [...event.dataTransfer.items].map((item) => item.webkitGetAsEntry()).filter(Boolean);
    const found = [];
    for (const entry of entries) for await (const one of walk(entry, "")) found.push(one);
    bring(found.filter(([file]) => /^image\//.test(file.type) || /\.(zip|hei[cf]|dng|nef|cr[23]|arw)$/i.test(file.name)));
  });
}
byId("files").addEventListener("change", async (event) => {
  await bring([...event.target.files].map((file) => [file, ""]));
  event.target.value = "";
});

function doingNow({ doing, has_model }) {
  if (!doing.length) return "Looking at the photos.";
  const { what, value } = JSON.parse(doing[0]);
  const [, verb, key] = what.match(/^(try|all photos of|round of) (.*)$/) ?? [];
  if (verb === "round of") return `Comparing networks on ${key} photos.`;
  if (verb) return value ? `Trying ${key}.` : "Comparing networks.";
  if (what === "fine-tune") return value.length ? `Fine-tuning ${value[0]}.` : "Finishing.";
  return has_model ? "Measuring what there is time for." : "Making a first model.";
}

function showAnswer(run, isOpen) {
  const { accuracy, summary } = run;
  byId("answer").hidden = !accuracy;
  if (!accuracy) return;
  const [right, low, high] = accuracy;
  byId("answer-title").textContent = isOpen ? "If it ended now" : "The model";
  byId("accuracy").textContent = `${percent(right)} right`;
  byId("kept").textContent = `On ${run.num_val} photos it did not learn from; with 95\u00a0% confidence between ${percent(low)} `
    + `and ${percent(high)} on photos like these. Kept: ${summary.kept}.`;
  const rows = (summary.history ?? []).filter(({ top1 }) => top1 !== null);
  byId("curve").replaceChildren(...(rows.length > 1 ? curve(rows, run) : []));
}

// How right the model that would be kept was, against the time.
function curve(rows, { minutes, left, state }) {
  const space = "http://www.w3.org/2000/svg";
  const svg = document.createElementNS(space, "svg");
  const end = Math.max(60 * minutes, rows.at(-1).seconds);
  const values = rows.map(({ top1 }) => top1);
  const [low, high] = [Math.min(...values), Math.max(...values)];
  const y = (value) => 95 - (90 * (value - low)) / (high - low || 1);
  const points = rows.flatMap(({ seconds, top1 }, place) => {
    const x = (100 * seconds) / end;
    return [...(place ? [`${x},${y(rows[place - 1].top1)}`] : []), `${x},${y(top1)}`];
  });
  const now = state === "running" ? end - Math.max(left, 0) : Math.max(rows.at(-1).seconds, 0);
  points.push(`${(100 * now) / end},${y(values.at(-1))}`);
  svg.setAttribute("viewBox", "0 0 100 100");
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("role", "img");
  svg.setAttribute("aria-label", rows.map(({ seconds, top1 }) => `${percent(top1)} after ${duration(seconds)}`).join(", "));
  for (const [tag, attributes] of [["line", { x1: 0, y1: 100, x2: 100, y2: 100 }], ["polyline", { points: points.join(" ") }]]) {
    const shape = document.createElementNS(space, tag);
    for (const [key, value] of Object.entries(attributes)) shape.setAttribute(key, value);
    svg.append(shape);
  }
  return [make("p", {}, `${percent(low)} to ${percent(high)}`), svg, make("p", {}, make("span", {}, "0"), make("span", {}, duration(end)))];
}

function answered({ path, label, guess, probability }) {
  const isRight = label === guess;
  const says = `${readable(guess)}, ${percent(probability)}`;
  return make("figure", {}, picture(path, `Photo of ${readable(label)}`),
    make("figcaption", { className: isRight ? "" : "wrong" }, isRight ? `✓ ${says}` : `✗ ${says} – is ${readable(label)}`));
}

function showExamples(examples) {
  const section = byId("some");
  const known = [...section.querySelectorAll("li")];
  if (known.map(({ path }) => path).join("\n") !== examples.map(({ path }) => path).join("\n")) {
    return fill(section, examples.map((one) => Object.assign(make("li", {}, answered(one)), { path: one.path })));
  }
  // The pictures stay, what is said of them changes.
  examples.forEach((one, place) => known[place].querySelector("figcaption").replaceWith(answered(one).lastElementChild));
}

function nextSteps({ summary, accuracy, num_val }) {
  const steps = [];
  const more = summary.val?.more_time;
  if (more) {
    steps.push(more.second_half_earned > 0.005
      ? `Train for longer: the second half of the time gave ${(100 * more.second_half_earned).toFixed(1)} points; as much again may give about that.`
      : "More time will hardly help: the second half of it gave next to nothing. More photos will.");
  }
  if (accuracy[2] - accuracy[1] > 0.1) {
    steps.push(`How right it is is known only roughly, from ${num_val} photos: more photos make that sure, too.`);
  }
  if (summary.val?.optimistic_bias > 0.002) {
    steps.push(`Expect ${(100 * summary.val.optimistic_bias).toFixed(1)} points less on new photos: these chose among the models.`);
  }
  return steps.map((step) => make("li", {}, step));
}

addEventListener("hashchange", open);
open();
