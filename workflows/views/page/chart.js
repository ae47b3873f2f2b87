// One chart: several curves over the optimizer step, values under the pointer, linear or logarithmic.

import { h, replace, svg } from "./dom.js";
import { number } from "./format.js";

const MARGIN = { left: 54, right: 12, top: 8, bottom: 24 };
const HEIGHT = 210;

export class Chart {
  constructor(title) {
    this.title = title;
    this.lines = [];
    this.drawing = svg("svg", { role: "img", height: HEIGHT, "aria-label": title });
    this.tip = h("div.tip", { hidden: true });
    this.box = h("div.plot", { tabIndex: 0, onkeydown: (event) => this.key(event), onblur: () => this.leave() }, this.drawing, this.tip);
    this.element = h("figure.chart", {}, h("figcaption", {}, title), this.box);
    this.box.addEventListener("pointermove", (event) => this.hover(event.clientX - this.box.getBoundingClientRect().left));
    this.box.addEventListener("pointerleave", () => this.leave());
    this.observer = new ResizeObserver(() => this.draw());
    this.observer.observe(this.box);
  }

  close() {
    this.observer.disconnect();
  }

  /** lines: [{name, colour, x: [], y: []}] */
  show(lines, logarithmic) {
    this.lines = lines;
    this.logarithmic = logarithmic;
    this.box.setAttribute("aria-label", `${this.title}: ${lines.map(({ name, y }) => `${name} ends at ${number(y[y.length - 1])}`).join("; ")}. Left and right arrows read values.`);
    this.draw();
  }

  draw() {
    const width = this.box.clientWidth;
    if (!width) return;
    this.width = width;
    const good = (value) => Number.isFinite(value) && (!this.logarithmic || value > 0);
    const xs = this.lines.flatMap(({ x }) => [x[0], x[x.length - 1]]).filter(Number.isFinite);
    const range = [Infinity, -Infinity];
    for (const { y } of this.lines) for (const value of y) if (good(value)) { range[0] = Math.min(range[0], value); range[1] = Math.max(range[1], value); }
    this.drawing.setAttribute("width", width);
    this.drawing.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
    if (!Number.isFinite(range[0]) || !xs.length) {
      replace(this.drawing, svg("text", { x: width / 2, y: HEIGHT / 2, "text-anchor": "middle", class: "tick" }, this.logarithmic ? "nothing above zero to draw on a log scale" : "no values yet"));
      return;
    }
    const [xLow, xHigh] = spread(Math.min(...xs), Math.max(...xs), 0);
    const scale = this.logarithmic ? Math.log10 : (value) => value;
    const [yLow, yHigh] = spread(scale(range[0]), scale(range[1]), 0.06);
    this.atX = (value) => MARGIN.left + ((value - xLow) / (xHigh - xLow)) * (width - MARGIN.left - MARGIN.right);
    this.atY = (value) => HEIGHT - MARGIN.bottom - ((scale(value) - yLow) / (yHigh - yLow)) * (HEIGHT - MARGIN.top - MARGIN.bottom);
    const parts = [];
    for (const tick of this.logarithmic ? decades(yLow, yHigh) : nice(yLow, yHigh, 5)) {
      const y = this.atY(tick);
      parts.push(svg("line", { x1: MARGIN.left, x2: width - MARGIN.right, y1: y, y2: y, class: "grid" }), svg("text", { x: MARGIN.left - 6, y: y + 4, "text-anchor": "end", class: "tick" }, number(tick)));
    }
    for (const tick of nice(xLow, xHigh, Math.max(2, width / 90))) parts.push(svg("text", { x: this.atX(tick), y: HEIGHT - 6, "text-anchor": "middle", class: "tick" }, number(tick)));
    for (const line of this.lines) parts.push(...this.line(line, good));
    this.cursor = svg("g", {});
    replace(this.drawing, parts, this.cursor);
  }

