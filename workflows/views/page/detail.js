// The panel of one step: what it is, what went wrong, what it printed, what went in and came out.

import { runPath } from "./api.js";
import { Chart } from "./chart.js";
import { h, replace, text } from "./dom.js";
import { bytes, count, seconds, short, when } from "./format.js";
import { LogBox } from "./log.js";
import { artifactLink, chip, confirm, copyButton, notice, stepLink, valueTree } from "./parts.js";

const TABS = [["overview", "Overview"], ["log", "Log"], ["values", "Inputs and result"], ["code", "Code"]];

export class Detail {
  constructor(model, curves, close) {
    Object.assign(this, { model, curves, id: null, tab: "overview", stamp: "", charts: [] });
    this.title = h("h2", { tabIndex: -1 });
    this.state = h("p.state");
    this.tabs = h("div.tabs", { role: "tablist", "aria-label": "About this step" }, TABS.map(([name, words]) => h("button", { type: "button", role: "tab", id: `tab-${name}`, dataset: { tab: name }, onclick: () => this.show(name), onkeydown: (event) => this.turn(event) }, words)));
    this.body = h("div.body", { role: "tabpanel" });
    this.element = h("aside.detail", { hidden: true, "aria-label": "Step" },
      h("header", {}, this.title, h("button.quiet", { type: "button", "aria-label": "Close the panel", title: "Close (Esc)", onclick: close }, "✕")), this.state, this.tabs, this.body);
    this.element.addEventListener("keydown", (event) => { if (event.key === "Escape") { event.stopPropagation(); close(); } });
  }

  async open(id) {
    if (id === this.id) return;
    this.id = id;
    this.element.hidden = id === null;
    this.stamp = "";
    this.facts = null;
    this.log = null;
    this.dropCharts();
    replace(this.body);
    if (id === null) return;
    this.log = new LogBox(this.model.api, this.model.id, id);
    const step = this.model.steps.get(id);
    this.show(step && this.model.statusOf(step) === "running" && this.tab === "overview" ? "overview" : this.tab);
    await this.update();
  }

