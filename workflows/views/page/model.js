// One run as the page knows it: its steps, brought up to date with what changed.

import { runPath } from "./api.js";
import { now, ORDER } from "./format.js";

export class RunModel {
  constructor(api, id) {
    Object.assign(this, { api, id, summary: null, live: true, version: 0, revision: 0, shape: 0 });
    this.steps = new Map();
    this.list = [];
  }

  /** Ask what is new. Returns whether anything is. */
  async refresh() {
    const answer = await this.api.get(`${runPath(this.id)}/steps`, { after: this.version });
    const turned = this.live !== answer.live || this.status !== answer.status;
    if (answer.reset && this.version) {
      this.steps.clear();
      this.list = [];
      this.shape += 1;
    }
    for (const row of answer.steps) this.put(row);
    this.version = answer.version;
    this.live = answer.live;
    this.status = answer.status;
    const changed = turned || answer.steps.length > 0 || answer.reset;
    if (changed) this.revision += 1;
    this.ticks = (this.ticks ?? 0) + 1;
    const before = JSON.stringify(this.summary);
    if (changed || !this.summary || (this.summary.active && !this.live) || this.ticks % 5 === 0) this.summary = await this.api.get(runPath(this.id));
    return changed || before !== JSON.stringify(this.summary);
  }

  /** `shape` counts changes of calls and edges, `revision` all changes. */
  put(row) {
    row.needs ??= [];
    const known = this.steps.get(row.id);
    if (!known) {
      row.index = this.list.length;
      this.list.push(row);
      this.steps.set(row.id, row);
      this.shape += 1;
      return;
    }
    if (row.needs.length !== known.needs.length) this.shape += 1;
    for (const name of Object.keys(known)) if (!(name in row) && name !== "index") delete known[name];
    Object.assign(known, row);
  }

  /** Without a driver nothing runs, whatever was said last. */
  statusOf(step) {
    return !this.live && (step.status === "running" || step.status === "waiting") ? "interrupted" : step.status;
  }

  /** Seconds that a step took, or takes so far. */
  secondsOf(step, until = now()) {
    if (step.seconds !== undefined && step.seconds !== null) return step.seconds;
    if (!step.started) return null;
    if (step.ended) return step.ended - step.started;
    return this.live || step.status.startsWith("waiting-for") ? Math.max(0, until - step.started) : null;
  }

  counts(steps = this.list) {
    const found = {};
    for (const step of steps) {
      const name = this.statusOf(step);
      found[name] = (found[name] ?? 0) + 1;
    }
    return found;
  }

  asking() {
    return this.list.filter((step) => step.status === "waiting-for-approval" || step.status === "waiting-for-event");
  }
}

/** Counts as [status, number], what matters most first. */
export function ordered(counts) {
  const names = [...ORDER, ...Object.keys(counts).filter((name) => !ORDER.includes(name))];
  return names.filter((name) => counts[name]).map((name) => [name, counts[name]]);
}
