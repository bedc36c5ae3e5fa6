// A few lines beside the pointer.

import { h } from "./dom.js";

/** Makes the tooltip of a page; show(lines, event) puts it where it fits, hide() takes it away. */
export function makeTooltip(page) {
  const element = h("div", { class: "tooltip", role: "tooltip", hidden: true });
  return {
    element,
    hide: () => (element.hidden = true),
    show(lines, event) {
      element.hidden = false;
      element.replaceChildren(...lines.map((line, i) => h(i ? "div" : "b", {}, line)));
      const [width, height] = [element.offsetWidth, element.offsetHeight];
      const box = page.getBoundingClientRect();
      const fitsRight = event.clientX + width + 24 < document.documentElement.clientWidth;
      const fitsBelow = event.clientY + height + 26 < window.innerHeight;
      const x = fitsRight ? event.clientX + 14 : event.clientX - width - 14;
      const y = fitsBelow ? event.clientY + 18 : event.clientY - height - 12;
      element.style.transform = `translate(${Math.round(x - box.left)}px, ${Math.round(y - box.top)}px)`;
    },
  };
}
