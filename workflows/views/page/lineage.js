// Where an artifact comes from: data, code, recipe and parents, as a graph.

import { runPath } from "./api.js";
import { h, replace, text } from "./dom.js";
import { count, seconds, short, when } from "./format.js";
import { section } from "./detail.js";
import { layout } from "./layout.js";
import { copyButton, empty, lineageLink, runLink, stepLink, valueTree } from "./parts.js";
import { Scene } from "./scene.js";

const LOOKS = {
  artifact: { colour: "--accent", sign: "◆", w: 170, h: 40 },
  call: { colour: "--good", sign: "✓", w: 196, h: 42 },
  data: { colour: "--ask", sign: "▤", w: 190, h: 40 },
};

export class LineagePage {
  constructor(api, run, digest) {
    Object.assign(this, { api, run, digest });
    this.scene = new Scene({ label: "Lineage of the artifact", onChoose: (node) => this.pick(node?.id ?? null), describe: (node) => this.describe(node.fact) });
    this.facts = h("span.quiet");
    this.blank = h("div.cover", { hidden: true });
    this.title = h("h1", {}, "Lineage");
    this.panel = h("aside.detail", { "aria-label": "What the chosen node is" });
    const view = h("section.view.graph", { "aria-label": "Lineage" }, h("div.tools", {}, this.facts, this.legend()), h("div.stage", {}, this.scene.element, this.blank));
    view.scene = this.scene;
    this.element = h("div.page.run.lineage", {},
      h("header.head", {}, this.title, h("code.digest", {}, digest.slice(0, 16)), copyButton(digest, "the digest")),
      h("div.workspace", {}, view, this.panel));
  }

  legend() {
    const words = { artifact: "artifact", call: "step", data: "data" };
    return h("ul.legend", {}, Object.entries(words).map(([kind, name]) => h("li", { dataset: { kind } }, h("i", { "aria-hidden": "true" }, LOOKS[kind].sign), name)));
  }

  async load() {
    const answer = await this.api.get(`${runPath(this.run)}/lineage`, { digest: this.digest });
    this.nodes = new Map(answer.nodes.map((node) => [node.id, node]));
    this.edges = answer.edges;
    const nodes = answer.nodes.map((fact) => ({ id: fact.id, fact, ...LOOKS[fact.kind], ...words(fact) }));
    const made = layout(nodes, answer.edges, (this.scene.width || 900) / (this.scene.height || 560));
    for (const node of nodes) Object.assign(node, made.nodes.get(node.id));
    this.scene.show(nodes, made.edges, made.box, made.vertical, `artifact:${answer.digest}`);
    const calls = answer.nodes.filter(({ kind }) => kind === "call").length;
    text(this.facts, `${count(calls, "step")} behind it${answer.truncated ? " and more, which are not shown" : ""}`);
    this.blank.hidden = calls > 0;
    if (!calls) replace(this.blank, empty("Nobody in this run made this artifact", "It was an input of the run, or its run is no longer in the store."));
    const root = this.nodes.get(`artifact:${answer.digest}`);
    text(this.title, `Where ${root?.name || "this artifact"} comes from`);
    this.pick(root ? root.id : null);
  }

  close() {
    this.scene.close();
  }

  describe(fact) {
    const { title, detail } = words(fact);
    return fact.kind === "data" ? [fact.name, detail] : [title, detail];
  }

  pick(id) {
    const fact = this.nodes.get(id ?? `artifact:${this.digest}`);
    this.scene.choose(id);
    if (!fact) { replace(this.panel, empty("Nothing is chosen")); return; }
    replace(this.panel, h("header", {}, h("h2", {}, words(fact).title)), { artifact: () => this.artifact(fact), call: () => this.call(fact), data: () => this.data(fact) }[fact.kind]());
  }

  /** Everything that can be reached against the edges. */
  ancestors(id) {
    const found = new Set();
    const todo = [id];
    while (todo.length) {
      const now = todo.pop();
      for (const [from, to] of this.edges) if (to === now && !found.has(from)) { found.add(from); todo.push(from); }
    }
    return [...found].map((each) => this.nodes.get(each));
  }

