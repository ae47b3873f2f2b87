// A graph on a canvas: pan, zoom, hover, choose; with the mouse, with fingers and with the keyboard. It draws only what
// is in the window, and less detail where it is small, so that thousands of nodes stay smooth.

import { h } from "./dom.js";

const SMALLEST = 0.02, LARGEST = 2.5;
const FONT = "system-ui, sans-serif";

/** Colours of the style sheet, read again when the colour scheme changes. */
export class Palette {
  constructor() {
    this.known = new Map();
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.known.clear());
  }

  get(name) {
    if (!this.known.has(name)) this.known.set(name, getComputedStyle(document.documentElement).getPropertyValue(name).trim());
    return this.known.get(name);
  }
}

export class Scene {
  /** `onChoose(node or null)`, `onOpen(node)`: clicked (or Enter); `describe(node)`: for the tooltip and screen readers. */
  constructor({ label, onChoose, describe }) {
    Object.assign(this, { onChoose, describe, nodes: [], edges: [], byId: new Map(), chosen: null, hovered: null, view: { x: 0, y: 0, k: 1 } });
    this.box = { left: 0, top: 0, right: 1, bottom: 1 };
    this.near = new Set();
    this.moved = false;
    this.palette = new Palette();
    this.fitted = new Map();
    this.canvas = h("canvas", { tabIndex: 0, role: "application", "aria-label": `${label}. Arrow keys move between nodes, Enter opens, plus and minus zoom, 0 fits.` });
    this.spoken = h("div.spoken", { "aria-live": "polite" });
    this.tip = h("div.tip", { hidden: true });
    const button = (sign, words, act) => h("button", { type: "button", title: words, "aria-label": words, onclick: act }, sign);
    this.tools = h("div.zoom", {}, button("+", "Zoom in", () => this.zoom(1.3)), button("−", "Zoom out", () => this.zoom(1 / 1.3)), button("Fit", "Show everything", () => this.fit(true)));
    this.element = h("div.scene", {}, this.canvas, this.tools, this.tip, this.spoken);
    this.observer = new ResizeObserver(() => this.resize());
    this.observer.observe(this.element);
    this.scheme = matchMedia("(prefers-color-scheme: dark)");
    this.redraw = () => this.draw();
    this.scheme.addEventListener("change", this.redraw);
    this.listen();
  }

  close() {
    this.observer.disconnect();
    this.scheme.removeEventListener("change", this.redraw);
    cancelAnimationFrame(this.frame);
  }

  /** nodes: [{id, x, y, w, h, title, detail, colour, badge, parts, stacked}]; edges: [{from, to, points, back}]. */
  show(nodes, edges, box, vertical, anchor = null) {
    Object.assign(this, { nodes, edges, box, vertical, anchor, byId: new Map(nodes.map((node) => [node.id, node])) });
    this.chooseQuietly(this.chosen);
    if (!this.moved) this.fit();
    this.draw();
  }

  choose(id) {
    this.chooseQuietly(id);
    this.draw();
  }

  chooseQuietly(id) {
    this.chosen = id;
    this.near = new Set();
    if (id !== null) for (const edge of this.edges) if (edge.from === id || edge.to === id) this.near.add(edge);
  }

  /** Everything in the window, unless that were too small to read: then around the anchor, or from the beginning. */
  fit(everything = false) {
    const { left, top, right, bottom } = this.box;
    const [width, height] = [this.width || 800, this.height || 500];
    const whole = Math.min((width - 48) / (right - left || 1), (height - 48) / (bottom - top || 1), 1.15);
    const k = everything ? Math.max(SMALLEST, whole) : whole > 0.58 ? whole : 0.72;
    const node = everything ? null : this.byId.get(this.anchor);
    const place = (low, high, size, wanted) => {
      if ((high - low) * k <= size - 40) return (size - (low + high) * k) / 2;
      return Math.min(24 - low * k, Math.max(size - 24 - high * k, wanted === undefined ? Infinity : size / 2 - wanted * k));
    };
    const across = (low, high, size, wanted) => place(low, high, size, wanted ?? (this.edges.length ? (low + high) / 2 : undefined));
    this.view = this.vertical
      ? { k, x: across(left, right, width, node?.x), y: place(top, bottom, height, node?.y) }
      : { k, x: place(left, right, width, node?.x), y: across(top, bottom, height, node?.y) };
    this.moved = everything ? this.moved : false;
    this.draw();
  }

