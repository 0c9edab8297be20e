// Heat over a picture: a coarse grid of numbers as a smooth coloured layer.

// From nothing over red to yellow; lightness rises all the way, so that it also reads without colours.
const STOPS = [
  [0.0, [60, 0, 70, 0.0]],
  [0.25, [120, 10, 110, 0.45]],
  [0.5, [215, 50, 60, 0.75]],
  [0.75, [250, 140, 20, 0.9]],
  [1.0, [255, 240, 130, 1.0]],
];

/** Colour [r, g, b, alpha] of a value from 0 to 1. */
function colourOf(value) {
  const above = STOPS.findIndex(([at]) => at >= value);
  if (above <= 0) return STOPS[0][1];
  const [from, low] = STOPS[above - 1], [to, high] = STOPS[above];
  const fraction = (value - from) / (to - from);
  return low.map((channel, number) => channel + fraction * (high[number] - channel));
}

/** The colours as a CSS gradient. */
export function rampGradient() {
  const stops = STOPS.map(([at, [r, g, b, alpha]]) => `rgb(${r} ${g} ${b} / ${alpha}) ${100 * at}%`);
  return `linear-gradient(to right, ${stops.join(", ")})`;
}

export function clearHeat(canvas, label) {
  canvas.setAttribute("aria-label", label);
  canvas.getContext("2d").clearRect(0, 0, canvas.width, canvas.height);
}

const PIXELS_PER_PATCH = 16;

/** Draw values [height * width], row by row from the top of the picture; colours go from `least` to `most`. */
export function drawHeat(canvas, values, { height, width }, { least, most, opacity, label }) {
  canvas.width = width * PIXELS_PER_PATCH;
  canvas.height = height * PIXELS_PER_PATCH;
  clearHeat(canvas, label);
  const context = canvas.getContext("2d");
  const pixels = context.createImageData(canvas.width, canvas.height);
  for (let y = 0; y < canvas.height; y++) {
    for (let x = 0; x < canvas.width; x++) {
      const value = most > least ? (interpolated(values, height, width, y, x) - least) / (most - least) : 0;
      const [red, green, blue, alpha] = colourOf(Math.min(1, value));
      pixels.data.set([red, green, blue, 255 * alpha * opacity], 4 * (y * canvas.width + x));
    }
  }
  context.putImageData(pixels, 0, 0);
}

/** Value at a pixel between the centres of the four patches around it: numbers are smoothed, not colours. */
function interpolated(values, height, width, y, x) {
  const place = (pixel, size) => {
    const at = Math.min(size - 1, Math.max(0, (pixel + 0.5) / PIXELS_PER_PATCH - 0.5));
    const first = Math.min(Math.floor(at), Math.max(0, size - 2));
    return [first, Math.min(first + 1, size - 1), at - first];
  };
  const [top, bottom, down] = place(y, height), [left, right, across] = place(x, width);
  const row = (number) => values[number * width + left] * (1 - across) + values[number * width + right] * across;
  return row(top) * (1 - down) + row(bottom) * down;
}