  line({ name, colour, x, y }, good) {
    let path = "", pen = false, drawn = 0;
    for (let i = 0; i < x.length; i++) {
      if (!good(y[i])) { pen = false; continue; }
      path += `${pen ? "L" : "M"}${this.atX(x[i]).toFixed(1)} ${this.atY(y[i]).toFixed(1)}`;
      pen = true;
      drawn += 1;
    }
    const found = [svg("path", { d: path, class: "curve", stroke: colour, "data-name": name })];
    if (drawn === 1 || x.length <= 12) x.forEach((value, i) => { if (good(y[i])) found.push(svg("circle", { cx: this.atX(value), cy: this.atY(y[i]), r: 2.5, fill: colour })); });
    return found;
  }

  hover(px) {
    if (!this.atX || !this.cursor) return;
    const near = this.lines.map((line) => ({ line, at: nearest(line.x, px, this.atX) })).filter(({ at }) => at >= 0);
    if (!near.length) return;
    const best = near.reduce((a, b) => (Math.abs(this.atX(b.line.x[b.at]) - px) < Math.abs(this.atX(a.line.x[a.at]) - px) ? b : a));
    const x = best.line.x[best.at];
    this.at = x;
    const shown = near.map(({ line }) => ({ line, value: valueAt(line, x) })).filter(({ value }) => value !== undefined);
    const marks = shown.filter(({ value }) => Number.isFinite(value) && (!this.logarithmic || value > 0)).map(({ line, value }) => svg("circle", { cx: this.atX(x), cy: this.atY(value), r: 3.5, fill: line.colour }));
    replace(this.cursor, svg("line", { x1: this.atX(x), x2: this.atX(x), y1: MARGIN.top, y2: HEIGHT - MARGIN.bottom, class: "cursor" }), marks);
    replace(this.tip, h("strong", {}, `step ${number(x)}`), shown.slice(0, 14).map(({ line, value }) => {
      const dot = h("i.dot");
      dot.style.background = line.colour;
      return h("div", {}, dot, h("span", {}, line.name), h("b", {}, number(value)));
    }));
    this.tip.hidden = false;
    const left = this.atX(x) + 12;
    this.tip.style.left = `${left + this.tip.offsetWidth > this.width ? Math.max(0, this.atX(x) - this.tip.offsetWidth - 12) : left}px`;
    this.tip.style.top = "4px";
  }

  leave() {
    this.tip.hidden = true;
    if (this.cursor) replace(this.cursor);
  }

  key(event) {
    if (!["ArrowLeft", "ArrowRight"].includes(event.key) || !this.atX) return;
    event.preventDefault();
    const all = [...new Set(this.lines.flatMap(({ x }) => x))].sort((a, b) => a - b);
    const now = all.indexOf(this.at);
    const next = all[Math.min(all.length - 1, Math.max(0, now + (event.key === "ArrowRight" ? 1 : -1)))];
    this.hover(this.atX(next));
  }
}

function spread(low, high, share) {
  if (low === high) return [low - (Math.abs(low) || 1) * 0.5, high + (Math.abs(high) || 1) * 0.5];
  return [low - (high - low) * share, high + (high - low) * share];
}

function nice(low, high, most) {
  const rough = (high - low) / most;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((value) => value >= rough);
  const found = [];
  for (let tick = Math.ceil(low / step) * step; tick <= high + step * 1e-9; tick += step) found.push(Number(tick.toPrecision(12)));
  return found;
}

function decades(low, high) {
  const found = [];
  for (let power = Math.ceil(low); power <= high; power++) found.push(10 ** power);
  return found.length >= 2 ? found : nice(low, high, 4).map((value) => Number((10 ** value).toPrecision(3)));
}

function nearest(xs, px, atX) {
  let [low, high] = [0, xs.length - 1];
  if (high < 0) return -1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (atX(xs[middle]) < px) low = middle;
    else high = middle;
  }
  return Math.abs(atX(xs[low]) - px) <= Math.abs(atX(xs[high]) - px) ? low : high;
}

function valueAt({ x, y }, wanted) {
  let [low, high] = [0, x.length - 1];
  while (low < high) {
    const middle = (low + high) >> 1;
    if (x[middle] < wanted) low = middle + 1;
    else high = middle;
  }
  return x[low] === wanted ? y[low] : undefined;
}
