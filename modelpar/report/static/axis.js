// The time axis that both timelines share, with the names of the columns at its right.

import { h } from "./dom.js";
import { COLUMNS, font } from "./draw.js";
import { scaleOf, ticksOf } from "./layout.js";

const HEIGHT = 30;

export function makeAxis() {
  const canvas = h("canvas", { class: "axis", "aria-hidden": "true", title: "wheel zooms, drag pans" });
  const context = canvas.getContext("2d");
  return {
    canvas,
    /** The moment at some x of the page. */
    seconds(view, clientX) {
      const box = canvas.getBoundingClientRect();
      return scaleOf(view, box.width).seconds(clientX - box.left);
    },
    resize(width) {
      const ratio = window.devicePixelRatio || 1;
      canvas.width = Math.round(width * ratio);
      canvas.height = Math.round(HEIGHT * ratio);
      canvas.style.width = `${width}px`;
      canvas.style.height = `${HEIGHT}px`;
      context.setTransform(ratio, 0, 0, ratio, 0, 0);
    },
    draw(view, whole, colours, width) {
      const scale = scaleOf(view, width);
      context.fillStyle = colours.paper;
      context.fillRect(0, 0, width, HEIGHT);
      const { ticks, decimals } = ticksOf(scale, view);
      context.font = font(10.5);
      context.textBaseline = "middle";
      context.textAlign = "center";
      for (const tick of ticks) {
        const x = Math.round(scale.x(tick));
        context.fillStyle = colours.grid;
        context.fillRect(x, HEIGHT - 9, 1, 6);
        context.fillStyle = colours.faint;
        if (x > scale.left + 8 || tick === 0) context.fillText((tick * 1e3).toFixed(decimals), x, HEIGHT - 16);
      }
      context.textAlign = "right";
      context.fillText("ms", scale.left - 8, HEIGHT - 16);
      drawWindow(context, view, whole, scale, colours);
      context.fillStyle = colours.faint;
      for (const [name, at] of COLUMNS) context.fillText(name, scale.right + at, HEIGHT - 16);
      context.fillText("peak", width - 4, HEIGHT - 16);
      context.textAlign = "left";
      context.fillText("critical path", 10, HEIGHT - 16);
    },
  };
}

/** A thin line below the ticks: which part of the step is in view. */
function drawWindow(context, view, whole, scale, colours) {
  const width = scale.right - scale.left;
  context.fillStyle = colours.grid;
  context.fillRect(scale.left, HEIGHT - 3, width, 2);
  const x = scale.left + (view.from / whole) * width;
  const shown = ((view.to - view.from) / whole) * width;
  if (shown < width - 0.5) {
    context.fillStyle = colours.accent;
    context.fillRect(x, HEIGHT - 3, Math.max(shown, 2), 2);
  }
}
