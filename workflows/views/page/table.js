// The steps of a run as a table that draws only the rows in the window.

import { h, replace, text } from "./dom.js";
import { clock, count, seconds, short, status, when } from "./format.js";
import { ordered } from "./model.js";
import { chip, empty, stepLink } from "./parts.js";

const ROW = 34;
const SPARE = 8;
const COLUMNS = [
  { name: "step", title: "Step", value: (step) => step.id },
  { name: "status", title: "Status", value: (step, model) => model.statusOf(step) },
  { name: "started", title: "Started", value: (step) => step.started ?? 0 },
  { name: "took", title: "Took", value: (step, model) => model.secondsOf(step) ?? -1 },
  { name: "attempts", title: "Attempts", value: (step) => step.attempts ?? 0 },
  { name: "node", title: "Node", value: (step) => step.node ?? "" },
  { name: "note", title: "Note", value: (step) => step.message ?? step.reused_from ?? "" },
];

export class TableView {
  constructor(model, open) {
    Object.assign(this, { model, openStep: open, chosen: null, wanted: "", only: new Set(), sort: null, rows: [] });
    this.search = h("input.search", { type: "search", placeholder: "Filter by name, node or message", "aria-label": "Filter steps", oninput: () => { this.wanted = this.search.value.trim().toLowerCase(); this.rebuild(); } });
    this.chips = h("div.filters", { role: "group", "aria-label": "Filter by status" });
    this.facts = h("span.quiet", { role: "status" });
    this.head = h("div.thead", { role: "row" }, COLUMNS.map((column) => this.heading(column)));
    this.body = h("div.tbody", { role: "rowgroup" });
    this.scroller = h("div.scroller", { tabIndex: 0, role: "table", "aria-label": "Steps", onscroll: () => this.paint(), onkeydown: (event) => this.key(event) }, h("div.sticky", { role: "rowgroup" }, this.head), this.body);
    this.element = h("section.view.table", { "aria-label": "Steps" }, h("div.tools", {}, this.search, this.chips, this.facts), this.scroller);
    this.observer = new ResizeObserver(() => this.paint());
    this.observer.observe(this.scroller);
  }

  heading(column) {
    const button = h("button.plain", { type: "button", onclick: () => this.order(column) }, column.title);
    const cell = h(`span.cell.${column.name}`, { role: "columnheader" }, button);
    column.mark = () => {
      const mine = this.sort?.column === column;
      cell.setAttribute("aria-sort", mine ? (this.sort.up ? "ascending" : "descending") : "none");
      text(button, `${column.title}${mine ? (this.sort.up ? " ↑" : " ↓") : ""}`);
    };
    return cell;
  }

  order(column) {
    if (this.sort?.column !== column) this.sort = { column, up: !["took", "attempts"].includes(column.name) };
    else if (this.sort.first === undefined) this.sort = { column, up: !this.sort.up, first: false };
    else this.sort = null;
    COLUMNS.forEach((each) => each.mark());
    this.rebuild();
  }

  update() {
    this.rebuild();
  }

  close() {
    this.observer.disconnect();
  }

  select(id) {
    this.chosen = id;
    const place = this.rows.findIndex((step) => step.id === id);
    const { scrollTop, clientHeight } = this.scroller;
    if (place >= 0 && (place * ROW < scrollTop || (place + 2) * ROW > scrollTop + clientHeight)) this.scroller.scrollTop = Math.max(0, place * ROW - clientHeight / 2);
    this.paint();
  }