  turn(event) {
    const names = TABS.map(([name]) => name);
    const move = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!move) return;
    this.show(names[(names.indexOf(this.tab) + move + names.length) % names.length]);
    this.tabs.querySelector(`[data-tab=${this.tab}]`).focus();
  }

  show(name) {
    this.tab = name;
    for (const button of this.tabs.children) {
      button.setAttribute("aria-selected", String(button.dataset.tab === name));
      button.tabIndex = button.dataset.tab === name ? 0 : -1;
    }
    this.body.setAttribute("aria-labelledby", `tab-${name}`);
    this.paint();
    if (name === "log") this.log?.refresh().catch((error) => text(this.log.facts, error.message));
  }

  /** Called with every tick: asks for the step again where its row has changed. */
  async update() {
    const { id, model } = this;
    if (id === null) return;
    const step = model.steps.get(id);
    this.head(step);
    const stamp = JSON.stringify([id, step, model.live]);
    if (stamp !== this.stamp) {
      try {
        const facts = await model.api.get(`${runPath(model.id)}/step`, { id });
        if (this.id !== id) return;
        [this.facts, this.stamp] = [facts, stamp];
        this.paint();
      } catch (error) {
        if (this.id !== id || error.status === 0) return;
        replace(this.body, h("p.problem", {}, error.message));
      }
    }
    if (this.tab === "log") await this.log.refresh();
    if (this.tab === "overview") this.progress();
  }

  head(step) {
    const { model } = this;
    text(this.title, this.id);
    if (!step) { replace(this.state); return; }
    const taken = seconds(model.secondsOf(step));
    const facts = [taken && `${step.ended || step.seconds ? "took" : "for"} ${taken}`, step.node && `on ${step.node}`, step.attempts > 1 && `${step.attempts} attempts`].filter(Boolean).join(", ");
    const key = `${model.statusOf(step)}|${facts}`;
    if (this.headKey === key) return;
    this.headKey = key;
    replace(this.state, chip(model.statusOf(step)), h("span", {}, facts));
  }

  paint() {
    if (this.id === null) return;
    this.dropCharts();
    if (this.tab === "log") { replace(this.body, this.log.element); this.log.down(); return; }
    if (!this.facts) { replace(this.body, h("p.quiet", {}, "Loading…")); return; }
    replace(this.body, { overview: () => this.overview(), values: () => this.values(), code: () => this.code() }[this.tab]());
    if (this.tab === "overview") this.progress();
  }

  overview() {
    const { facts, model } = this;
    this.progressBox = h("div.progressbox");
    return [
      facts.error ? problem(facts.error, facts.status === "failed" ? "" : "An attempt before failed: ") : null,
      this.asks(),
      this.progressBox,
      facts.artifacts.length ? section("Artifacts", facts.artifacts.map((artifact) => artifactCard(artifact, model.id))) : null,
      section("Facts", h("dl.facts", {}, [
        ["Step", facts.step], ["Started", when(facts.started)], ["Ended", when(facts.ended)],
        ["Reused from", facts.reused_from ? this.origin() : ""], ["Key", facts.key ? [h("code", {}, facts.key.slice(0, 16)), copyButton(facts.key, "the key")] : ""],
        ["Needs", (facts.needs ?? []).length ? h("ul.links", {}, facts.needs.slice(0, 50).map((need) => h("li", {}, this.need(need)))) : "nothing"],
      ].filter(([, value]) => value !== "").map(([name, value]) => [h("dt", {}, name), h("dd", {}, value)]))),
      facts.tries.length ? section("Attempts", h("ol.tries", {}, facts.tries.map((attempt) => this.attempt(attempt)))) : null,
    ];
  }

  origin() {
    const { origin, reused_from: from } = this.facts;
    return origin ? h("a", { href: stepLink(origin.run_id, origin.id) }, `${origin.id} of ${origin.run_id}`) : `${from} (no longer in the store)`;
  }

  /** A map or a nested workflow is no step of its own. */
  need(id) {
    if (this.model.steps.has(id)) return h("a", { href: stepLink(this.model.id, id) }, id);
    const inside = this.model.list.filter((step) => step.id.startsWith(`${id}/`)).length;
    return [id, inside ? h("span.quiet", {}, ` (${count(inside, "step")})`) : null];
  }

  attempt(attempt) {
    const taken = attempt.ended ? seconds(attempt.ended - attempt.started) : "";
    return h("li", {}, chip(attempt.status), h("span.quiet", {}, ` ${when(attempt.started)} ${taken}`),
      h("button.link", { type: "button", onclick: () => { this.show("log"); this.log.restart(attempt.id).catch(() => {}); } }, "log"),
      attempt.error ? h("details", {}, h("summary", {}, `${attempt.error.type}: ${attempt.error.message.split("\n")[0]}`), attempt.error.traceback ? h("pre.trace", {}, attempt.error.traceback) : null) : null);
  }

  /** What somebody is asked, with the buttons to answer. */
  asks() {
    const { facts, model } = this;
    if (!facts.status.startsWith("waiting-for")) return null;
    const approval = facts.status === "waiting-for-approval";
    const message = facts.wait?.message || facts.message || "";
    const ask = h("div.ask", {}, h("strong", {}, approval ? "Waits for your approval" : "Waits for an event from outside"), message ? h("p", {}, message) : null, facts.wait?.show ? valueTree(facts.wait.show, model.id, 1) : null);
    if (approval && !model.api.written) {
      const answer = async (yes) => {
        const comment = await confirm({ title: `${yes ? "Approve" : "Deny"} ${facts.id}?`, body: message || "The run goes on with your answer.", action: yes ? "Approve" : "Deny", danger: !yes, comment: "Comment (optional)" });
        if (comment === null) return;
        try {
          const said = await model.api.post(`${runPath(model.id)}/approve`, { id: facts.id, approve: yes, comment });
          notice(said?.message ?? `${facts.id} is ${yes ? "approved" : "denied"}`, "good");
          ask.querySelectorAll("button").forEach((button) => { button.disabled = true; });
        } catch (error) {
          notice(`${facts.id}: ${error.message}`, "error");
        }
      };
      ask.append(h("div.buttons", {}, h("button.danger", { type: "button", onclick: () => answer(false) }, "Deny…"), h("button.primary", { type: "button", onclick: () => answer(true) }, "Approve…")));
    } else ask.append(h("p.quiet", {}, "Answer it with: ", h("code", {}, approval ? `recua approve ${model.id} '${facts.id}'` : `recua send ${model.id} '${facts.id}' JSON`)));
    return ask;
  }

  /** How far the body is, and its curves so far. */
  progress() {
    const known = this.curves.progress.get(this.id);
    const lines = this.curves.lines(this.id);
    const key = `${this.id}|${this.curves.revision}|${lines.size}`;
    if (!this.progressBox || this.progressKey === key) return;
    this.progressKey = key;
    const step = this.model.steps.get(this.id);
    const running = step && this.model.statusOf(step) === "running";
    const parts = [];
    if (running && known) parts.push(known.total ? h("label.meter", {}, h("progress", { max: known.total, value: known.done }), ` ${known.done} of ${known.total}`) : h("p", {}, `${known.done} done`));
    const names = [...lines.keys()].filter((name) => !name.includes("/")).slice(0, 3);
    if (names.length) {
      this.dropCharts();
      this.charts = names.map((name) => new Chart(name));
      parts.push(section("Metrics", this.charts.map((chart) => chart.element)));
    }
    replace(this.progressBox, parts);
    this.charts.forEach((chart, i) => chart.show([{ name: this.id, colour: "var(--curve-0)", ...lines.get(names[i]) }], false));
  }

  values() {
    const { facts, model } = this;
    const given = facts.arguments;
    return [
      section("Inputs", given === null ? h("p.quiet", {}, "Known when the step is committed.") : given.length ? h("dl.tree.top", {}, given.map(({ name, value }) => [h("dt", {}, name), h("dd", {}, valueTree(value, model.id))])) : h("p.quiet", {}, "None, or too large to keep.")),
      section("Result", facts.status === "committed" || facts.status === "reused" ? valueTree(facts.result, model.id, 2) : h("p.quiet", {}, "Not there yet.")),
    ];
  }

  code() {
    const { code, key } = this.facts;
    if (!code) return h("p.quiet", {}, "Known when the step is committed.");
    const parts = Object.entries(code.parts);
    return [
      h("p", {}, "A change in any of these makes the step run again in a new run."),
      h("dl.facts", {}, h("dt", {}, "Fingerprint"), h("dd", {}, h("code", {}, code.digest.slice(0, 16)), copyButton(code.digest, "the fingerprint")), key ? [h("dt", {}, "Key"), h("dd", {}, h("code", {}, key.slice(0, 16)))] : null),
      section(count(parts.length, "function, class or file").replace("files", "files"), h("ul.parts", {}, parts.map(([name, digest]) => h("li", {}, h("span", {}, name), h("code", {}, digest.slice(0, 10)))))),
    ];
  }

  dropCharts() {
    this.charts.forEach((chart) => chart.close());
    this.charts = [];
    this.progressKey = "";
  }
}

