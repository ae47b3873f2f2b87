// What a run came to: its evaluations, what it serves, where the time of its ranks went.

import { runPath } from "./api.js";
import { h, replace } from "./dom.js";
import { empty, stepLink } from "./parts.js";

const PAUSE_MS = 5000;

export class ResultsView {
  constructor(model) {
    Object.assign(this, { model, seen: -1, busy: false, timer: 0 });
    this.element = h("section.view.results", { "aria-label": "Results" });
  }

  /** Asks again if the run has changed, one question at a time. */
  update() {
    if (this.busy || this.seen === this.model.revision) return;
    this.busy = true;
    this.seen = this.model.revision;
    this.ask().then(() => { this.timer = setTimeout(() => { this.busy = false; this.update(); }, PAUSE_MS); });
  }

  async ask() {
    try {
      this.paint(await this.model.api.get(`${runPath(this.model.id)}/results`));
    } catch (error) {
      this.seen = -1;
      replace(this.element, empty("The results cannot be shown", error.message));
    }
  }

  paint({ endpoints, errors, sections }) {
    const failed = errors.map(({ id, message }) => h("li", {}, h("a", { href: stepLink(this.model.id, id) }, id), ": ", message));
    const nothing = empty("No results yet", "Steps that return an evaluation, or train on an elastic group, are told of here; curves are under Metrics.");
    replace(this.element,
      h("p.quiet", {}, `Verified endpoints: ${endpoints.join(", ") || "none"}`),
      failed.length ? h("ul.problem", { "aria-label": "Failed steps" }, failed) : null,
      sections.length ? sections.map(({ title, note, rows }) => h("section.part", {}, h("h3", {}, title), note ? h("p.quiet", {}, note) : null, table(rows))) : nothing);
  }

  select() {}

  close() {
    clearTimeout(this.timer);
    this.busy = true;
  }
}

/** Rows of texts, a header first; an answer that was judged is {text, correct}. */
function table([header, ...rows]) {
  const cell = (value) => (typeof value === "string" ? h("td", {}, value) : h("td.answer", { dataset: { correct: value.correct } }, value.text));
  return h("div.scroller", {}, h("table.rows", {}, h("thead", {}, h("tr", {}, header.map((name) => h("th", { scope: "col" }, name)))), h("tbody", {}, rows.map((row) => h("tr", {}, row.map(cell))))));
}
