// One run: its head with the buttons, and its views over the same steps.

import { Poller, runPath } from "./api.js";
import { artifactCard, Detail, problem, section } from "./detail.js";
import { h, replace, text } from "./dom.js";
import { ago, count, now, runStatus, seconds, short, status, when } from "./format.js";
import { GraphView } from "./graph.js";
import { LogBox } from "./log.js";
import { Curves, MetricsView } from "./metrics.js";
import { RunModel } from "./model.js";
import { bar, chip, confirm, empty, notice, progressWords, runLink, stepLink, valueTree } from "./parts.js";
import { ResultsView } from "./results.js";
import { TableView } from "./table.js";
import { TimelineView } from "./timeline.js";

const VIEWS = [["graph", "Graph", GraphView], ["steps", "Steps", TableView], ["timeline", "Timeline", TimelineView], ["metrics", "Metrics", MetricsView], ["results", "Results", ResultsView], ["about", "Recipe and result", null]];
const LIVE_MS = 1000, STILL_MS = 4000;

export class RunPage {
  constructor(api, run, onState) {
    Object.assign(this, { api, run, model: new RunModel(api, run), views: new Map(), viewName: null, call: null });
    this.curves = new Curves(api, run);
    this.state = h("span.runstate");
    this.facts = h("span.quiet");
    this.progress = h("div.progress");
    this.buttons = {
      resume: h("button", { type: "button", disabled: true, onclick: () => this.act("resume") }, "Resume"),
      cancel: h("button.danger", { type: "button", disabled: true, onclick: () => this.act("cancel") }, "Cancel"),
    };
    this.banner = h("div.banner", { hidden: true });
    this.failed = h("div.failed", { hidden: true });
    this.tabs = h("div.tabs", { role: "tablist", "aria-label": "Views of the run" }, VIEWS.map(([name, words]) => h("a", { role: "tab", href: this.link(name), dataset: { view: name }, onkeydown: (event) => this.turn(event) }, words)));
    this.stage = h("div.viewport", { role: "tabpanel" });
    this.detail = new Detail(this.model, this.curves, () => this.openStep(null));
    this.element = h("div.page.run", {},
      h("header.head", {}, h("h1", {}, run), this.state, this.progress, this.facts, api.written ? null : h("div.buttons", {}, this.buttons.resume, this.buttons.cancel)),
      this.failed, this.banner, this.tabs, h("div.workspace", {}, this.stage, this.detail.element));
    this.poller = new Poller(() => this.tick(), () => (api.written ? Infinity : this.model.live || this.model.summary?.active ? LIVE_MS : STILL_MS), onState);
    this.clock = setInterval(() => this.live(), 1000);
  }

  link(view) {
    const base = this.call === null ? runLink(this.run) : stepLink(this.run, this.call);
    return `${base}?view=${view}`;
  }

  /** What the address says: which view, which step. */
  go(view, call) {
    this.call = call;
    const name = VIEWS.some(([known]) => known === view) ? view : this.viewName ?? "graph";
    for (const tab of this.tabs.children) tab.href = this.link(tab.dataset.view);
    if (name !== this.viewName) {
      this.viewName = name;
      for (const tab of this.tabs.children) {
        tab.setAttribute("aria-selected", String(tab.dataset.view === name));
        tab.tabIndex = tab.dataset.view === name ? 0 : -1;
        if (tab.dataset.view === name) requestAnimationFrame(() => tab.scrollIntoView({ block: "nearest", inline: "nearest" }));
      }
      const made = this.view(name);
      replace(this.stage, made.element);
      if (this.model.summary) made.update();
    }
    this.detail.open(call);
    this.element.classList.toggle("with-detail", call !== null);
    this.view(name).select(call);
    if (this.needsCurves() && !this.curves.version) this.poller.now();
  }

  view(name) {
    if (!this.views.has(name)) {
      const [, , View] = VIEWS.find(([known]) => known === name);
      this.views.set(name, View ? new View(this.model, (call) => this.openStep(call), this.curves) : new About(this.model));
    }
    return this.views.get(name);
  }

  openStep(call) {
    const address = call === null ? `${runLink(this.run)}?view=${this.viewName}` : stepLink(this.run, call, this.viewName);
    if (location.hash !== address) location.hash = address;
  }