/** An error with the user's own traceback first. */
export function problem(error, before = "") {
  return h("div.problem", { role: "group", "aria-label": "Error" },
    before, error.message ? h("strong", {}, error.type ? `${error.type}: ` : "", error.message) : null,
    error.traceback ? h("pre.trace", {}, error.traceback) : null,
    error.traceback ? copyButton(error.traceback, "the traceback") : null);
}

export function section(title, ...children) {
  return h("section.part", {}, h("h3", {}, title), ...children);
}

export function artifactCard(artifact, run) {
  const meta = Object.keys(artifact.meta ?? {}).length ? valueTree(artifact.meta, run, 0) : null;
  const files = artifact.files ? h("details", {}, h("summary", {}, `${count(artifact.count, "file")}, ${bytes(artifact.bytes)}`), h("ul.files", {}, artifact.files.map(({ path, size }) => h("li", {}, h("span", {}, path), h("span.quiet", {}, bytes(size)))), artifact.count > artifact.files.length ? h("li.quiet", {}, `${artifact.count - artifact.files.length} more`) : null)) : null;
  return h("div.card", {}, artifactLink(artifact, run), copyButton(artifact.digest, "the digest"), files, meta, artifact.location && !artifact.files && "files" in artifact ? h("p.quiet", {}, "Its files are no longer in the store.") : null);
}
