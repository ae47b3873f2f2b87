// Which page the address means, the token, and whether the service answers.

import { Api, SavedRun } from "./api.js";
import { h, replace, text } from "./dom.js";
import { stopClock, when } from "./format.js";
import { LineagePage } from "./lineage.js";
import { empty, runLink } from "./parts.js";
import { RunPage } from "./run.js";
import { RunsPage } from "./runs.js";

const main = document.getElementById("main");
const crumbs = document.getElementById("crumbs");
const connection = document.getElementById("connection");
const saved = document.getElementById("saved-run");
const api = saved ? new SavedRun(JSON.parse(saved.textContent)) : new Api(() => askForToken());
let page = null;
let key = "";
let asking = null;

/** "#/runs/r-1/steps/train%5B0%5D?view=timeline" -> {run, call, digest, view} */
function route() {
  const [path, query] = location.hash.replace(/^#\/?/, "").split("?");
  const [, run, kind, rest] = path.split("/").map((part) => decodeURIComponent(part));
  return { run, call: kind === "steps" ? rest ?? null : null, digest: kind === "artifacts" ? rest : null, view: new URLSearchParams(query ?? "").get("view") };
}

/** The token of `#token=...` is taken and leaves the address bar, the history and the referrer. */
function takeToken() {
  if (saved) return;
  const found = /^#token=([^&]+)(?:&(.*))?$/.exec(location.hash);
  if (!found) return;
  api.setToken(decodeURIComponent(found[1]));
  history.replaceState(null, "", `${location.pathname}${location.search}#${found[2] ?? "/runs"}`);
}

function open() {
  takeToken();
  const { run, call, digest, view } = route();
  const wanted = JSON.stringify([run, digest]);
  document.title = run ? `${call ?? run} – recua` : "Runs – recua";
  breadcrumbs(run, digest);
  if (wanted !== key || !page) {
    page?.close();
    document.querySelectorAll(".notice.error").forEach((each) => each.remove());
    key = wanted;
    page = !run ? new RunsPage(api, state) : digest ? new LineagePage(api, run, digest) : new RunPage(api, run, state);
    replace(main, page.element);
    if (digest) load(page);
  }
  page.go?.(view, call);
}

async function load(lineage) {
  try {
    await lineage.load();
    state(null);
  } catch (error) {
    state(error, 3000);
    if (error.status === 404 || error.status === 400) replace(main, empty("This artifact cannot be shown", error.message));
    else if (page === lineage) setTimeout(() => page === lineage && load(lineage), 3000);
  }
}

function breadcrumbs(run, digest) {
  const parts = [h("a", { href: "#/runs" }, "Runs")];
  if (run) parts.push(h("span", { "aria-hidden": "true" }, "/"), h("a", { href: runLink(run) }, run));
  if (digest) parts.push(h("span", { "aria-hidden": "true" }, "/"), h("span", {}, digest.slice(0, 12)));
  replace(crumbs, parts);
}

/** Tells whether the service answers; what is on the page stays there meanwhile. */
function state(error, pause) {
  if (!error) {
    connection.className = "";
    text(connection, saved ? `Report of ${when(api.written)}` : "");
  } else if (error.status === 0 || error.status >= 500) {
    connection.className = "gone";
    text(connection, `The service does not answer. Trying again every ${Math.max(1, Math.round(pause / 1000))} s; what you see may be old.`);
  } else if (error.status === 404 || error.status === 400 || error.status === 422) {
    connection.className = "";
    page?.close();
    replace(main, empty("There is no such run", error.message, h("p", {}, h("a", { href: "#/runs" }, "All runs"))));
  }
}

async function askForToken() {
  if (asking) return;
  const wrong = Boolean(api.token);
  const input = h("input", { type: "password", name: "token", required: true, autocomplete: "current-password", "aria-label": "Token", placeholder: "Token" });
  const keep = h("input", { type: "checkbox" });
  const box = h("dialog.dialog", { "aria-labelledby": "token-title" },
    h("form", { method: "dialog" },
      h("h2", { id: "token-title" }, "Token"),
      wrong ? h("p.wrong", { role: "alert" }, "The service does not accept this token.") : null,
      h("p", {}, h("code", {}, "recua up"), " prints the page's address with its token, and keeps the token in a file of yours."),
      input, h("label.choice", {}, keep, "remember it in this browser"),
      h("div.buttons", {}, h("button.primary", { type: "submit", value: "yes" }, "Go on"))));
  asking = box;
  box.addEventListener("cancel", (event) => event.preventDefault());
  box.addEventListener("close", () => {
    box.remove();
    asking = null;
    api.setToken(input.value.trim(), keep.checked);
    key = "";
    open();
  });
  document.body.append(box);
  box.showModal();
  input.focus();
}

window.addEventListener("hashchange", open);
if (saved) {
  stopClock(api.written);
  if (!location.hash) history.replaceState(null, "", `${runLink(api.answers.run.run_id)}?view=results`);
}
open();
