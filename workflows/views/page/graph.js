// The live graph of a run.

import { h, replace, text } from "./dom.js";
import { count, ORDER, seconds, short, status } from "./format.js";
import { edgesBetween, isLarge, openAtFirst, visible } from "./groups.js";
import { layout } from "./layout.js";
import { ordered } from "./model.js";
import { empty } from "./parts.js";
import { Scene } from "./scene.js";

const STEP = { w: 216, h: 42 };
const GROUP = { w: 216, h: 56 };

export class GraphView {
  constructor(model, open) {
    Object.assign(this, { model, openStep: open, opened: null, touched: false, everything: false, shape: -1, chosen: null });
    this.scene = new Scene({
      label: "Graph of the steps",
      onChoose: (node) => this.pick(node),
      describe: (node) => this.describe(node.unit),
    });
    this.expand = h("button", { type: "button", onclick: () => this.toggle() });
    this.collapse = h("button", { type: "button", onclick: () => { this.opened = new Set(); this.touched = true; this.rebuild(true); this.update(); } }, "Close groups");
    this.facts = h("span.quiet");
    this.blank = h("div.cover");
    this.element = h("section.view.graph", { "aria-label": "Graph" }, h("div.tools", {}, this.expand, this.collapse, this.facts, legend()), h("div.stage", {}, this.scene.element, this.blank));
    this.element.scene = this.scene;
  }

  update() {
    const { model } = this;
    if (this.shape !== model.shape) this.rebuild();
    else this.refresh();
    const large = isLarge(model.list.length);
    this.expand.hidden = !large;
    this.collapse.hidden = !large || this.everything || this.opened.size === 0;
    text(this.expand, this.everything ? "Group like steps" : "Show every step");
    text(this.facts, large ? `${count(this.scene.nodes.length, "node")} for ${count(model.list.length, "step")}` : "");
    this.blank.hidden = model.list.length > 0;
    if (!model.list.length) replace(this.blank, empty(model.live ? "No step has started yet" : "This run has no steps", model.live ? "They appear here as the workflow calls them." : "It ended before its workflow called one."));
  }

  close() {
    this.scene.close();
  }

  select(id) {
    this.chosen = id;
    const unit = id === null ? null : this.units?.find((each) => each.members.some((step) => step.id === id));
    this.scene.choose(unit?.key ?? null);
    if (unit) this.scene.reveal(unit.key);
  }

  toggle() {
    this.everything = !this.everything;
    this.rebuild(true);
    this.update();
  }

  pick(node) {
    if (node === null) this.openStep(null);
    else if (!node.unit.group) this.openStep(node.id);
    else {
      this.touched = true;
      this.opened.add(node.id);
      [this.entered] = node.unit.members;
      this.rebuild(true);
      if (this.scene.focus) this.scene.focus = this.units.find((unit) => unit.members[0] === node.unit.members[0])?.key ?? null;
      this.update();
    }
  }

  /** New nodes or edges: lay them out again. */
  rebuild(fit = false) {
    this.shape = this.model.shape;
    if (!this.touched) this.opened = openAtFirst(this.model.list);
    this.units = visible(this.model.list, this.opened, this.everything);
    const sized = this.units.map((unit) => ({ id: unit.key, unit, ...(unit.group ? GROUP : STEP) }));
    const { width, height } = this.scene;
    const made = layout(sized, edgesBetween(this.units), (width || 1200) / (height || 600));
    const nodes = sized.map((node) => Object.assign(node, made.nodes.get(node.id)));
    this.nodes = new Set(this.model.list.map((step) => step.node).filter(Boolean));
    for (const node of nodes) this.dress(node);
    if (fit) this.scene.moved = false;
    this.scene.show(nodes, made.edges, made.box, made.vertical, this.interesting(nodes));
    if (this.chosen !== null) {
      const unit = this.units.find((each) => each.members.some((step) => step.id === this.chosen));
      this.scene.choose(unit?.key ?? null);
    }
  }

  /** Where to look first when not everything fits: what was chosen or opened, what failed, what runs. */
  interesting(nodes) {
    const has = (test) => nodes.find((node) => node.unit.members.some(test))?.id;
    const be = (name) => has((step) => this.model.statusOf(step) === name);
    return (this.chosen !== null && has((step) => step.id === this.chosen)) || has((step) => step === this.entered) || be("failed") || be("waiting-for-approval") || be("running") || null;
  }

  refresh() {
    this.nodes = new Set(this.model.list.map((step) => step.node).filter(Boolean));
    for (const node of this.scene.nodes) this.dress(node);
    this.scene.draw();
  }

  /** What a node says at the moment. */
  dress(node) {
    const { unit } = node;
    if (unit.group) {
      const counts = this.model.counts(unit.members);
      const worst = ORDER.find((name) => counts[name]) ?? "committed";
      const done = (counts.committed ?? 0) + (counts.reused ?? 0);
      const detail = done === unit.members.length ? count(done, "step") : `${done} of ${count(unit.members.length, "step")}`;
      const parts = ordered(counts).reverse().map(([name, value]) => [status(name).colour, value]);
      Object.assign(node, { title: unit.label, detail, sign: status(worst).sign, colour: status(worst).colour, marked: worst !== "committed", parts, stacked: true });
      return;
    }
    const [step] = unit.members;
    const name = this.model.statusOf(step);
    const taken = seconds(this.model.secondsOf(step));
    const words = name === "committed" ? "" : status(name).label;
    const tries = step.attempts > 1 ? `${step.attempts} attempts` : "";
    const where = this.nodes.size > 1 ? step.node : "";
    Object.assign(node, { title: step.id, detail: [words, taken, tries, where].filter(Boolean).join(" · "), sign: status(name).sign, colour: status(name).colour, marked: name !== "committed", parts: null, stacked: false });
  }

  describe(unit) {
    if (unit.group) {
      const counts = ordered(this.model.counts(unit.members)).map(([name, value]) => `${value} ${status(name).label}`);
      return [unit.label, count(unit.members.length, "step"), ...counts, "Click to open the group"];
    }
    const [step] = unit.members;
    const taken = seconds(this.model.secondsOf(step));
    return [
      step.id, `${status(this.model.statusOf(step)).label}${taken ? `, ${taken}` : ""}`, short(step.step),
      step.node ? `on ${step.node}` : "", step.attempts > 1 ? `${step.attempts} attempts` : "",
      step.reused_from ? `from ${step.reused_from}` : "", step.message ?? "",
    ].filter(Boolean);
  }
}

function legend() {
  const names = ["committed", "reused", "running", "waiting", "waiting-for-approval", "failed", "interrupted"];
  return h("ul.legend", { "aria-label": "What the colours mean" }, names.map((name) => h("li", { dataset: { status: name } }, h("i", { "aria-hidden": "true" }, status(name).sign), status(name).label)));
}
