// Layered layout of a graph, in the manner of Sugiyama: layers by longest path, order by barycentres, then positions
// that are as straight as the order allows. Linear in nodes and edges, so that 10,000 steps take well under a second.

const SWEEPS = 6;
const STRAIGHTENING = 8;
const MOST_BENDS = 6000;
const WRAP = 48;
const MOST_LOOSE = 6, APART = 80;

/** nodes: [{id, w, h}], edges: [[from, to]] by id. Gives {nodes: Map id -> {x, y}, edges: [{from, to, points, back}],
 *  box, vertical}; x, y is a node's middle. `aspect` is the window's width / height: the graph goes down or to the right,
 *  whichever shows it larger. Nodes without edges are a block of their own, beside the others. */
export function layout(nodes, edges, aspect = 1.6) {
  const tied = new Set(edges.filter(([a, b]) => a !== b).flat());
  const loose = nodes.filter((node) => !tied.has(node.id));
  if (loose.length <= MOST_LOOSE || loose.length === nodes.length) return layered(nodes, edges, aspect);
  const made = layered(nodes.filter((node) => tied.has(node.id)), edges, aspect);
  return beside(made, layered(loose, [], aspect));
}

/** Two layouts as one: the second to the right of a tall one, below a wide one. */
function beside(one, other) {
  const [width, height] = [one.box.right - one.box.left, one.box.bottom - one.box.top];
  const right = height > width;
  const dx = (right ? one.box.right + APART : one.box.left) - other.box.left;
  const dy = (right ? one.box.top : one.box.bottom + APART) - other.box.top;
  for (const at of other.nodes.values()) { at.x += dx; at.y += dy; }
  const box = { left: one.box.left, top: one.box.top, right: Math.max(one.box.right, other.box.right + dx), bottom: Math.max(one.box.bottom, other.box.bottom + dy) };
  return { nodes: new Map([...one.nodes, ...other.nodes]), edges: one.edges, box, vertical: one.vertical };
}

function layered(nodes, edges, aspect) {
  const index = new Map(nodes.map((node, position) => [node.id, position]));
  const known = edges.filter(([a, b]) => a !== b && index.has(a) && index.has(b)).map(([a, b]) => [index.get(a), index.get(b)]);
  const forward = withoutCycles(nodes.length, known);
  const layerOf = longestPaths(nodes.length, forward);
  const layers = [];
  layerOf.forEach((layer, node) => (layers[layer] ??= []).push(node));
  for (let i = 0; i < layers.length; i++) layers[i] ??= [];
  const down = shape(nodes, layers, true, aspect);
  const right = shape(nodes, layers, false, aspect);
  const size = ({ width, height }) => Math.min(aspect / width, 1 / height);
  const vertical = size(down) > size(right) * 1.05;
  return place(nodes, layers, forward, vertical, aspect);
}

/** Edges as {a, b, back}, those that close a circle turned around. Nodes are taken in the order in which they came. */
function withoutCycles(size, edges) {
  const next = Array.from({ length: size }, () => []);
  const waiting = new Int32Array(size);
  edges.forEach(([a, b], edge) => { next[a].push(edge); waiting[b] += 1; });
  const rank = new Int32Array(size).fill(-1);
  const ready = [];
  for (let node = 0; node < size; node++) if (!waiting[node]) ready.push(node);
  let ranked = 0, first = 0, head = 0;
  while (ranked < size) {
    let node;
    if (head < ready.length) node = ready[head++];
    else {
      while (rank[first] >= 0) first += 1;
      node = first;
    }
    if (rank[node] >= 0) continue;
    rank[node] = ranked++;
    for (const edge of next[node]) if (--waiting[edges[edge][1]] === 0) ready.push(edges[edge][1]);
  }
  return edges.map(([a, b]) => (rank[a] < rank[b] ? { a, b, back: false } : { a: b, b: a, back: true }));
}

