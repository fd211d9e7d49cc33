"use strict";

// What the page asks of a server, answered by a worker on this device: the same questions, the same answers.
globalThis.askModel = (() => {
  const waiting = new Map();
  let worker;
  let about;

  const ask = (question) => new Promise((resolve, reject) => {
    const id = waiting.size ? Math.max(...waiting.keys()) + 1 : 1;
    waiting.set(id, { resolve, reject });
    worker.postMessage({ id, ...question });
  });

  const fail = (reason) => {
    waiting.forEach(({ reject }) => reject(Object.assign(new Error(reason), { reason })));
    waiting.clear();
  };

  function start() {
    worker = new Worker(`static/worker.js${location.search}`, { type: "module" });
    worker.onerror = () => fail("the model could not be opened: the browser is too old, or files are missing");
    worker.onmessage = ({ data: { id, result, problem, doing } }) => {
      if (doing) {
        document.getElementById("about").textContent = doing;
        return;
      }
      const { resolve, reject } = waiting.get(id);
      waiting.delete(id);
      if (problem) reject(Object.assign(new Error(problem), { reason: problem }));
      else resolve(result);
    };
  }

  async function health() {
    if (location.protocol === "file:") {
      const reason = "browsers open this page from a server only: run `python -m http.server` in its folder, "
        + "then open http://localhost:8000";
      throw Object.assign(new Error(reason), { reason });
    }
    start();
    const found = await ask({});
    about = found.about;
    const { top1, top1_interval: interval } = about.metrics.val || {};
    return {
      model: about.run,
      classes: about.classes.length,
      accuracy: interval ? { value: top1, low: interval[0], high: interval[1] } : null,
      is_calibrated: about.temperature !== 1 || about.threshold > 0,
      has_attention: false,
      examples: 0,
      max_photos: 8,
      runtime: found.runtime,
    };
  }

  const answers = {
    health,
    classes: () => ({ classes: about.classes, threshold: about.threshold }),
    predict: async (form) => {
      const photos = await ask({ files: form.getAll("photos") });
      return { model: about.run, threshold: about.threshold, photos };
    },
  };

  document.getElementById("privacy").textContent = "Photos stay on this device: the model answers in this page.";
  document.getElementById("api").remove();
  return async (path, options = {}) => new Response(JSON.stringify(await answers[path.split("?")[0]](options.body)));
})();
