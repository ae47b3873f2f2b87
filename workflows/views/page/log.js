// What a step printed: its end first, followed live while it runs.

import { runPath } from "./api.js";
import { h, text } from "./dom.js";
import { bytes } from "./format.js";

const TAIL = 128 << 10;
const MOST_LETTERS = 2_000_000;

export class LogBox {
  constructor(api, run, call) {
    Object.assign(this, { api, run, call, offset: null, attempt: "", attempts: [], ended: false, generation: 0 });
    this.lines = h("pre.log", { tabIndex: 0, "aria-label": "Log", onscroll: () => this.scrolled() });
    this.follow = h("input", { type: "checkbox", checked: true, onchange: () => this.down() });
    this.choose = h("select", { "aria-label": "Attempt", hidden: true, onchange: () => this.restart(this.choose.value) });
    this.facts = h("span.quiet", { role: "status" });
    this.older = h("button", { type: "button", hidden: true, onclick: () => this.whole() }, "Show all from the beginning");
    this.element = h("div.logbox", {}, h("div.tools", {}, this.choose, h("label.choice", {}, this.follow, "follow"), this.older, this.facts), this.lines);
  }

  restart(attempt, offset = null) {
    Object.assign(this, { attempt, offset, ended: false });
    this.generation += 1;
    this.lines.replaceChildren();
    return this.refresh();
  }

  whole() {
    this.follow.checked = false;
    return this.restart(this.attempt, 0);
  }

  /** Ask for what is new; goes on at once where there is more than one piece. */
  async refresh() {
    if (this.ended || this.busy === this.generation) return;
    const mine = this.generation;
    this.busy = mine;
    try {
      for (let pieces = 0; pieces < 40; pieces++) {
        const answer = await this.api.get(`${runPath(this.run)}/log`, { id: this.call, attempt: this.attempt, offset: this.offset ?? -TAIL });
        if (mine !== this.generation) return;
        const more = answer.text.length > 0 && this.offset !== null;
        this.add(answer);
        if (this.ended || !more || !answer.text) break;
      }
    } finally {
      if (this.busy === mine) this.busy = null;
    }
  }

  add({ text: piece, start, offset, attempts = [], attempt, ended }) {
    const first = this.offset === null;
    if (first) this.older.hidden = start === 0;
    else if (start === 0) this.older.hidden = true;
    Object.assign(this, { offset, ended });
    if (attempt) this.attempt = attempt;
    if (attempts.join() !== this.attempts.join()) {
      this.attempts = attempts;
      this.choose.replaceChildren(...attempts.map((id, position) => h("option", { value: id }, `attempt ${position + 1}`)));
      this.choose.hidden = attempts.length < 2;
    }
    this.choose.value = this.attempt;
    if (piece) {
      this.lines.append(piece.replace(/\x1b\[[0-9;]*[A-Za-z]/g, ""));
      while (this.lines.childNodes.length > 2 && this.lines.textContent.length > MOST_LETTERS) this.lines.firstChild.remove();
      if (this.follow.checked) this.down();
    }
    text(this.facts, offset ? `${bytes(offset)}${ended ? "" : ", more may come"}` : ended ? "It printed nothing." : "It has printed nothing yet.");
  }

  down() {
    if (this.follow.checked) this.lines.scrollTop = this.lines.scrollHeight;
  }

  scrolled() {
    const { scrollTop, scrollHeight, clientHeight } = this.lines;
    const bottom = scrollHeight - scrollTop - clientHeight < 24;
    if (!bottom && this.follow.checked && scrollHeight > clientHeight && this.last > scrollTop) this.follow.checked = false;
    this.last = scrollTop;
  }
}