function longestPaths(size, edges) {
  const next = Array.from({ length: size }, () => []);
  const waiting = new Int32Array(size);
  for (const { a, b } of edges) { next[a].push(b); waiting[b] += 1; }
  const layer = new Int32Array(size);
  const queue = [];
  for (let node = 0; node < size; node++) if (!waiting[node]) queue.push(node);
  for (let head = 0; head < queue.length; head++) {
    const node = queue[head];
    for (const other of next[node]) {
      layer[other] = Math.max(layer[other], layer[node] + 1);
      if (--waiting[other] === 0) queue.push(other);
    }
  }
  return layer;
}

const GAP = { along: 34, across: 18, bend: 9 };

/** A layer of very many is folded, unless the graph is as long as it is wide; one that is alone, to the window's form. */
function columnsOf(nodes, layer, layers, vertical, aspect) {
  if (layer.length <= 6) return 1;
  if (layers > 1) return Math.ceil(layer.length / Math.max(WRAP, layers));
  const { w, h } = nodes[layer[0]];
  const form = vertical ? (w + GAP.across) / (h + GAP.along) / aspect : ((h + GAP.across) / (w + GAP.along)) * aspect;
  return Math.max(1, Math.min(layer.length, Math.round(Math.sqrt(layer.length * form))));
}

/** How large the layers will be, roughly. */
function shape(nodes, layers, vertical, aspect) {
  let along = 0, across = 0;
  for (const layer of layers) {
    const columns = columnsOf(nodes, layer, layers.length, vertical, aspect);
    const long = Math.max(0, ...layer.map((node) => (vertical ? nodes[node].h : nodes[node].w)));
    const wide = layer.reduce((sum, node) => sum + (vertical ? nodes[node].w : nodes[node].h) + GAP.across, 0) / columns;
    along += (long + GAP.along) * columns;
    across = Math.max(across, wide);
  }
  return vertical ? { width: across || 1, height: along || 1 } : { width: along || 1, height: across || 1 };
}

function place(nodes, layers, edges, vertical, aspect) {
  // Long edges get a bend in every layer that they cross, so that they run between nodes and not through them.
  const items = nodes.map((node) => ({ size: vertical ? node.w : node.h, long: vertical ? node.h : node.w, up: [], down: [], at: 0 }));
  const rows = layers.map((layer) => layer.slice());
  const layerOf = new Int32Array(nodes.length);
  layers.forEach((layer, number) => layer.forEach((node) => { layerOf[node] = number; }));
  let bends = edges.reduce((sum, { a, b }) => sum + Math.max(0, layerOf[b] - layerOf[a] - 1), 0);
  const bent = bends <= MOST_BENDS;
  const chains = edges.map(({ a, b }) => {
    const chain = [a];
    for (let layer = layerOf[a] + 1; bent && layer < layerOf[b]; layer++) {
      items.push({ size: 4, long: 0, up: [], down: [], at: 0, bend: true });
      rows[layer].push(items.length - 1);
      chain.push(items.length - 1);
    }
    chain.push(b);
    for (let i = 1; i < chain.length; i++) { items[chain[i - 1]].down.push(chain[i]); items[chain[i]].up.push(chain[i - 1]); }
    return chain;
  });
  order(items, rows);
  positions(items, rows);
  return finish(nodes, items, rows, edges, chains, vertical, layers.map((layer) => columnsOf(nodes, layer, layers.length, vertical, aspect)));
}

function order(items, rows) {
  const place = (row) => row.forEach((item, position) => { items[item].rank = position; });
  rows.forEach(place);
  for (let sweep = 0; sweep < SWEEPS; sweep++) {
    const side = sweep % 2 ? "down" : "up";
    const around = sweep % 2 ? [...rows].reverse() : rows;
    for (const row of around) {
      for (const item of row) {
        const near = items[item][side];
        items[item].want = near.length ? near.reduce((sum, other) => sum + items[other].rank, 0) / near.length : items[item].rank;
      }
      row.sort((a, b) => items[a].want - items[b].want || items[a].rank - items[b].rank);
      place(row);
    }
  }
}