  /** Bring a node into the window. */
  reveal(id) {
    const node = this.byId.get(id);
    if (!node) return;
    const { x, y, k } = this.view;
    const [px, py] = [node.x * k + x, node.y * k + y];
    if (px > 60 && px < this.width - 60 && py > 40 && py < this.height - 40 && k > 0.3) return;
    const zoom = Math.max(k, 0.6);
    this.view = { k: zoom, x: this.width / 2 - node.x * zoom, y: this.height / 2 - node.y * zoom };
    this.moved = true;
    this.draw();
  }

  zoom(factor, at = { x: this.width / 2, y: this.height / 2 }) {
    const { x, y, k } = this.view;
    const next = Math.min(LARGEST, Math.max(SMALLEST, k * factor));
    this.view = { k: next, x: at.x - ((at.x - x) * next) / k, y: at.y - ((at.y - y) * next) / k };
    this.moved = true;
    this.draw();
  }

  /** Where a node is in the browser's window: for whoever drives the page. */
  where(id) {
    const node = this.byId.get(id);
    if (!node) return null;
    const { x, y, k } = this.view;
    const rect = this.canvas.getBoundingClientRect();
    return { x: rect.left + node.x * k + x, y: rect.top + node.y * k + y };
  }

  resize() {
    const rect = this.element.getBoundingClientRect();
    if (!rect.width || !rect.height) return;
    const ratio = window.devicePixelRatio || 1;
    [this.width, this.height, this.ratio] = [rect.width, rect.height, ratio];
    this.canvas.width = Math.round(rect.width * ratio);
    this.canvas.height = Math.round(rect.height * ratio);
    if (!this.moved) this.fit();
    this.paint();
  }

  listen() {
    const { canvas } = this;
    const at = (event) => { const rect = canvas.getBoundingClientRect(); return { x: event.clientX - rect.left, y: event.clientY - rect.top }; };
    const fingers = new Map();
    let travelled = 0, spread = 0;
    canvas.addEventListener("pointerdown", (event) => {
      canvas.setPointerCapture(event.pointerId);
      fingers.set(event.pointerId, at(event));
      travelled = 0;
      spread = 0;
      this.hover(null);
    });
    canvas.addEventListener("pointermove", (event) => {
      const now = at(event);
      const before = fingers.get(event.pointerId);
      if (!before) { this.hover(this.hit(now), now); return; }
      fingers.set(event.pointerId, now);
      if (fingers.size === 2) {
        const [a, b] = [...fingers.values()];
        const distance = Math.hypot(a.x - b.x, a.y - b.y);
        if (spread) this.zoom(distance / spread, { x: (a.x + b.x) / 2, y: (a.y + b.y) / 2 });
        spread = distance;
        travelled = 99;
        return;
      }
      travelled += Math.abs(now.x - before.x) + Math.abs(now.y - before.y);
      if (travelled < 4) return;
      this.view.x += now.x - before.x;
      this.view.y += now.y - before.y;
      this.moved = true;
      this.draw();
    });
    const up = (event) => {
      const here = fingers.delete(event.pointerId);
      if (here && event.type === "pointerup" && travelled < 4) this.pick(this.hit(at(event)));
    };
    canvas.addEventListener("pointerup", up);
    canvas.addEventListener("pointercancel", up);
    canvas.addEventListener("pointerleave", () => this.hover(null));
    canvas.addEventListener("wheel", (event) => {
      event.preventDefault();
      this.zoom(Math.exp(-event.deltaY * (event.deltaMode ? 0.06 : 0.0018)), at(event));
    }, { passive: false });
    canvas.addEventListener("dblclick", (event) => { if (!this.hit(at(event))) this.fit(true); });
    canvas.addEventListener("keydown", (event) => this.key(event));
  }

  key(event) {
    const steps = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    const at = this.byId.get(this.focus ?? this.chosen) ?? null;
    if (event.key in steps) this.walk(...steps[event.key]);
    else if (event.key === "Enter" || event.key === " ") this.onChoose(at);
    else if (event.key === "+" || event.key === "=") this.zoom(1.25);
    else if (event.key === "-") this.zoom(0.8);
    else if (event.key === "0") this.fit(true);
    else return;
    event.preventDefault();
  }

