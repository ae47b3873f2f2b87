// Which nodes a graph of very many steps shows: steps with the same parent or of the same kind are one group, which opens
// into parts, and those into steps.

const MOST_SHOWN = 300;
const MOST_PARTS = 120;
const AT_FIRST = 150;
const ENOUGH = 12;

/** True where a graph of so many steps begins grouped. */
export const isLarge = (size) => size > MOST_SHOWN;

/** The visible nodes: [{key, label, members, group}], `group` where it stands for several. `open`: keys of opened
 *  groups. */
export function visible(steps, open, everything) {
  if (everything || !isLarge(steps.length)) return steps.map(single);
  return parts({ key: "", members: steps, depth: 0 }).flatMap((unit) => opened(unit, open));
}

/** The groups that are open at first: the largest ones, until there is something to see, if the graph stays small. */
export function openAtFirst(steps) {
  const [open, tight] = [new Set(), new Set()];
  let shown = isLarge(steps.length) ? parts({ key: "", members: steps, depth: 0 }) : [];
  for (;;) {
    const largest = shown.filter((unit) => unit.group && !tight.has(unit.key)).reduce((a, b) => (a && a.members.length >= b.members.length ? a : b), null);
    if (!largest || shown.length >= ENOUGH) return open;
    const inside = parts(largest);
    if (shown.length + inside.length > AT_FIRST) tight.add(largest.key);
    else {
      open.add(largest.key);
      shown = shown.flatMap((unit) => (unit === largest ? inside : [unit]));
    }
  }
}

function opened(unit, open) {
  return unit.group && open.has(unit.key) ? parts(unit).flatMap((part) => opened(part, open)) : [unit];
}

const single = (step) => ({ key: step.id, label: step.id, members: [step], group: false });
const kind = (segment) => segment.replace(/\[[^\]]*\]$/, "");

/** A group by the first part of its members' paths in which they differ: by name, or by index, or by ranges of indexes
 *  where there are very many. */
function parts({ key, members, depth }) {
  const paths = members.map((step) => step.id.split("/"));
  let level = depth;
  while (paths.every((path) => path.length > level + 1 && path[level] === paths[0][level])) level += 1;
  const prefix = paths[0].slice(0, level).map((part) => `${part}/`).join("");
  const kinds = bucket(members, paths, (path) => kind(path[level] ?? ""));
  if (kinds.size > 1) return [...kinds].map(([name, inside]) => unit(`${key}>${name}`, `${prefix}${name}`, inside, level));
  const names = bucket(members, paths, (path) => path[level] ?? "");
  if (names.size <= MOST_PARTS) return [...names].map(([name, inside]) => unit(`${key}>${name}`, `${prefix}${name}`, inside, level + 1));
  const all = [...names.keys()];
  const size = Math.ceil(all.length / Math.min(100, Math.ceil(Math.sqrt(all.length))));
  const ranges = [];
  for (let start = 0; start < all.length; start += size) {
    const chosen = all.slice(start, start + size);
    const label = `${prefix}${chosen[0].replace(/\]$/, "")} … ${chosen[chosen.length - 1].slice(kind(chosen[0]).length + 1)}`;
    ranges.push(unit(`${key}>${chosen[0]}..`, label, chosen.flatMap((name) => names.get(name)), level));
  }
  return ranges;
}

function unit(key, label, members, depth) {
  return members.length === 1 ? single(members[0]) : { key, label, members, depth, group: true };
}

function bucket(members, paths, name) {
  const found = new Map();
  members.forEach((step, index) => {
    const key = name(paths[index]);
    const list = found.get(key);
    if (list) list.push(step);
    else found.set(key, [step]);
  });
  return found;
}

/** Edges between visible nodes, each once. Who needs a call that is no step (a map, a nested workflow) needs its steps. */
export function edgesBetween(nodes) {
  const home = new Map();
  for (const node of nodes) for (const step of node.members) home.set(step.id, [node.key]);
  const inside = new Map();
  for (const node of nodes) for (const { id } of node.members) for (const parent of parents(id)) {
    if (!home.has(parent)) inside.set(parent, (inside.get(parent) ?? new Set()).add(node.key));
  }
  const found = [];
  for (const node of nodes) {
    const sources = new Set();
    for (const step of node.members) for (const need of step.needs) for (const key of home.get(need) ?? inside.get(need) ?? []) sources.add(key);
    sources.delete(node.key);
    for (const source of sources) found.push([source, node.key]);
  }
  return found;
}

/** "a[0]/b[1]/c[2]" -> "a[0]", "a[0]/b[1]". */
function* parents(id) {
  for (let at = id.indexOf("/"); at >= 0; at = id.indexOf("/", at + 1)) yield id.slice(0, at);
}