/** Each row as close to its neighbours' middle as the order and the sizes allow. */
function positions(items, rows) {
  for (const row of rows) settle(items, row, row.map(() => 0), true);
  const widest = rows.reduce((best, row) => Math.max(best, row.length), 0);
  if (widest > WRAP * 4) return;
  for (let sweep = 0; sweep < STRAIGHTENING; sweep++) {
    const side = sweep % 2 ? "down" : "up";
    for (const row of sweep % 2 ? [...rows].reverse() : rows) {
      settle(items, row, row.map((item) => {
        const near = items[item][side];
        if (!near.length) return items[item].at;
        const sorted = near.map((other) => items[other].at).sort((a, b) => a - b);
        return (sorted[(sorted.length - 1) >> 1] + sorted[sorted.length >> 1]) / 2;
      }));
    }
  }
}

/** Least squares under an order: pool adjacent violators. */
function settle(items, row, wants, centre = false) {
  if (!row.length) return;
  const offsets = [0];
  for (let i = 1; i < row.length; i++) {
    const [before, item] = [items[row[i - 1]], items[row[i]]];
    offsets.push(offsets[i - 1] + (before.size + item.size) / 2 + (before.bend || item.bend ? GAP.bend : GAP.across));
  }
  if (centre) {
    row.forEach((item, i) => { items[item].at = offsets[i] - offsets[offsets.length - 1] / 2; });
    return;
  }
  const blocks = [];
  for (let i = 0; i < row.length; i++) {
    let block = { sum: wants[i] - offsets[i], count: 1, mean: wants[i] - offsets[i] };
    while (blocks.length && blocks[blocks.length - 1].mean > block.mean) {
      const last = blocks.pop();
      block = { sum: block.sum + last.sum, count: block.count + last.count };
      block.mean = block.sum / block.count;
    }
    blocks.push(block);
  }
  let i = 0;
  for (const block of blocks) for (let k = 0; k < block.count; k++, i++) items[row[i]].at = block.mean + offsets[i];
}

function finish(nodes, items, rows, edges, chains, vertical, folds) {
  let along = 0;
  for (const [number, row] of rows.entries()) {
    const real = row.filter((item) => !items[item].bend);
    const columns = folds[number] || 1;
    const long = Math.max(0, ...row.map((item) => items[item].long));
    if (columns > 1) wrap(items, real, columns, long, along);
    for (const item of row) if (columns === 1 || items[item].bend) items[item].along = along + long / 2;
    along += columns * (long + GAP.along);
  }
  const point = (item) => (vertical ? { x: items[item].at, y: items[item].along } : { x: items[item].along, y: items[item].at });
  const placed = new Map(nodes.map((node, position) => [node.id, point(position)]));
  const box = { left: Infinity, top: Infinity, right: -Infinity, bottom: -Infinity };
  for (const node of nodes) {
    const { x, y } = placed.get(node.id);
    box.left = Math.min(box.left, x - node.w / 2); box.right = Math.max(box.right, x + node.w / 2);
    box.top = Math.min(box.top, y - node.h / 2); box.bottom = Math.max(box.bottom, y + node.h / 2);
  }
  if (!nodes.length) Object.assign(box, { left: 0, top: 0, right: 1, bottom: 1 });
  const lines = edges.map(({ a, b, back }, number) => ({
    from: nodes[back ? b : a].id, to: nodes[back ? a : b].id, back, points: line(nodes, chains[number], point, vertical),
  }));
  return { nodes: placed, edges: lines, box, vertical };
}

/** A layer of very many becomes several columns (or rows). */
function wrap(items, real, columns, long, along) {
  const each = Math.ceil(real.length / columns);
  real.forEach((item, position) => {
    const row = position % each;
    items[item].at = (row - (each - 1) / 2) * (items[item].size + GAP.across);
    items[item].along = along + Math.floor(position / each) * (long + GAP.along) + long / 2;
  });
}

/** From a node's edge through the bends to the other's. */
function line(nodes, chain, point, vertical) {
  const points = chain.map(point);
  const [first, last] = [points[0], points[points.length - 1]];
  const [from, to] = [nodes[chain[0]], nodes[chain[chain.length - 1]]];
  if (vertical) { first.y += from.h / 2; last.y -= to.h / 2; } else { first.x += from.w / 2; last.x -= to.w / 2; }
  return points;
}
