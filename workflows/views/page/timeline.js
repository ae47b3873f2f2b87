// When steps ran: one row per step, or one lane per step that ran at the same time on a node. Only the visible rows are
// drawn, on a canvas, so that 10,000 steps scroll smoothly.

import { h, replace, text } from "./dom.js";
import { count, now, seconds, status } from "./format.js";
import { empty } from "./parts.js";
import { Palette } from "./scene.js";

const ROW = 20, AXIS = 26;
const FONT = "system-ui, sans-serif";

export class TimelineView {
  constructor(model, open) {
    Object.assign(this, { model, openStep: open, chosen: null, by: "step", span: null, rows: [], palette: new Palette() });
    const choice = (value, words) => h("label.choice", {}, h("input", { type: "radio", name: "timeline-rows", value, checked: value === this.by, onchange: () => { this.by = value; this.rebuild(); } }), words);
    const button = (sign, words, act) => h("button", { type: "button", title: words, "aria-label": words, onclick: act }, sign);
    this.facts = h("span.quiet");
    this.tools = h("div.tools", {}, h("span", { role: "radiogroup", "aria-label": "Rows" }, choice("step", "a row per step"), choice("node", "lanes per node")), button("+", "Zoom in", () => this.zoom(0.7)), button("−", "Zoom out", () => this.zoom(1 / 0.7)), button("Fit", "Show the whole run", () => { this.span = null; this.paint(); }), this.facts);
    this.canvas = h("canvas", { role: "img" });
    this.spacer = h("div.spacer", {});
    this.tip = h("div.tip", { hidden: true });
    this.scroller = h("div.scroller", { tabIndex: 0, "aria-label": "Timeline. Left and right move, plus and minus zoom.", onscroll: () => this.paint() }, this.canvas, this.spacer);
    this.blank = h("div.cover");
    this.element = h("section.view.timeline", { "aria-label": "Timeline" }, this.tools, h("div.stage", {}, this.scroller, this.tip, this.blank));
    this.observer = new ResizeObserver(() => this.paint());
    this.observer.observe(this.scroller);
    this.scheme = matchMedia("(prefers-color-scheme: dark)");
    this.redraw = () => this.paint();
    this.scheme.addEventListener("change", this.redraw);
    this.listen();
    this.element.timeline = this;
  }

  close() {
    this.observer.disconnect();
    this.scheme.removeEventListener("change", this.redraw);
  }

  update() {
    this.rebuild();
  }

  select(id) {
    this.chosen = id;
    const place = this.rows.findIndex((row) => row.steps.some((step) => step.id === id));
    const { scrollTop, clientHeight } = this.scroller;
    if (place >= 0 && (place * ROW < scrollTop || (place + 2) * ROW > scrollTop + clientHeight - AXIS)) this.scroller.scrollTop = Math.max(0, place * ROW - clientHeight / 2);
    this.paint();
  }

  endOf(step, now) {
    const taken = this.model.secondsOf(step, now);
    return step.ended ?? (taken === null ? step.started : step.started + taken);
  }

  rebuild() {
    const timed = this.model.list.filter((step) => step.started).sort((a, b) => a.started - b.started);
    const until = now();
    this.begin = timed[0]?.started ?? 0;
    this.end = timed.reduce((last, step) => Math.max(last, this.endOf(step, until)), this.begin + 0.001);
    this.rows = this.by === "step" ? timed.map((step) => ({ label: step.id, steps: [step] })) : this.lanes(timed, until);
    this.blank.hidden = timed.length > 0;
    if (!timed.length) replace(this.blank, empty("Nothing has run yet"));
    text(this.facts, `${count(timed.length, "step")} in ${seconds(this.end - this.begin)}`);
    this.canvas.setAttribute("aria-label", `${count(timed.length, "step")} in ${seconds(this.end - this.begin)}; the table of steps has the same times as text`);
    this.paint();
  }

  /** Each node's steps in as few lanes as there were at once. */
  lanes(timed, now) {
    const nodes = new Map();
    for (const step of timed) {
      const name = step.node || (step.status === "reused" ? "reused" : "no node known");
      if (!nodes.has(name)) nodes.set(name, []);
      const lanes = nodes.get(name);
      let lane = lanes.find((each) => each.until <= step.started + 1e-4);
      if (!lane) lanes.push((lane = { label: lanes.length ? "" : name, node: name, steps: [], until: 0 }));
      lane.steps.push(step);
      lane.until = this.endOf(step, now);
    }
    return [...nodes.keys()].sort().flatMap((name) => nodes.get(name));
  }

  get window() {
    const pad = (this.end - this.begin) * 0.02;
    return this.span ?? [this.begin - pad / 4, this.end + pad];
  }