  artifact(fact) {
    const behind = this.ancestors(fact.id);
    const calls = behind.filter(({ kind }) => kind === "call");
    const data = behind.filter(({ kind }) => kind === "data");
    const makers = this.edges.filter(([, to]) => to === fact.id).map(([from]) => this.nodes.get(from));
    const parents = makers.flatMap((maker) => this.edges.filter(([, to]) => to === maker.id).map(([from]) => this.nodes.get(from)));
    const roots = calls.filter((call) => !this.edges.some(([, to]) => to === call.id));
    return h("div.body", {},
      h("dl.facts", {}, h("dt", {}, "Digest"), h("dd", {}, h("code", {}, fact.digest.slice(0, 16)), copyButton(fact.digest, "the digest")), fact.digest === this.digest ? null : [h("dt", {}, "Alone"), h("dd", {}, h("a", { href: lineageLink(this.run, fact.digest) }, "its own lineage"))]),
      section("Made by", makers.length ? this.links(makers) : h("p.quiet", {}, "an input of the run")),
      parents.length ? section("From", this.links(parents)) : null,
      section("Data at the roots", data.length || roots.length ? this.links([...data, ...roots]) : h("p.quiet", {}, "none")),
      section("Code", h("ul.parts", {}, makers.map(({ code }) => h("li", {}, h("span", {}, `${count(Object.keys(code?.parts ?? {}).length, "part")}`), h("code", {}, code?.digest.slice(0, 12)))))),
      makers[0]?.recipe.length ? section("Recipe", recipe(makers[0].recipe, this.run)) : null,
      section(`${count(calls.length, "step")} in all`, this.links([...calls].sort((a, b) => a.started - b.started))));
  }

  call(fact) {
    const parts = Object.entries(fact.code?.parts ?? {});
    const inputs = this.edges.filter(([, to]) => to === fact.id).map(([from]) => this.nodes.get(from));
    const outputs = this.edges.filter(([from]) => from === fact.id).map(([, to]) => this.nodes.get(to));
    return h("div.body", {},
      h("dl.facts", {},
        h("dt", {}, "Step"), h("dd", {}, h("a", { href: stepLink(fact.run_id, fact.call) }, fact.call)),
        h("dt", {}, "Run"), h("dd", {}, h("a", { href: runLink(fact.run_id) }, fact.run_id), fact.reused_in ? h("span.quiet", {}, ` reused in ${fact.reused_in.join(", ")}`) : null),
        h("dt", {}, "Took"), h("dd", {}, `${seconds(fact.seconds)}${fact.node ? ` on ${fact.node}` : ""}`), h("dt", {}, "Started"), h("dd", {}, when(fact.started))),
      section("Recipe", fact.recipe.length ? recipe(fact.recipe, this.run) : h("p.quiet", {}, "no settings")),
      section("Needs", inputs.length ? this.links(inputs) : h("p.quiet", {}, "nothing: a root")),
      section("Gives", this.links(outputs)),
      h("details", {}, h("summary", {}, `Code: ${count(parts.length, "part")}, fingerprint ${fact.code?.digest.slice(0, 12) ?? "unknown"}`), h("ul.parts", {}, parts.map(([name, digest]) => h("li", {}, h("span", {}, name), h("code", {}, digest.slice(0, 10)))))));
  }

  data(fact) {
    const users = this.edges.filter(([from]) => from === fact.id).map(([, to]) => this.nodes.get(to));
    return h("div.body", {}, h("dl.facts", {}, h("dt", {}, "File"), h("dd", {}, fact.name), h("dt", {}, "Content"), h("dd", {}, h("code", {}, fact.digest.slice(0, 16)), copyButton(fact.digest, "the digest"))), section("Read by", this.links(users)));
  }

  /** Several artifacts may have one name: who made this one. */
  maker(fact) {
    const [from] = fact.kind === "artifact" ? this.edges.find(([, to]) => to === fact.id) ?? [] : [];
    return from ? h("span.quiet", {}, ` by ${words(this.nodes.get(from)).title}`) : null;
  }

  links(facts) {
    return h("ul.links", {}, facts.map((fact) => h("li", {}, h("button.link", { type: "button", onclick: () => { this.pick(fact.id); this.scene.reveal(fact.id); } }, h("span", { "aria-hidden": "true" }, `${LOOKS[fact.kind].sign} `), words(fact).title), this.maker(fact))));
  }
}

function recipe(given, run) {
  return h("dl.tree.top", {}, given.map(({ name, value }) => [h("dt", {}, name), h("dd", {}, valueTree(value, run, 1))]));
}

function words(fact) {
  if (fact.kind === "artifact") return { title: fact.name || "artifact", detail: fact.digest.slice(0, 12) };
  if (fact.kind === "data") return { title: fact.name.split("/").pop() || fact.name, detail: fact.digest.slice(0, 12) };
  const where = fact.reused_in ? `from ${fact.run_id}` : seconds(fact.seconds);
  return { title: fact.call, detail: [short(fact.step) === fact.call.replace(/\[.*/, "") ? "" : short(fact.step), where].filter(Boolean).join(" · ") };
}
