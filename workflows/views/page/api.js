// Requests to the service, and asking again and again.

const KEY = "recua-token";
const DEADLINE_MS = 30_000;

/** status 0: the service could not be reached. */
export class ApiError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

export class Api {
  constructor(onUnauthorised) {
    this.onUnauthorised = onUnauthorised;
    this.token = sessionStorage.getItem(KEY) ?? localStorage.getItem(KEY) ?? "";
  }

  /** Kept for this tab; for this browser only where the user says so. */
  setToken(token, remember = false) {
    this.token = token;
    sessionStorage.setItem(KEY, token);
    if (remember) localStorage.setItem(KEY, token);
    else localStorage.removeItem(KEY);
  }

  get(path, query = {}) {
    const known = Object.entries(query).filter(([, value]) => value !== undefined && value !== null && value !== "");
    const search = new URLSearchParams(known).toString();
    return this.request("GET", search ? `${path}?${search}` : path);
  }

  post(path, body = {}) {
    return this.request("POST", path, body);
  }

  async request(method, path, body) {
    const headers = { Accept: "application/json" };
    if (this.token) headers.Authorization = `Bearer ${this.token}`;
    if (body !== undefined) headers["Content-Type"] = "application/json";
    const abort = new AbortController();
    const timer = setTimeout(() => abort.abort(), DEADLINE_MS);
    let response, answer;
    try {
      response = await fetch(`api/v1${path}`, {
        method, headers, signal: abort.signal, cache: "no-store", body: body === undefined ? undefined : JSON.stringify(body),
      });
      answer = await response.text();
    } catch {
      throw new ApiError(0, "the service does not answer");
    } finally {
      clearTimeout(timer);
    }
    if (response.status === 401) {
      this.onUnauthorised();
      throw new ApiError(response.status, "a valid token is needed");
    }
    if (!response.ok) throw new ApiError(response.status, complaint(answer) || response.statusText);
    return answer ? JSON.parse(answer) : null;
  }
}

/** One run as `recua report` saved it in the page: nothing is asked of a service, and nothing can be done. */
export class SavedRun {
  constructor(answers) {
    Object.assign(this, { answers, written: answers.written });
  }

  async get(path, { id, attempt, digest, after } = {}) {
    const { run, step, log, ...others } = this.answers;
    const [, , name, kind = "run"] = path.split("/");
    if (name === undefined) return [run];
    const whole = { ...others, run, step: step[id], log: log.find((each) => each.id === id && (!attempt || each.attempt === attempt)) };
    const found = decodeURIComponent(name) === run.run_id ? whole[kind] : undefined;
    if (kind === "log" && !found) return { text: `Not in this report; recua logs ${run.run_id} ${id}\n`, offset: 0, start: 0, attempts: [], ended: true };
    if (!found) throw new ApiError(404, `${id || digest || name} is not in this report; recua up serves the whole run`);
    return after ? { ...found, reset: false, steps: [], curves: [], events: [] } : found;
  }

  async post() {
    throw new ApiError(400, "a report can only be read; answer with recua approve or recua send");
  }
}

export const runPath = (run) => `/runs/${encodeURIComponent(run)}`;

/** The sentence in an error's body. */
function complaint(answer) {
  try {
    const { detail, error, message } = JSON.parse(answer);
    const found = detail ?? error ?? message ?? "";
    if (Array.isArray(found)) return found.map((each) => each.msg ?? String(each)).join("; ");
    return typeof found === "string" ? found : found.message ?? JSON.stringify(found);
  } catch {
    return answer.slice(0, 300);
  }
}

/** Calls `ask()` again and again: every `every()` ms (Infinity: once), seldom while nobody looks, with growing pauses while the service
 *  is gone. `onState(error or null, ms until the next try)`. */
export class Poller {
  constructor(ask, every, onState) {
    Object.assign(this, { ask, every, onState, failures: 0, stopped: false, timer: 0, busy: false });
    this.wake = () => { if (!document.hidden) this.now(); };
    document.addEventListener("visibilitychange", this.wake);
    this.now();
  }

  async now() {
    clearTimeout(this.timer);
    if (this.stopped || this.busy) return;
    this.busy = true;
    let pause;
    try {
      await this.ask();
      this.failures = 0;
      pause = this.every();
      if (document.hidden) pause = Math.max(pause, 15_000);
      if (!this.stopped) this.onState(null, pause);
    } catch (error) {
      if (!(error instanceof ApiError)) console.error(error);
      this.failures += 1;
      pause = Math.min(10_000, 1000 * 2 ** Math.min(this.failures - 1, 4));
      if (error.status === 401) pause = 60_000;
      if (!this.stopped) this.onState(error, pause);
    } finally {
      this.busy = false;
    }
    if (!this.stopped && pause < Infinity) this.timer = setTimeout(() => this.now(), pause);
  }

  stop() {
    this.stopped = true;
    clearTimeout(this.timer);
    document.removeEventListener("visibilitychange", this.wake);
  }
}