  zoom(factor, share = 0.5) {
    const [from, to] = this.window;
    const middle = from + (to - from) * share;
    const length = Math.max(0.01, (to - from) * factor);
    this.span = length > (this.end - this.begin) * 4 ? null : [middle - length * share, middle + length * (1 - share)];
    this.paint();
  }

  move(share) {
    const [from, to] = this.window;
    this.span = [from + (to - from) * share, to + (to - from) * share];
    this.paint();
  }

  listen() {
    const { scroller } = this;
    scroller.addEventListener("wheel", (event) => {
      if (!event.ctrlKey && !event.metaKey && Math.abs(event.deltaX) <= Math.abs(event.deltaY)) return;
      event.preventDefault();
      const rect = this.canvas.getBoundingClientRect();
      if (event.ctrlKey || event.metaKey) this.zoom(Math.exp(event.deltaY * 0.002), (event.clientX - rect.left - this.left) / (rect.width - this.left));
      else this.move(event.deltaX / rect.width);
    }, { passive: false });
    let from = null, travelled = 0;
    this.canvas.addEventListener("pointerdown", (event) => { from = event.clientX; travelled = 0; this.canvas.setPointerCapture(event.pointerId); });
    this.canvas.addEventListener("pointermove", (event) => {
      if (from === null) { this.hover(event); return; }
      const moved = event.clientX - from;
      travelled += Math.abs(moved);
      if (travelled > 3) this.move(-moved / (this.width - this.left));
      from = event.clientX;
    });
    this.canvas.addEventListener("pointerup", (event) => {
      if (from !== null && travelled <= 3) this.openStep(this.hit(event)?.id ?? null);
      from = null;
    });
    this.canvas.addEventListener("pointercancel", () => { from = null; });
    this.canvas.addEventListener("pointerleave", () => { this.tip.hidden = true; });
    scroller.addEventListener("keydown", (event) => {
      const acts = { ArrowLeft: () => this.move(-0.15), ArrowRight: () => this.move(0.15), "+": () => this.zoom(0.7), "=": () => this.zoom(0.7), "-": () => this.zoom(1 / 0.7), 0: () => { this.span = null; this.paint(); } };
      if (!(event.key in acts)) return;
      acts[event.key]();
      event.preventDefault();
    });
  }

  hit(event) {
    const rect = this.canvas.getBoundingClientRect();
    const [x, y] = [event.clientX - rect.left, event.clientY - rect.top];
    const row = this.rows[Math.floor((y - AXIS + this.scroller.scrollTop) / ROW)];
    if (!row || y < AXIS) return null;
    if (this.by === "step" && x < this.left) return row.steps[0];
    const [from, to] = this.window;
    const time = from + ((x - this.left) / (this.width - this.left)) * (to - from);
    const slack = ((to - from) / (this.width - this.left)) * 3;
    return row.steps.find((step) => time >= step.started - slack && time <= this.endOf(step) + slack) ?? (this.by === "step" ? row.steps[0] : null);
  }

  where(id) {
    const place = this.rows.findIndex((row) => row.steps.some((step) => step.id === id));
    if (place < 0) return null;
    const step = this.rows[place].steps.find((each) => each.id === id);
    const [from, to] = this.window;
    const rect = this.canvas.getBoundingClientRect();
    const middle = (step.started + this.endOf(step)) / 2;
    return { x: rect.left + this.left + ((middle - from) / (to - from)) * (this.width - this.left), y: rect.top + AXIS + (place + 0.5) * ROW - this.scroller.scrollTop };
  }

  hover(event) {
    const step = this.hit(event);
    this.tip.hidden = !step;
    this.canvas.style.cursor = step ? "pointer" : "grab";
    if (!step) return;
    const name = this.model.statusOf(step);
    const lines = [step.id, `${status(name).label}, ${seconds(this.model.secondsOf(step))}`, `began after ${seconds(step.started - this.begin)}`, step.node ? `on ${step.node}` : ""];
    replace(this.tip, lines.filter(Boolean).map((line, i) => h(i ? "div" : "strong", {}, line)));
    const rect = this.element.querySelector(".stage").getBoundingClientRect();
    this.tip.style.left = `${Math.min(event.clientX - rect.left + 14, rect.width - this.tip.offsetWidth - 8)}px`;
    this.tip.style.top = `${Math.min(event.clientY - rect.top + 14, rect.height - this.tip.offsetHeight - 8)}px`;
  }

  paint() {
    if (this.frame) return;
    this.frame = requestAnimationFrame(() => { this.frame = 0; this.draw(); });
  }

