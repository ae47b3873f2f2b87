// How numbers, times and statuses are written.

/** status -> how it is called, its sign (never colour alone), and the CSS variable with its colour. */
export const STATUS = {
  committed: { label: "committed", sign: "✓", colour: "--good" },
  finished: { label: "finished", sign: "✓", colour: "--good" },
  reused: { label: "reused", sign: "↺", colour: "--reused" },
  running: { label: "running", sign: "▸", colour: "--busy" },
  waiting: { label: "waiting to retry", sign: "↻", colour: "--wait" },
  pending: { label: "waiting", sign: "…", colour: "--ask" },
  "waiting-for-approval": { label: "waits for approval", sign: "?", colour: "--ask" },
  "waiting-for-event": { label: "waits for an event", sign: "…", colour: "--ask" },
  failed: { label: "failed", sign: "✗", colour: "--bad" },
  cancelled: { label: "cancelled", sign: "■", colour: "--idle" },
  interrupted: { label: "interrupted", sign: "‖", colour: "--idle" },
  submitted: { label: "submitted", sign: "·", colour: "--idle" },
  starting: { label: "starting", sign: "·", colour: "--idle" },
};

/** What matters most first: the order in counts, groups and bars. */
export const ORDER = [
  "failed", "waiting-for-approval", "waiting-for-event", "pending", "running", "waiting", "interrupted", "reused", "committed",
];

/** What a run does; "starting" where the service is about to go on with it. */
export function runStatus({ status: name, active }) {
  return active && ["interrupted", "failed", "cancelled"].includes(name) ? "starting" : name;
}

export function status(name) {
  return STATUS[name] ?? { label: String(name), sign: "·", colour: "--idle" };
}

/** 0.042 -> "42 ms", 4.2 -> "4.2 s", 75 -> "1:15", 3675 -> "1:01:15", 270000 -> "3 d 3 h". */
export function seconds(value) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "";
  if (value < 0) value = 0;
  if (value < 1) return `${Math.round(value * 1000)} ms`;
  if (value < 60) return `${value.toFixed(1)} s`;
  const whole = Math.floor(value);
  const [hours, minutes, rest] = [Math.floor(whole / 3600), Math.floor(whole / 60) % 60, whole % 60];
  if (hours >= 48) return `${Math.floor(hours / 24)} d ${hours % 24} h`;
  const two = (number) => String(number).padStart(2, "0");
  return hours ? `${hours}:${two(minutes)}:${two(rest)}` : `${minutes}:${two(rest)}`;
}

let told = null;

/** A saved page stands still: what ran when it was saved ran until then, and no longer. */
export function stopClock(time) {
  told = time;
}

/** Seconds since the epoch, by which what runs is measured. */
export function now() {
  return told ?? Date.now() / 1000;
}

export function ago(time, now = Date.now() / 1000) {
  const age = Math.max(0, now - time);
  if (age < 45) return "just now";
  if (age < 3600) return `${Math.round(age / 60)} min ago`;
  if (age < 86400) return `${Math.round(age / 3600)} h ago`;
  return `${Math.round(age / 86400)} d ago`;
}

export function when(time) {
  return time ? new Date(time * 1000).toLocaleString(undefined, { dateStyle: "medium", timeStyle: "medium" }) : "";
}

/** The time of day; with the date where that is another day. */
export function clock(time, now = new Date()) {
  if (!time) return "";
  const then = new Date(time * 1000);
  const day = then.toDateString() === now.toDateString() ? "" : `${then.toLocaleDateString(undefined, { month: "short", day: "numeric" })} `;
  return day + then.toLocaleTimeString();
}

export function bytes(size) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  while (size >= 1024 && unit < units.length - 1) [size, unit] = [size / 1024, unit + 1];
  return `${unit ? size.toFixed(size < 10 ? 1 : 0) : size} ${units[unit]}`;
}

export function number(value) {
  if (value === null || value === undefined) return "–";
  if (Number.isInteger(value) && Math.abs(value) < 1e7) return value.toLocaleString("en");
  const size = Math.abs(value);
  return size !== 0 && (size < 1e-3 || size >= 1e6) ? value.toExponential(2) : String(Number(value.toPrecision(4)));
}

export function count(value, noun) {
  return `${value.toLocaleString("en")} ${noun}${value === 1 ? "" : "s"}`;
}

/** "workflows.steps.text:tokenize" -> "tokenize". */
export function short(name) {
  return String(name ?? "").split(":").pop();
}