  turn(event) {
    const move = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!move) return;
    const place = VIEWS.findIndex(([name]) => name === this.viewName);
    location.hash = this.link(VIEWS[(place + move + VIEWS.length) % VIEWS.length][0]);
    requestAnimationFrame(() => this.tabs.querySelector("[aria-selected=true]")?.focus());
  }

  needsCurves() {
    return this.viewName === "metrics" || this.call !== null;
  }

  async tick() {
    const first = !this.model.summary;
    const changed = await this.model.refresh();
    if (this.needsCurves() && (this.model.live || changed || !this.curves.version)) await this.curves.refresh();
    if (changed || first) this.head();
    if (changed || first || this.model.live || this.viewName === "metrics") this.view(this.viewName).update();
    if (first) this.view(this.viewName).select(this.call);
    await this.detail.update();
    if (this.viewName === "about") await this.view("about").follow();
  }

  /** What moves with the clock alone. */
  live() {
    if (this.model.summary) this.times();
    if (this.model.live && this.viewName === "graph" && this.model.summary) this.view("graph").refresh();
  }

  times() {
    const { created, ended, driver, drivers } = this.model.summary;
    const end = ended ?? (this.model.live ? now() : null);
    const parts = [short(this.model.summary.workflow), `started ${ago(created)}`, end ? `${ended ? "took" : "for"} ${seconds(end - created)}` : "", drivers > 1 ? `${drivers} drivers` : ""];
    text(this.facts, parts.filter(Boolean).join(" · "));
    this.facts.title = `${when(created)}${driver ? `, ${driver}` : ""}`;
  }

  head() {
    const { model } = this;
    const { summary } = model;
    const state = runStatus({ ...summary, status: model.status });
    replace(this.state, chip(state));
    const counts = model.counts();
    replace(this.progress, bar(counts), h("small", {}, progressWords(counts)));
    const can = { cancel: summary.can?.cancel || summary.active, resume: summary.can?.resume && !summary.active };
    const stopped = ["interrupted", "failed", "cancelled"].includes(state);
    const why = { resume: stopped ? "it was not submitted to this service: go on with recua resume" : `a run that is ${status(state).label} cannot be resumed`, cancel: "nothing is running" };
    for (const [name, button] of Object.entries(this.buttons)) {
      button.disabled = !can[name];
      button.title = can[name] ? "" : why[name];
    }
    this.times();
    this.failed.hidden = !summary.error || state !== "failed" || summary.error.kind === "cancelled";
    if (!this.failed.hidden) replace(this.failed, this.failure(summary.error));
    this.asking();
  }

  failure(error) {
    const culprit = this.model.list.find((step) => step.status === "failed");
    return h("details", {}, h("summary", {}, h("strong", {}, "The run failed: "), error.message.split("\n")[0], culprit ? [" ", h("a", { href: stepLink(this.run, culprit.id, this.viewName) }, "open the step")] : null), problem({ ...error, type: "", message: error.message.split("\n").slice(1).join("\n") }));
  }

  asking() {
    const waiting = this.model.asking();
    this.banner.hidden = !waiting.length || ["finished", "failed"].includes(this.model.status);
    if (this.banner.hidden) return;
    const [first] = waiting;
    replace(this.banner, h("span", {}, h("strong", {}, waiting.length === 1 ? `${first.id} ${status(first.status).label}` : `${count(waiting.length, "step")} wait for somebody`), first.message && waiting.length === 1 ? `: ${first.message}` : ""),
      h("a.button", { href: stepLink(this.run, first.id, this.viewName) }, "Review"));
  }

  async act(what) {
    const words = {
      cancel: { title: `Cancel ${this.run}?`, body: "Running steps are killed. What is committed stays, and the run can be resumed.", action: "Cancel the run", danger: true, done: "is being cancelled" },
      resume: { title: `Resume ${this.run}?`, body: "A new driver goes on where the run stopped; committed steps are not run again.", action: "Resume", done: "is being resumed" },
    }[what];
    if ((await confirm(words)) === null) return;
    this.buttons[what].disabled = true;
    try {
      await this.api.post(`${runPath(this.run)}/${what}`);
      notice(`${this.run} ${words.done}`, "good");
    } catch (error) {
      notice(`${this.run}: ${error.message}`, "error");
      this.head();
    }
    this.poller.now();
  }

  close() {
    this.poller.stop();
    clearInterval(this.clock);
    for (const view of this.views.values()) view.close();
    this.detail.dropCharts();
  }
}

/** Recipe, result, and what the driver printed. */
class About {
  constructor(model) {
    this.model = model;
    this.element = h("section.view.about", { "aria-label": "Recipe and result" });
    this.log = new LogBox(model.api, model.id, "");
    this.log.follow.checked = false;
  }

  update() {
    const { summary, revision } = this.model;
    if (this.seen === revision) return;
    this.seen = revision;
    const given = summary.recipe ?? [];
    const recipe = given.length === 1 ? valueTree(given[0].value, summary.run_id, 1) : given.map(({ name, value }) => h("dl.tree.top", {}, h("dt", {}, name), h("dd", {}, valueTree(value, summary.run_id, 1))));
    replace(this.element,
      section("Recipe", given.length ? recipe : h("p.quiet", {}, "The workflow takes no arguments.")),
      section("Result", summary.status === "finished" ? valueTree(summary.result, summary.run_id, 2) : h("p.quiet", {}, "There when the run has finished.")),
      summary.artifacts?.length ? section("Artifacts of the result", summary.artifacts.map((artifact) => artifactCard(artifact, summary.run_id))) : null,
      section("Run", h("dl.facts", {}, [["Workflow", summary.workflow], ["Store", summary.store], ["Started", when(summary.created)], ["Ended", when(summary.ended)], ["Driver", summary.driver], ["Drivers so far", String(summary.drivers ?? "")]].filter(([, value]) => value).map(([name, value]) => [h("dt", {}, name), h("dd", {}, value)]))),
      section("Driver's log", this.log.element));
  }

  follow() {
    return this.log.refresh();
  }

  select() {}

  close() {}
}
