// Small pieces that several views show: chips, bars, dialogs, trees of values.

import { h, replace, svg } from "./dom.js";
import { count, number, status } from "./format.js";
import { ordered } from "./model.js";

/** A status as sign and word. */
export function chip(name, title) {
  const known = status(name);
  return h("span.chip", { dataset: { status: name }, title: title ?? "" }, h("span.sign", { "aria-hidden": "true" }, known.sign), known.label);
}

/** How far a run is: one stretch per status. */
export function bar(counts) {
  const total = Object.values(counts).reduce((sum, value) => sum + value, 0);
  const done = (counts.committed ?? 0) + (counts.reused ?? 0);
  const words = ordered(counts).map(([name, value]) => `${value.toLocaleString("en")} ${status(name).label}`).join(", ");
  const stretches = [...ordered(counts)].reverse().map(([name, value]) => {
    const part = h("i", { dataset: { status: name } });
    part.style.flexGrow = value;
    return part;
  });
  return h("div.bar", { role: "img", "aria-label": words || "no steps yet", title: words || "no steps yet", dataset: { done, total } }, stretches);
}

export function progressWords(counts) {
  const total = Object.values(counts).reduce((sum, value) => sum + value, 0);
  const done = (counts.committed ?? 0) + (counts.reused ?? 0);
  return total ? `${done.toLocaleString("en")} of ${count(total, "step")}` : "no steps yet";
}

export function empty(title, ...more) {
  return h("div.empty", {}, h("strong", {}, title), ...more.map((line) => (typeof line === "string" ? h("p", {}, line) : line)));
}

/** A message over the page that goes by itself (errors stay until they are closed). */
export function notice(message, kind = "info") {
  const box = h(`div.notice.${kind}`, {}, h("span", {}, message));
  box.append(h("button.quiet", { type: "button", "aria-label": "Close this message", onclick: () => box.remove() }, "✕"));
  document.getElementById("notices").append(box);
  if (kind !== "error") setTimeout(() => box.remove(), 6000);
}

/** Ask before something is done. Resolves to null, or to what was typed ("" where nothing is asked for). */
export function confirm({ title, body, action, danger = false, comment = null }) {
  return new Promise((resolve) => {
    const input = comment === null ? null : h("textarea", { rows: 2, placeholder: comment, "aria-label": comment, maxLength: 2000 });
    const box = h("dialog.dialog", { "aria-labelledby": "dialog-title" },
      h("form", { method: "dialog" },
        h("h2", { id: "dialog-title" }, title),
        typeof body === "string" ? h("p", {}, body) : body,
        input,
        h("div.buttons", {},
          h("button", { value: "no", type: "submit", formNoValidate: true }, "Back"),
          h(`button.${danger ? "danger" : "primary"}`, { value: "yes", type: "submit", autofocus: input === null }, action))));
    box.addEventListener("close", () => {
      box.remove();
      resolve(box.returnValue === "yes" ? input?.value.trim() ?? "" : null);
    });
    document.body.append(box);
    box.showModal();
    input?.focus();
  });
}

/** A value as a tree that opens; artifacts link to their lineage. */
export function valueTree(value, run, open = 1) {
  if (value && typeof value === "object") {
    if (value.$artifact) return artifactLink(value.$artifact, run);
    const entries = Array.isArray(value) ? value.map((item, index) => [String(index), item]) : Object.entries(value);
    if (!entries.length) return h("span.literal", {}, Array.isArray(value) ? "[]" : "{}");
    const brief = Array.isArray(value) ? `${count(entries.length, "item")}` : entries.map(([name]) => name).join(", ");
    const body = h("dl.tree", {});
    const box = h("details.value", { open: open > 0 }, h("summary", {}, h("span.brief", {}, brief.length > 90 ? `${brief.slice(0, 90)}…` : brief), h("span.size", {}, count(entries.length, Array.isArray(value) ? "item" : "field"))), body);
    const fill = () => {
      if (body.childElementCount) return;
      for (const [name, item] of entries.slice(0, 500)) body.append(h("dt", {}, name), h("dd", {}, valueTree(item, run, open - 1)));
      if (entries.length > 500) body.append(h("dt", {}, "…"), h("dd.quiet", {}, `${entries.length - 500} more`));
    };
    if (open > 0) fill();
    box.addEventListener("toggle", fill);
    return box;
  }
  if (typeof value === "string") return h(value.includes("\n") ? "pre.literal" : "span.literal.text", {}, value);
  return h("span.literal", {}, typeof value === "number" ? number(value) : String(value));
}

export function artifactLink(artifact, run) {
  return h("a.artifact", { href: lineageLink(run, artifact.digest), title: `Where artifact ${artifact.digest} comes from` },
    "◆ ", artifact.name || "artifact", " ", h("code", {}, artifact.digest.slice(0, 12)));
}

export const runLink = (run) => `#/runs/${encodeURIComponent(run)}`;
export const stepLink = (run, call, view) => `${runLink(run)}/steps/${encodeURIComponent(call)}${view ? `?view=${view}` : ""}`;
export const lineageLink = (run, digest) => `${runLink(run)}/artifacts/${digest}`;

export function copyButton(value, what) {
  return h("button.quiet.copy", {
    type: "button", title: `Copy ${what}`, "aria-label": `Copy ${what}`,
    onclick: async (event) => {
      const button = event.currentTarget;
      try {
        await navigator.clipboard.writeText(value);
        replace(button, "✓");
        setTimeout(() => replace(button, copyIcon()), 1200);
      } catch {
        notice(`could not copy ${what}`, "error");
      }
    },
  }, copyIcon());
}

function copyIcon() {
  return svg("svg", { width: 13, height: 13, viewBox: "0 0 16 16", fill: "none", stroke: "currentColor", "stroke-width": 1.6, "aria-hidden": "true" },
    svg("rect", { x: 5.5, y: 5.5, width: 9, height: 9, rx: 2 }), svg("path", { d: "M10.5 5.5v-2a2 2 0 0 0-2-2h-5a2 2 0 0 0-2 2v5a2 2 0 0 0 2 2h2" }));
}