  /** To the nearest node in a direction. */
  walk(dx, dy) {
    const from = this.byId.get(this.focus ?? this.chosen);
    let best = from ? null : this.nodes[0], least = Infinity;
    for (const node of from ? this.nodes : []) {
      const [ax, ay] = [node.x - from.x, node.y - from.y];
      const ahead = ax * dx + ay * dy;
      const aside = Math.abs(ax * dy) + Math.abs(ay * dx);
      if (node === from || ahead <= 1) continue;
      if (ahead + 2.5 * aside < least) [best, least] = [node, ahead + 2.5 * aside];
    }
    if (!best) return;
    this.focus = best.id;
    this.spoken.textContent = this.describe(best).join(", ");
    this.reveal(best.id);
    this.draw();
  }

  /** The mouse's choice; the keyboard goes on from there. */
  pick(node) {
    this.focus = null;
    this.onChoose(node);
  }

  hit(point) {
    const { x, y, k } = this.view;
    const [px, py] = [(point.x - x) / k, (point.y - y) / k];
    for (let i = this.nodes.length - 1; i >= 0; i--) {
      const node = this.nodes[i];
      if (Math.abs(px - node.x) <= node.w / 2 && Math.abs(py - node.y) <= node.h / 2) return node;
    }
    return null;
  }

  hover(node, at) {
    if (node !== this.hovered) {
      this.hovered = node;
      this.canvas.style.cursor = node ? "pointer" : "grab";
      this.tip.hidden = !node;
      if (node) this.tip.replaceChildren(...this.describe(node).map((line, i) => h(i ? "div" : "strong", {}, line)));
      this.draw();
    }
    if (node && at) {
      this.tip.style.left = `${Math.min(at.x + 14, Math.max(0, this.width - this.tip.offsetWidth - 8))}px`;
      this.tip.style.top = `${Math.min(at.y + 14, Math.max(0, this.height - this.tip.offsetHeight - 8))}px`;
    }
  }

  draw() {
    if (this.frame) return;
    this.frame = requestAnimationFrame(() => { this.frame = 0; this.paint(); });
  }

  paint() {
    const context = this.canvas.getContext("2d");
    const { x, y, k } = this.view;
    if (!this.width) return;
    context.setTransform(this.ratio, 0, 0, this.ratio, 0, 0);
    context.clearRect(0, 0, this.width, this.height);
    context.setTransform(this.ratio * k, 0, 0, this.ratio * k, this.ratio * x, this.ratio * y);
    const seen = { left: -x / k, top: -y / k, right: (this.width - x) / k, bottom: (this.height - y) / k };
    this.paintEdges(context, seen, k);
    for (const node of this.nodes) {
      if (node.x + node.w / 2 < seen.left || node.x - node.w / 2 > seen.right) continue;
      if (node.y + node.h / 2 < seen.top || node.y - node.h / 2 > seen.bottom) continue;
      if (k < 0.28) this.paintSmall(context, node);
      else this.paintNode(context, node, k);
    }
  }

  paintEdges(context, seen, k) {
    const plain = k < 0.28;
    for (const chosen of [false, true]) {
      context.beginPath();
      context.lineWidth = (chosen ? 2.2 : 1.2) / Math.max(0.5, Math.min(1, k * 1.4));
      context.strokeStyle = this.palette.get(chosen ? "--accent" : "--edge");
      for (const edge of chosen ? this.near : this.edges) {
        const { points } = edge;
        const [first, last] = [points[0], points[points.length - 1]];
        if (Math.max(first.x, last.x) < seen.left - 200 || Math.min(first.x, last.x) > seen.right + 200) continue;
        if (Math.max(first.y, last.y) < seen.top - 200 || Math.min(first.y, last.y) > seen.bottom + 200) continue;
        context.moveTo(first.x, first.y);
        for (let i = 1; i < points.length; i++) this.stroke(context, points[i - 1], points[i], plain);
      }
      context.stroke();
    }
    if (k < 0.4) return;
    for (const edge of this.edges) {
      const { points, back } = edge;
      const end = back ? points[0] : points[points.length - 1];
      context.fillStyle = this.palette.get(this.near.has(edge) ? "--accent" : "--edge");
      if (end.x < seen.left || end.x > seen.right || end.y < seen.top || end.y > seen.bottom) continue;
      this.arrow(context, end, back);
    }
  }

  stroke(context, a, b, plain) {
    if (plain) context.lineTo(b.x, b.y);
    else if (this.vertical) context.bezierCurveTo(a.x, (a.y + b.y) / 2, b.x, (a.y + b.y) / 2, b.x, b.y);
    else context.bezierCurveTo((a.x + b.x) / 2, a.y, (a.x + b.x) / 2, b.y, b.x, b.y);
  }