  draw() {
    const { scroller, canvas, rows, palette } = this;
    const [width, height, ratio] = [scroller.clientWidth, scroller.clientHeight, window.devicePixelRatio || 1];
    if (!width || !height) return;
    [this.width, this.left] = [width, Math.min(210, width * 0.3)];
    if (canvas.width !== Math.round(width * ratio) || canvas.height !== Math.round(height * ratio)) {
      canvas.width = Math.round(width * ratio);
      canvas.height = Math.round(height * ratio);
      canvas.style.width = `${width}px`;
      canvas.style.height = `${height}px`;
    }
    this.spacer.style.height = `${Math.max(0, rows.length * ROW + AXIS + 8 - height)}px`;
    const context = canvas.getContext("2d");
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.clearRect(0, 0, width, height);
    const [from, to] = this.window;
    const at = (time) => this.left + ((time - from) / (to - from)) * (width - this.left);
    this.axis(context, from, to, at, width, height);
    const first = Math.floor(scroller.scrollTop / ROW);
    const last = Math.min(rows.length, first + Math.ceil(height / ROW) + 1);
    context.save();
    context.beginPath();
    context.rect(0, AXIS, width, height - AXIS);
    context.clip();
    for (let place = first; place < last; place++) {
      const y = AXIS + place * ROW - scroller.scrollTop;
      this.row(context, place === first ? { ...rows[place], label: rows[place].label || rows[place].node } : rows[place], y, at, width);
      if (this.by === "node" && rows[place].label && place > first) {
        context.fillStyle = palette.get("--line");
        context.fillRect(0, y, width, 1);
      }
    }
    context.restore();
  }

  /** What its colour says, said again by a sign. */
  sign(context, step, y) {
    const words = context.fillStyle;
    const { sign, colour } = status(this.model.statusOf(step));
    context.fillStyle = this.palette.get(colour);
    context.fillText(sign, 8, y + ROW / 2 + 1);
    context.fillStyle = words;
  }

  row(context, { label, steps }, y, at, width) {
    const { palette } = this;
    context.font = `12px ${FONT}`;
    context.textBaseline = "middle";
    context.textAlign = "left";
    context.fillStyle = palette.get(steps[0].id === this.chosen && this.by === "step" ? "--accent" : "--soft");
    context.save();
    context.beginPath();
    context.rect(0, y, this.left - 10, ROW);
    context.clip();
    if (this.by === "step") this.sign(context, steps[0], y);
    context.fillText(label, this.by === "step" ? 26 : 8, y + ROW / 2 + 1);
    context.restore();
    const until = now();
    let painted = -1;
    for (const step of steps) {
      const start = Math.max(this.left, at(step.started));
      const end = Math.min(width, at(this.endOf(step, until)));
      if (end < this.left || start > width || (end <= painted && step.id !== this.chosen)) continue;
      context.fillStyle = palette.get(status(this.model.statusOf(step)).colour);
      context.fillRect(start, y + 3, Math.max(2, end - start - (this.by === "node" && end - start > 4 ? 1 : 0)), ROW - 6);
      painted = Math.max(start + 2, end);
      if (step.id === this.chosen) {
        context.lineWidth = 2;
        context.strokeStyle = palette.get("--accent");
        context.strokeRect(start - 1, y + 2, Math.max(4, end - start) + 2, ROW - 4);
      }
      if (this.by === "node" && end - start > 60) {
        context.fillStyle = palette.get("--card");
        context.save();
        context.beginPath();
        context.rect(start, y, end - start - 4, ROW);
        context.clip();
        context.fillText(`${status(this.model.statusOf(step)).sign} ${step.id}`, start + 5, y + ROW / 2 + 1);
        context.restore();
      }
    }
  }

  axis(context, from, to, at, width, height) {
    const { palette } = this;
    context.font = `11px ${FONT}`;
    context.textBaseline = "middle";
    context.textAlign = "left";
    for (const tick of ticks(from - this.begin, to - this.begin, Math.max(2, (width - this.left) / 110))) {
      const x = at(this.begin + tick);
      if (x < this.left) continue;
      context.fillStyle = palette.get("--grid");
      context.fillRect(Math.round(x), AXIS - 6, 1, height);
      context.fillStyle = palette.get("--soft");
      context.fillText(tick === 0 ? "0" : seconds(tick), x + 4, AXIS / 2);
    }
    context.fillStyle = palette.get("--line");
    context.fillRect(0, AXIS - 1, width, 1);
  }
}

const ROUND = [1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 43200, 86400];

function ticks(from, to, most) {
  const rough = (to - from) / most;
  let step = ROUND.find((value) => value >= rough) ?? Math.ceil(rough / 86400) * 86400;
  if (rough < 1) step = 10 ** Math.ceil(Math.log10(rough));
  const found = [];
  for (let tick = Math.ceil(Math.max(0, from) / step) * step; tick <= to && found.length < 200; tick += step) found.push(Number(tick.toFixed(6)));
  return found;
}
