// From an upright photo to the picture that the model sees: the numbers of Pillow's resize and torchvision's crop and
// normalization, to the last bit. Letters: S side of the picture; k taps of the filter.
// Source: Pillow, src/libImaging/Resample.c: antialiased, coefficients of 22 bits, 8 bits in between.

const BITS = 22;
const HALF = 1 << (BITS - 1); // so that cutting off the bits rounds
const FILTERS = {
  bilinear: { support: 1, weigh: (x) => Math.max(0, 1 - Math.abs(x)) },
  bicubic: {
    support: 2,
    weigh: (distance) => {
      const x = Math.abs(distance);
      if (x < 1) return (1.5 * x - 2.5) * x * x + 1;
      return x < 2 ? (((x - 5) * x + 8) * x - 4) * -0.5 : 0;
    },
  },
};

// The sides of the resized photo, and the corner of the square that is cut out of it.
export function layOut(width, height, { transform, size, crop_fraction }) {
  if (transform === "squash") return { width: size, height: size, left: 0, top: 0 };
  const short = Math.trunc(size / crop_fraction);
  const long = Math.trunc((short * Math.max(width, height)) / Math.min(width, height));
  const [wide, high] = width <= height ? [short, long] : [long, short];
  return { width: wide, height: high, left: roundHalfToEven((wide - size) / 2), top: roundHalfToEven((high - size) / 2) };
}

const roundHalfToEven = (value) => (value % 1 === 0.5 ? 2 * Math.round(value / 2) : Math.round(value));

// For `count` outputs from `start` on: where their inputs begin, how many they are, and (count, k) whole weights.
function findWeights(inputs, outputs, start, count, { support, weigh }) {
  const scale = inputs / outputs;
  const stretch = Math.max(1, scale);
  const reach = support * stretch;
  const taps = 2 * Math.ceil(reach) + 1;
  const first = new Int32Array(count);
  const length = new Int32Array(count);
  const weights = new Int32Array(count * taps);
  for (let row = 0; row < count; row++) {
    const center = (start + row + 0.5) * scale;
    const from = Math.max(0, Math.trunc(center - reach + 0.5));
    const found = [];
    for (let x = from; x < Math.min(inputs, Math.trunc(center + reach + 0.5)); x++) {
      found.push(weigh((x - center + 0.5) * (1 / stretch)));
    }
    const sum = found.reduce((total, weight) => total + weight, 0);
    found.forEach((weight, tap) => {
      const share = (sum === 0 ? weight : weight / sum) * (1 << BITS);
      weights[row * taps + tap] = Math.trunc(share < 0 ? share - 0.5 : share + 0.5);
    });
    first[row] = from;
    length[row] = found.length;
  }
  return { taps, first, length, weights };
}

const clip = (sum) => Math.min(255, Math.max(0, sum >> BITS));

// Pillow 13 begins with the columns where that takes away more than twice as many rows as columns would go otherwise.
const beginsWithColumns = (width, height, resized) =>
  height - resized.height > 2 * Math.max(0, width - resized.width);

// (3, S, S) normalized, as a Float32Array. `read(top, rows)` gives rows of the photo as RGBA, 4 bytes a pixel: a large
// photo is never whole in memory.
export function makePicture(read, width, height, spec) {
  const { size, mean, std } = spec;
  const filter = FILTERS[spec.interpolation];
  const resized = layOut(width, height, spec);
  const across = findWeights(width, resized.width, resized.left, size, filter);
  const down = findWeights(height, resized.height, resized.top, size, filter);
  const resize = beginsWithColumns(width, height, resized) ? resizeColumnsFirst : resizeRowsFirst;
  const bytes = resize(readInStrips(read, width, down), across, down, size);
  const picture = new Float32Array(3 * size * size);
  for (let channel = 0; channel < 3; channel++) {
    const values = Float32Array.from({ length: 256 }, (_, byte) =>
      Math.fround(Math.fround(byte / 255) - Math.fround(mean[channel])) / Math.fround(std[channel]));
    for (let place = 0; place < size * size; place++) {
      picture[channel * size * size + place] = values[bytes[place * 3 + channel]];
    }
  }
  return picture;
}

const endOf = ({ first, length }) => first[first.length - 1] + length[length.length - 1];

// The rows that are needed, one after another: their number, RGBA, and where in it the row begins.
function* readInStrips(read, width, down) {
  const most = Math.max(1, Math.floor(2 ** 20 / width));
  for (let top = down.first[0]; top < endOf(down); top += most) {
    const rows = Math.min(most, endOf(down) - top);
    const pixels = read(top, rows);
    for (let row = 0; row < rows; row++) yield [top + row, pixels, row * width * 4];
  }
}

// (S, S, 3) bytes, rows first.
function resizeRowsFirst(strips, across, down, size) {
  const begin = down.first[0];
  const narrow = new Uint8Array((endOf(down) - begin) * size * 3);
  for (const [number, pixels, start] of strips) squeezeRow(pixels, start, 4, across, size, narrow, (number - begin) * size * 3);
  const bytes = new Uint8Array(size * size * 3);
  for (let y = 0; y < size; y++) {
    for (let x = 0; x < size * 3; x++) {
      let sum = HALF;
      let place = (down.first[y] - begin) * size * 3 + x;
      for (let tap = y * down.taps; tap < y * down.taps + down.length[y]; tap++, place += 3 * size) {
        sum += narrow[place] * down.weights[tap];
      }
      bytes[y * size * 3 + x] = clip(sum);
    }
  }
  return bytes;
}

// (S, S, 3) bytes, columns first.
function resizeColumnsFirst(strips, across, down, size) {
  const end = endOf(across); // columns after it are not needed
  const sums = new Int32Array(size * end * 3).fill(HALF);
  for (const [number, pixels, start] of strips) {
    for (let y = 0; y < size; y++) {
      const tap = number - down.first[y];
      if (tap < 0 || tap >= down.length[y]) continue;
      const weight = down.weights[y * down.taps + tap];
      for (let x = 0, from = start, to = y * end * 3; x < end; x++, from += 4, to += 3) {
        sums[to] += pixels[from] * weight;
        sums[to + 1] += pixels[from + 1] * weight;
        sums[to + 2] += pixels[from + 2] * weight;
      }
    }
  }
  const low = Uint8Array.from(sums, clip);
  const bytes = new Uint8Array(size * size * 3);
  for (let y = 0; y < size; y++) squeezeRow(low, y * end * 3, 3, across, size, bytes, y * size * 3);
  return bytes;
}

// A row of pixels, each of so many bytes, to one of `size` RGB pixels.
function squeezeRow(pixels, start, step, across, size, out, begin) {
  for (let x = 0; x < size; x++) {
    let red = HALF;
    let green = HALF;
    let blue = HALF;
    let place = start + across.first[x] * step;
    for (let tap = x * across.taps; tap < x * across.taps + across.length[x]; tap++, place += step) {
      const weight = across.weights[tap];
      red += pixels[place] * weight;
      green += pixels[place + 1] * weight;
      blue += pixels[place + 2] * weight;
    }
    out[begin + x * 3] = clip(red);
    out[begin + x * 3 + 1] = clip(green);
    out[begin + x * 3 + 2] = clip(blue);
  }
}