  arrow(context, { x, y }, back) {
    const turn = back ? -1 : 1;
    context.beginPath();
    context.moveTo(x, y);
    if (this.vertical) { context.lineTo(x - 4, y - 7 * turn); context.lineTo(x + 4, y - 7 * turn); }
    else { context.lineTo(x - 7 * turn, y - 4); context.lineTo(x - 7 * turn, y + 4); }
    context.fill();
  }

  paintSmall(context, node) {
    context.fillStyle = this.palette.get(node.colour);
    context.globalAlpha = node.dim ? 0.25 : 1;
    context.fillRect(node.x - node.w / 2, node.y - node.h / 2, node.w, node.h);
    context.globalAlpha = 1;
    if (node.marked) this.paintMark(context, node);
    if (node.id === this.chosen || node.id === this.focus) this.frameAround(context, node, 10);
  }

  /** Its sign, as large as fits: what differs from its neighbours is told by more than a colour. */
  paintMark(context, node) {
    context.fillStyle = this.palette.get("--card");
    context.font = `700 ${node.h * 0.9}px ${FONT}`;
    context.textBaseline = "middle";
    context.textAlign = "center";
    context.fillText(node.sign, node.x, node.y + node.h * 0.05);
  }

  paintNode(context, node, k) {
    const { w, h: height } = node;
    const [left, top] = [node.x - w / 2, node.y - height / 2];
    const colour = this.palette.get(node.colour);
    context.globalAlpha = node.dim ? 0.3 : 1;
    if (node.stacked) this.card(context, left + 5, top + 5, w, height);
    this.card(context, left, top, w, height, node === this.hovered);
    context.fillStyle = colour;
    context.beginPath();
    context.roundRect(left, top, 6, height, [6, 0, 0, 6]);
    context.fill();
    context.textBaseline = "middle";
    context.textAlign = "left";
    context.fillStyle = this.palette.get("--text");
    context.font = `600 13.5px ${FONT}`;
    context.fillText(this.fitting(context, node.title, w - 24), left + 15, top + (node.parts ? 15 : height / 2 - 8));
    context.font = `12px ${FONT}`;
    context.fillStyle = colour;
    const y = top + (node.parts ? 32 : height / 2 + 9);
    const sign = node.sign ? `${node.sign} ` : "";
    context.fillText(sign, left + 15, y);
    context.fillStyle = this.palette.get("--soft");
    context.fillText(this.fitting(context, node.detail, w - 40), left + 15 + (sign ? 14 : 0), y);
    if (node.parts) this.paintParts(context, node, left + 15, top + height - 11, w - 27);
    context.globalAlpha = 1;
    if (node.id === this.chosen || node.id === this.focus) this.frameAround(context, node, 2 / k);
  }

  card(context, x, y, w, height, hovered = false) {
    context.beginPath();
    context.roundRect(x, y, w, height, 7);
    context.fillStyle = this.palette.get(hovered ? "--card-hover" : "--card");
    context.fill();
    context.lineWidth = 1;
    context.strokeStyle = this.palette.get("--line");
    context.stroke();
  }

  paintParts(context, node, x, y, width) {
    const total = node.parts.reduce((sum, [, value]) => sum + value, 0);
    for (const [colour, value] of node.parts) {
      const part = (width * value) / total;
      context.fillStyle = this.palette.get(colour);
      context.fillRect(x, y, Math.max(part, 1), 4);
      x += part;
    }
  }

  frameAround(context, node, thick) {
    context.beginPath();
    context.roundRect(node.x - node.w / 2 - 3, node.y - node.h / 2 - 3, node.w + 6, node.h + 6, 9);
    context.lineWidth = Math.max(2.5, thick);
    context.strokeStyle = this.palette.get("--accent");
    context.stroke();
  }

  /** A text cut to a width, remembered. */
  fitting(context, words, width) {
    const key = `${context.font}|${width}|${words}`;
    let known = this.fitted.get(key);
    if (known === undefined) {
      known = words ?? "";
      if (context.measureText(known).width > width) {
        while (known.length > 1 && context.measureText(`${known}…`).width > width) known = known.slice(0, -1);
        known += "…";
      }
      if (this.fitted.size > 20_000) this.fitted.clear();
      this.fitted.set(key, known);
    }
    return known;
  }
}
