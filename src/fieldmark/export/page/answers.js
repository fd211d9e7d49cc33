// From logits to the answer that `fieldmark serve` gives. Letters: K classes; `about` is fieldmark.json.

const NONE = "_none"; // the class of photos that show none of the classes: never named

// (K,) probabilities: the softmax of the logits over the temperature.
export function findProbabilities(logits, temperature) {
  const scaled = Array.from(logits, (logit) => logit / temperature);
  const most = Math.max(...scaled);
  const shares = scaled.map((value) => Math.exp(value - most));
  const sum = shares.reduce((total, share) => total + share, 0);
  return shares.map((share) => share / sum);
}

export function describe(probabilities, { classes, threshold, back_off }, count) {
  const top = classes
    .map((label, number) => ({ label, probability: probabilities[number] }))
    .filter(({ label }) => label !== NONE)
    .sort((one, other) => other.probability - one.probability); // stable: equals keep the order of classes
  const isNone = top[0].probability < Math.max(...probabilities);
  const is_unknown = isNone || top[0].probability < threshold;
  const group = is_unknown && !isNone && back_off ? findGroup(probabilities, classes, back_off) : null;
  const label = is_unknown ? null : top[0].label;
  return { label, is_unknown, group, top: top.slice(0, count), problem: null, attention: null, seen: null };
}

// The finest group of the taxonomy whose classes together are sure enough.
function findGroup(probabilities, classes, { levels, rows, thresholds }) {
  for (let level = 0; level < levels.length; level++) {
    const sums = new Map();
    rows.forEach((names, number) => {
      if (classes[number] === NONE) return;
      sums.set(names[level], (sums.get(names[level]) || 0) + probabilities[number]);
    });
    const [name, probability] = [...sums].reduce((best, one) => (one[1] > best[1] ? one : best));
    if (thresholds[level] !== null && probability >= thresholds[level]) return { level: levels[level], name, probability };
  }
  return null;
}
