"use strict";

// Where the model looked, on a canvas of one pixel a value: rows of numbers from 0 to 1.
function draw(canvas, rows) {
  canvas.width = rows[0].length;
  canvas.height = rows.length;
  const context = canvas.getContext("2d");
  const pixels = context.createImageData(canvas.width, canvas.height);
  rows.flat().forEach((value, place) => {
    // Dark blue over magenta to yellow: brightness rises all the way, so it reads without color too.
    pixels.data.set([255 * Math.min(1, 1.6 * value), 255 * value ** 2, 255 * (0.35 + 0.4 * value - 0.7 * value ** 3), 255],
      4 * place);
  });
  context.putImageData(pixels, 0, 0);
}
