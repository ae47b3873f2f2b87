// The list of runs.

import { Poller } from "./api.js";
import { h, replace, text } from "./dom.js";
import { ago, count, now, runStatus, seconds, short, when } from "./format.js";
import { bar, chip, empty, progressWords, runLink } from "./parts.js";

const MOST_ROWS = 500;

export class RunsPage {
  constructor(api, onState) {
    Object.assign(this, { api, runs: null, key: "" });
    this.search = h("input.search", { type: "search", placeholder: "Filter by run, workflow or status", "aria-label": "Filter runs", oninput: () => this.paint() });
    this.facts = h("span.quiet", { role: "status" });
    this.list = h("div.runlist");
    this.element = h("div.page.runs", {}, h("header.head", {}, h("h1", {}, "Runs"), this.search, this.facts), this.list);
    this.poller = new Poller(async () => {
      this.runs = await api.get("/runs");
      this.paint();
    }, () => (api.written ? Infinity : this.runs?.some((run) => run.status === "running" || run.active) ? 2000 : 5000), onState);
    this.clock = setInterval(() => this.paint(), 15_000);
  }

  close() {
    this.poller.stop();
    clearInterval(this.clock);
  }

  paint() {
    if (!this.runs) return;
    const wanted = this.search.value.trim().toLowerCase();
    const found = this.runs.filter((run) => [run.run_id, run.workflow, run.status].some((value) => value.toLowerCase().includes(wanted)));
    text(this.facts, wanted ? `${found.length} of ${count(this.runs.length, "run")}` : count(this.runs.length, "run"));
    if (!found.length) {
      const start = h("p", {}, h("code", {}, "recua run workflows/llama3_posttrain.py --recipe recipes/tiny.toml --detach"));
      replace(this.list, this.runs.length ? empty("No run matches", "Change the filter above.") : empty("No runs yet", "Start one, and it appears here:", start));
      this.key = "";
      return;
    }
    const key = JSON.stringify([found, Math.floor(Date.now() / 15_000)]);
    if (key === this.key) return;
    this.key = key;
    const focus = document.activeElement?.closest?.(".run-row")?.dataset.run;
    replace(this.list, found.slice(0, MOST_ROWS).map((run) => row(run)), found.length > MOST_ROWS ? h("p.quiet", {}, `${found.length - MOST_ROWS} older runs: filter to see them`) : null);
    if (focus) [...this.list.children].find((each) => each.dataset.run === focus)?.focus();
  }
}

/** A list of runs does not tell calls that wait for somebody from those that wait to be tried again. */
function counted({ waiting, ...counts }) {
  return waiting ? { ...counts, pending: waiting } : counts;
}

function row(run) {
  const counts = counted(run.counts ?? {});
  const end = run.ended ?? (run.status === "running" ? now() : null);
  return h("a.run-row", { href: runLink(run.run_id), dataset: { run: run.run_id, status: runStatus(run) } },
    h("span.name", {}, h("strong", {}, run.run_id), h("small", {}, short(run.workflow))),
    chip(runStatus(run)),
    h("span.progress", {}, bar(counts), h("small", {}, progressWords(counts), counts.pending ? `, ${counts.pending} waiting` : "")),
    h("span.took", {}, end ? seconds(end - run.created) : ""),
    h("span.age", { title: when(run.created) }, ago(run.created)));
}