  rebuild() {
    const { model, wanted, only } = this;
    const counts = ordered(model.counts());
    for (const name of only) if (!counts.some(([known]) => known === name)) only.delete(name);
    const key = JSON.stringify([counts, [...only]]);
    if (key !== this.chipsKey) {
      this.chipsKey = key;
      replace(this.chips, counts.map(([name, value]) => this.filter(name, value)));
    }
    const matches = (step) => !wanted || [step.id, step.node, step.message, step.reused_from].some((value) => value?.toLowerCase().includes(wanted));
    this.rows = model.list.filter((step) => (!only.size || only.has(model.statusOf(step))) && matches(step));
    if (this.sort) {
      const { column: { value }, up } = this.sort;
      const keys = new Map(this.rows.map((step) => [step, value(step, model)]));
      const compare = (a, b) => (typeof a === "string" ? a.localeCompare(b, undefined, { numeric: true }) : a - b);
      this.rows.sort((a, b) => (up ? 1 : -1) * compare(keys.get(a), keys.get(b)) || a.index - b.index);
    }
    const whole = this.rows.length === model.list.length;
    text(this.facts, whole ? count(this.rows.length, "step") : `${this.rows.length.toLocaleString("en")} of ${count(model.list.length, "step")}`);
    this.scroller.setAttribute("aria-rowcount", this.rows.length + 1);
    this.paint();
  }

  filter(name, value) {
    const pressed = this.only.has(name);
    const known = status(name);
    return h("button.filter", {
      type: "button", "aria-pressed": String(pressed), dataset: { status: name },
      onclick: () => { pressed ? this.only.delete(name) : this.only.add(name); this.rebuild(); },
    }, h("span.sign", { "aria-hidden": "true" }, known.sign), ` ${known.label} ${value.toLocaleString("en")}`);
  }

  /** The rows in the window, and a few around; those that are there already stay as they are. */
  paint() {
    const { scroller, body, rows } = this;
    body.style.height = `${Math.max(rows.length, 1) * ROW}px`;
    if (!rows.length) {
      replace(body, this.model.list.length ? empty("No step matches", "Change the filter above.") : empty("No step has started yet"));
      body.style.height = "160px";
      this.drawn = null;
      return;
    }
    const first = Math.max(0, Math.floor(scroller.scrollTop / ROW) - SPARE);
    const last = Math.min(rows.length, Math.ceil((scroller.scrollTop + (scroller.clientHeight || 600)) / ROW) + SPARE);
    const known = this.drawn ?? new Map();
    if (!this.drawn) replace(body);
    this.drawn = new Map();
    for (let place = first; place < last; place++) {
      const key = this.keyOf(rows[place], place);
      const there = known.get(key);
      known.delete(key);
      this.drawn.set(key, there ?? body.appendChild(this.row(rows[place], place)));
    }
    for (const row of known.values()) row.remove();
  }

  /** All that a row shows. */
  keyOf(step, place) {
    const { model } = this;
    return JSON.stringify([place, step, model.statusOf(step), seconds(model.secondsOf(step)), step.id === this.chosen]);
  }

  row(step, place) {
    const { model } = this;
    const name = model.statusOf(step);
    const note = step.message || (step.reused_from ? `from ${step.reused_from}` : "");
    const cells = [
      h("span.cell.step", { role: "cell" }, h("a", { href: stepLink(model.id, step.id, "steps"), title: `${step.id} (${step.step})`, tabIndex: -1 }, step.id), h("small", {}, short(step.step))),
      h("span.cell.status", { role: "cell" }, chip(name)),
      h("span.cell.started", { role: "cell", title: when(step.started) }, clock(step.started)),
      h("span.cell.took", { role: "cell" }, seconds(model.secondsOf(step))),
      h("span.cell.attempts", { role: "cell" }, step.attempts ?? ""),
      h("span.cell.node", { role: "cell", title: step.node ?? "" }, step.node ?? ""),
      h("span.cell.note", { role: "cell", title: note }, note),
    ];
    const row = h("div.row", { role: "row", "aria-rowindex": place + 2, "aria-selected": String(step.id === this.chosen), dataset: { id: step.id, status: name }, onclick: (event) => { event.preventDefault(); this.openStep(step.id); } }, cells);
    row.style.top = `${place * ROW}px`;
    return row;
  }

  key(event) {
    if (!["ArrowDown", "ArrowUp"].includes(event.key) || !this.rows.length || event.target !== this.scroller) return;
    event.preventDefault();
    const now = this.rows.findIndex((step) => step.id === this.chosen);
    const next = Math.min(this.rows.length - 1, Math.max(0, now + (event.key === "ArrowDown" ? 1 : -1)));
    this.openStep(this.rows[next].id);
  }
}
