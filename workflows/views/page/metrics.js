// Metric curves of a run: one chart per metric, one line per step, side by side to compare.

import { runPath } from "./api.js";
import { Chart } from "./chart.js";
import { h, replace, text } from "./dom.js";
import { count } from "./format.js";
import { empty } from "./parts.js";

const COLOURS = 12;
const CHOSEN_AT_FIRST = 12;
const MOST_CHARTS = 60;

/** The curves of a run, brought up to date with what is new. What a result holds replaces what was seen live. */
export class Curves {
  constructor(api, run) {
    Object.assign(this, { api, run, version: "", revision: 0, leftOut: 0 });
    this.calls = new Map();
    this.progress = new Map();
    this.notes = [];
  }

  async refresh() {
    const answer = await this.api.get(`${runPath(this.run)}/metrics`, { after: this.version });
    if (!this.version) this.leftOut = answer.left_out ?? 0;
    for (const { call, name, x, y } of answer.curves) this.of(call).whole.set(name, { x, y });
    for (const event of answer.events) {
      if (event.kind === "progress") this.add(event);
      else this.notes.push(event);
    }
    if (answer.curves.length || answer.events.length) this.revision += 1;
    this.version = answer.version;
  }

  of(call) {
    if (!this.calls.has(call)) this.calls.set(call, { whole: new Map(), live: new Map() });
    return this.calls.get(call);
  }

  add({ call, done, total, metrics, time }) {
    const before = this.progress.get(call);
    this.progress.set(call, { done, total, time });
    const names = Object.entries(metrics ?? {});
    if (!names.length) return;
    const { live } = this.of(call);
    if (before && done < before.done) live.clear(); // another attempt began
    for (const [name, value] of names) {
      if (!live.has(name)) live.set(name, { x: [], y: [] });
      const line = live.get(name);
      line.x.push(done);
      line.y.push(value);
    }
  }

  /** name -> {x, y} of one call. */
  lines(call) {
    const known = this.calls.get(call);
    if (!known) return new Map();
    return known.whole.size ? known.whole : known.live;
  }
}

export class MetricsView {
  constructor(model, open, curves) {
    Object.assign(this, { model, openStep: open, curves, chosen: new Set(), touched: false, seen: -1, logarithmic: false, charts: new Map(), colours: new Map() });
    this.search = h("input.search", { type: "search", placeholder: "Filter metrics", "aria-label": "Filter metrics", oninput: () => this.rebuild() });
    this.log = h("label.choice", {}, h("input", { type: "checkbox", onchange: (event) => { this.logarithmic = event.target.checked; this.rebuild(); } }), "log scale");
    this.facts = h("span.quiet");
    this.steps = h("ul.steps", {});
    this.find = h("input.search", { type: "search", placeholder: "Find a step", "aria-label": "Find a step", oninput: () => this.list() });
    const all = (on) => () => { this.touched = true; this.chosen = new Set(on ? this.listed() : []); this.rebuild(); };
    this.side = h("aside.side", { "aria-label": "Steps to compare" }, this.find, h("div.pair", {}, h("button", { type: "button", onclick: all(true) }, "All"), h("button", { type: "button", onclick: all(false) }, "None")), this.steps);
    this.grid = h("div.charts");
    this.element = h("section.view.metrics", { "aria-label": "Metrics" }, h("div.tools", {}, this.search, this.log, this.facts), h("div.split", {}, this.side, this.grid));
  }

  close() {
    for (const chart of this.charts.values()) chart.close();
  }

  select() {}

  update() {
    if (this.seen === this.curves.revision) return;
    this.seen = this.curves.revision;
    this.rebuild();
  }

  get names() {
    return [...this.curves.calls.keys()].filter((call) => this.curves.lines(call).size);
  }

  listed() {
    const wanted = this.find.value.trim().toLowerCase();
    return this.names.filter((call) => call.toLowerCase().includes(wanted));
  }

  colour(call) {
    if (!this.colours.has(call)) this.colours.set(call, curveColour(this.colours.size));
    return this.colours.get(call);
  }

  rebuild() {
    const { names } = this;
    if (!this.touched) this.chosen = new Set(names.slice(0, CHOSEN_AT_FIRST));
    names.forEach((call) => this.colour(call));
    this.list();
    const wanted = this.search.value.trim().toLowerCase();
    const metrics = new Map();
    for (const call of names.filter((each) => this.chosen.has(each))) {
      for (const [name, line] of this.curves.lines(call)) {
        if (!name.toLowerCase().includes(wanted)) continue;
        if (!metrics.has(name)) metrics.set(name, []);
        metrics.get(name).push({ name: call, colour: this.colour(call), ...line });
      }
    }
    for (const [name, chart] of this.charts) if (!metrics.has(name)) { chart.close(); chart.element.remove(); this.charts.delete(name); }
    const order = [...metrics.keys()].sort((a, b) => rank(a) - rank(b) || metrics.get(b).length - metrics.get(a).length || a.localeCompare(b));
    const shown = order.slice(0, MOST_CHARTS);
    for (const name of shown) if (!this.charts.has(name)) this.charts.set(name, new Chart(name));
    replace(this.grid, shown.length ? shown.map((name) => this.charts.get(name).element) : this.nothing(names, wanted));
    for (const name of shown) this.charts.get(name).show(metrics.get(name), this.logarithmic);
    const more = order.length > MOST_CHARTS ? `; ${order.length - MOST_CHARTS} more, filter to see them` : "";
    const left = this.curves.leftOut ? `; the results of ${count(this.curves.leftOut, "step")} were not looked at` : "";
    text(this.facts, names.length ? `${count(order.length, "metric")} of ${count(this.chosen.size, "step")}${more}${left}` : "");
  }

  nothing(names, wanted) {
    if (!names.length) return empty("No metrics yet", "Steps report them with context().progress(done, total, loss=...), or by an artifact with a metrics.jsonl.");
    return wanted ? empty("No metric matches", "Change the filter above.") : empty("No step is chosen", "Choose steps at the left to draw their curves.");
  }

  list() {
    const listed = this.listed();
    replace(this.steps, listed.slice(0, 400).map((call) => {
      const dot = h("i.dot");
      dot.style.background = this.colour(call);
      const box = h("input", { type: "checkbox", checked: this.chosen.has(call), onchange: () => { this.touched = true; box.checked ? this.chosen.add(call) : this.chosen.delete(call); this.rebuild(); } });
      return h("li", {}, h("label", { title: call }, box, dot, h("span", {}, call)), h("button.quiet", { type: "button", title: `Open ${call}`, "aria-label": `Open ${call}`, onclick: () => this.openStep(call) }, "›"));
    }), listed.length > 400 ? h("li.quiet", {}, `${listed.length - 400} more`) : null);
  }
}

/** Never the same one twice: the page's own first, then hues that each lie far from those before. */
function curveColour(index) {
  return index < COLOURS ? `var(--curve-${index})` : `hsl(${((index * 137.508) % 360).toFixed(1)} ${index % 2 ? 45 : 70}% 50%)`;
}

const FIRST = ["loss", "reward", "accuracy", "kl", "perplexity", "grad_norm", "lr"];

/** Well-known metrics first, those with a slash (per task type) last. */
function rank(name) {
  const known = FIRST.indexOf(name);
  if (known >= 0) return known;
  return name.includes("/") ? 200 : 100;
}
