// Elements and numbers, as the rest of the page writes them.

/** Makes an element: attributes by name, "on…" as listeners, children as elements or text. */
export function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return element;
}

const known = (value) => value !== null && value !== undefined && Number.isFinite(value);

/** A duration in ms with three significant digits; in seconds from 10 s on, in µs below 0.1 ms. */
export function duration(seconds) {
  if (!known(seconds)) return "–";
  const size = Math.abs(seconds);
  if (size >= 10) return `${seconds.toFixed(1)} s`;
  if (size > 0 && size < 1e-4) return `${(seconds * 1e6).toPrecision(2)} µs`;
  return `${millis(seconds)} ms`;
}

/** The number of ms alone, for places where the unit stands above. */
export function millis(seconds) {
  if (!known(seconds)) return "–";
  const value = seconds * 1e3;
  const size = Math.abs(value);
  return value.toFixed(size >= 100 ? 0 : size >= 10 ? 1 : size > 0 ? 2 : 0);
}

/** A moment or a difference to the µs, for tooltips. */
export const exact = (seconds) => `${(seconds * 1e3).toFixed(3)} ms`;

export function percent(share) {
  if (!known(share)) return "–";
  const value = share * 100;
  return `${value.toFixed(Math.abs(value) < 9.95 && value !== 0 ? 1 : 0)} %`;
}

/** A relative difference with its sign. */
export function signedPercent(share) {
  return known(share) ? `${share < 0 ? "−" : "+"}${(Math.abs(share) * 100).toFixed(1)} %` : "–";
}

export function signed(value, text) {
  return known(value) ? `${value < 0 ? "−" : "+"}${text(Math.abs(value))}` : "–";
}

export function bytes(size) {
  if (!known(size)) return "–";
  const value = Math.abs(size);
  if (value >= 10e9) return `${(size / 1e9).toFixed(1)} GB`;
  if (value < 0.1e6) return `${(size / 1e3).toFixed(1)} kB`;
  return `${(size / 1e6).toFixed(value >= 100e6 ? 0 : 1)} MB`;
}

export function count(number) {
  if (!known(number)) return "–";
  if (Math.abs(number) < 10000) return String(number);
  const [size, unit] = Math.abs(number) >= 999.5e6 ? [1e9, "G"] : Math.abs(number) >= 999.5e3 ? [1e6, "M"] : [1e3, "k"];
  return `${Number((number / size).toPrecision(3))} ${unit}`;
}

/** "embed … h2 (4)": the first and last of several layers. */
export function layerRange(layers) {
  if (!layers || !layers.length) return "–";
  return layers.length === 1 ? layers[0] : `${layers[0]} … ${layers[layers.length - 1]} (${layers.length})`;
}
