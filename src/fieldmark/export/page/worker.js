// The model, apart from the page, so that the page stays at hand while it computes.
import { describe, findProbabilities } from "./answers.js";
import { makePicture } from "./picture.js";

const SLOW_SECONDS = 0.15; // a photo by WebAssembly; above it WebGPU is tried
const wanted = new URLSearchParams(self.location.search).get("runtime"); // "wasm" or "webgpu", for comparisons
let about;
let runtime;

async function download(path, what) {
  const response = await fetch(new URL(path, import.meta.url));
  if (!response.ok) throw new Error(`${path} is missing on the server (${response.status})`);
  const total = Number(response.headers.get("content-length"));
  const parts = [];
  let length = 0;
  for (const reader = response.body.getReader(); ;) {
    const { done, value } = await reader.read();
    if (done) break;
    parts.push(value);
    length += value.length;
    if (what) postMessage({ doing: `Loading ${what} …${total ? ` ${Math.round((100 * length) / total)}\u00a0%` : ""}` });
  }
  return new Blob(parts);
}

async function unpack(blob) {
  const start = new Uint8Array(await blob.slice(0, 2).arrayBuffer());
  if (start[0] !== 0x1f || start[1] !== 0x8b) return blob; // the server said that it is packed, and the browser unpacked it
  return new Response(blob.stream().pipeThrough(new DecompressionStream("gzip"))).blob();
}

async function openRuntime(name, model) {
  const [{ default: ort }, compiled] = await Promise.all([
    import(`./runtime/${name}.js`),
    download(`runtime/${name}.bin`, "what runs it").then(unpack),
  ]);
  postMessage({ doing: "Starting the model …" });
  ort.env.logLevel = "error";
  // Threads need headers (Cross-Origin-Opener-Policy, -Embedder-Policy) that plain servers do not send.
  ort.env.wasm.numThreads = self.crossOriginIsolated ? Math.min(4, navigator.hardwareConcurrency || 1) : 1;
  ort.env.wasm.wasmPaths = { mjs: new URL(`runtime/${name}-loader.js`, import.meta.url).href };
  ort.env.wasm.wasmBinary = await compiled.arrayBuffer();
  const session = await ort.InferenceSession.create(model, { executionProviders: [name], logSeverityLevel: 3 });
  const { size } = about.preprocessing;
  const run = async (picture) => {
    const { logits } = await session.run({ images: new ort.Tensor("float32", picture, [1, 3, size, size]) });
    return logits.getData();
  };
  const probe = makeProbe();
  let logits;
  let seconds = Infinity;
  // The first ones take longer: what they compute is still being compiled.
  for (let count = 0, start = performance.now(); count < 2 || performance.now() - start < 600; count++) {
    const before = performance.now();
    logits = await run(probe);
    seconds = Math.min(seconds, (performance.now() - before) / 1000);
  }
  const expected = about.evidence.browser.logits;
  const largest = Math.max(...expected.map(Math.abs));
  const difference = Math.max(...expected.map((value, number) => Math.abs(value - logits[number]))) / largest;
  return { name, run, seconds, difference, release: () => session.release() };
}

// A picture of numbers, the same everywhere: what it gives was computed when the model was exported.
function makeProbe() {
  const [width, height] = [300, 200];
  const byte = (number) => Math.imul(number, 2654435761) >>> 24;
  const read = (top, rows) => {
    const pixels = new Uint8ClampedArray(rows * width * 4);
    for (let place = 0; place < rows * width; place++) {
      for (let channel = 0; channel < 3; channel++) pixels[place * 4 + channel] = byte((top * width + place) * 3 + channel);
    }
    return pixels;
  };
  return makePicture(read, width, height, about.preprocessing);
}

async function open() {
  about = JSON.parse(await (await download("../fieldmark.json")).text());
  const model = new Uint8Array(await (await download(`../${about.file}`, "the model")).arrayBuffer());
  const agrees = ({ difference }) => difference <= about.evidence.browser.limit;
  runtime = await openRuntime(wanted || "wasm", model);
  if (!wanted && runtime.seconds > SLOW_SECONDS && about.precision !== "int8" && (await hasGraphics())) {
    const other = await openRuntime("webgpu", model).catch(() => null);
    const isBetter = other && agrees(other) && other.seconds < runtime.seconds;
    (isBetter ? runtime : other)?.release();
    if (isBetter) runtime = other;
  }
  if (!agrees(runtime)) {
    throw new Error("this browser computes other answers than the model that was exported; try another browser");
  }
  return { about, runtime: { name: runtime.name, seconds: runtime.seconds, difference: runtime.difference } };
}

async function hasGraphics() {
  const adapter = await navigator.gpu?.requestAdapter().catch(() => null);
  // One that computes on the processor would be slower than WebAssembly.
  return Boolean(adapter) && !adapter.info?.isFallbackAdapter && !adapter.isFallbackAdapter;
}

async function answer(file) {
  if (!file.size) return fail("is empty (0 bytes)");
  let photo;
  try {
    photo = await createImageBitmap(file, { imageOrientation: "from-image", colorSpaceConversion: "none" });
  } catch {
    return fail("is not an image that this browser reads");
  }
  const { width, height } = photo;
  try {
    if (width * height > about.max_pixels) {
      return fail(`has ${width * height} pixels, more than the limit ${about.max_pixels}`);
    }
    const picture = makePicture(readRows(photo), width, height, about.preprocessing);
    const logits = await runtime.run(picture);
    if (!logits.every(Number.isFinite)) return fail("has no answer: the model's output is not finite");
    return describe(findProbabilities(logits, about.temperature), about, 5);
  } finally {
    photo.close();
  }
}

const fail = (problem) => ({ label: null, is_unknown: true, group: null, top: [], problem, attention: null, seen: null });

function readRows(photo) {
  let context;
  return (top, rows) => {
    if (!context || context.canvas.height !== rows) {
      context = new OffscreenCanvas(photo.width, rows).getContext("2d", { alpha: false, willReadFrequently: true });
    }
    context.fillStyle = `rgb(${about.background})`;
    context.fillRect(0, 0, photo.width, rows);
    context.drawImage(photo, 0, -top);
    return context.getImageData(0, 0, photo.width, rows).data;
  };
}

async function reply({ id, files }) {
  try {
    const photos = [];
    for (const file of files || []) photos.push(await answer(file));
    postMessage({ id, result: files ? photos : await open() });
  } catch (error) {
    postMessage({ id, problem: `the model could not ${files ? "answer" : "be opened"}: ${error.message || error}` });
  }
}

let last = Promise.resolve(); // one after another: photos that come early wait for the model
onmessage = ({ data }) => {
  last = last.then(() => reply(data));
};
