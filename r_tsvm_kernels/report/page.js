"use strict";
const report = JSON.parse(document.getElementById("data").textContent);
const rows = report.rows.map((row) => Object.fromEntries(report.fields.map((field, i) => [field, row[i]])));
const $ = (id) => document.getElementById(id);

// All data reach the document as text, never as markup.
function element(tag, properties, ...children) {
  const made = document.createElement(tag);
  for (const [key, value] of Object.entries(properties || {})) {
    if (key in made) made[key] = value;
    else made.setAttribute(key, value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}
function drawn(tag, attributes) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

// --- numbers

const isNumber = (x) => typeof x === "number" && Number.isFinite(x);
const mean = (list) => (list && list.length ? list.reduce((a, b) => a + b, 0) / list.length : null);
function number(x) {
  if (!isNumber(x)) return "\u2013";
  if (Number.isInteger(x)) return x.toLocaleString("en");
  const size = Math.abs(x);
  return size < 1e-3 || size >= 1e6 ? x.toExponential(1) : String(Number(x.toPrecision(3)));
}
const percent = (x) => (isNumber(x) ? `${Number((100 * x).toPrecision(3))} %` : "\u2013");
const list = (values, format = number) => (values && values.length ? values.map(format).join(" \u00b7 ") : "\u2013");
function scaled(x, units, step) {
  if (!isNumber(x)) return "\u2013";
  let i = 0;
  while (x >= step && i < units.length - 1) { x /= step; i += 1; }
  return `${i ? Number(x.toPrecision(3)) : x} ${units[i]}`.trim();
}
const bytes = (x) => scaled(x, ["B", "kB", "MB", "GB", "TB"], 1000);
const count = (x) => scaled(x, ["", "K", "M", "B", "T"], 1000);
function seconds(x) {
  if (!isNumber(x)) return "\u2013";
  if (x < 1) return `${number(1000 * x)} ms`;
  if (x < 120) return `${Number(x.toPrecision(3))} s`;
  return x < 7200 ? `${(x / 60).toFixed(1)} min` : `${(x / 3600).toFixed(1)} h`;
}

// --- summary

const summary = report.summary;
$("title").textContent = report.name;
$("subtitle").textContent = `${report.method.pretty_name}, base ${report.base}`;

function tile(label, value, more, warn) {
  $("tiles").append(element("div", {},
    element("dt", { textContent: label }),
    element("dd", { className: warn ? "value warn" : "value", textContent: value }),
    more ? element("dd", { className: "more", textContent: more }) : null));
}
const energy = summary.captured_energy, largest = summary.largest_error;
const within = !largest || largest.error <= largest.tolerance;
const growth = isNumber(summary.update_norm) && mean(summary.task_norms) ? summary.update_norm / mean(summary.task_norms) : null;
const treatments = Object.entries(summary.treatments).map(([name, n]) => `${number(n)} ${name}`).join(", ");
tile("Tensors", number(summary.tensors), treatments);
tile("Parameters", count(summary.elements), `${bytes(report.bytes_written)} written`);
tile("Time", seconds(report.seconds), report.resumed_tensors
  ? `last run; ${number(report.resumed_tensors)} tensors were finished before` : `${bytes(report.bytes_read)} read`);
if (energy) tile("Captured energy", percent(energy.mean), `mean; least ${percent(energy.least)}`, energy.mean < 0.5);
if (isNumber(summary.interference)) tile("Interference", number(summary.interference), "mean; 0: independent tasks, 1: same subspaces");
if (largest) {
  tile("Largest error estimate", number(largest.error), `tolerance ${number(largest.tolerance)}; ${largest.tensor}`, !within);
  tile("Recomputed", number(summary.escalated), "tensors that needed a more exact solver");
  if (summary.arbitrary) tile("Arbitrary choices", number(summary.arbitrary), "tensors with equal singular values at the cut");
}
const rounding = summary.rounding;
if (rounding) tile("Rounding to FP8", percent(rounding.relative), `of the weights, in norm; at most ${percent(rounding.largest.relative)}: ${rounding.largest.tensor}`);
if (growth !== null) tile("Norm of the update", number(summary.update_norm), `${number(growth)} x the mean norm of the task vectors`);

// --- what the figures mean, and what to do next

const advice = (report.notes || []).map((note) => ["Note", note]), scale = "alpha" in report.parameters ? "alpha" : "weight";
if (report.vocabulary) advice.push(["Vocabulary", report.vocabulary.lines.join("; ")]);
if (largest) {
  advice.push(["Error estimate", within
    ? "Good: every spectral result is within its tolerance of a float64 computation."
    : "A result is outside its tolerance. Merge again with mode: exact."]);
  if (summary.arbitrary) {
    advice.push(["Arbitrary choices", "Singular values at the cut are equal, so another machine may keep other directions there."]);
  }
}
if (energy) {
  advice.push(["Captured energy", energy.mean >= 0.9 ? "Good: the ranks keep nearly all of each fine-tune\u2019s change."
    : energy.mean >= 0.5 ? "The ranks drop a part of each fine-tune\u2019s change. This is normal for many or for full-rank fine-tunes."
      : "Low: the ranks drop most of each fine-tune\u2019s change. Use larger ranks, fewer models, or task_arithmetic."]);
}
if (isNumber(summary.interference)) {
  advice.push(["Interference", summary.interference < 0.1 ? "Low: the fine-tunes change about as different directions as independent ones would."
    : summary.interference < 0.5 ? "Moderate: the fine-tunes share some directions."
      : `High: the fine-tunes change the same directions. They may repeat each other; try a smaller ${scale}, or linear.`]);
}
if (growth !== null) {
  advice.push(["Size of the update", growth <= Math.sqrt(report.models.length) * 1.1
    ? "Normal: no larger than a sum of independent task vectors."
    : `Large: it exceeds a sum of independent task vectors. Try a smaller ${scale} if the model degrades.`]);
} else {
  advice.push(["Sizes", "Norms were not measured. Merge with --norms to see how far each model moved, tensor by tensor."]);
}
advice.push(["Next", "These figures say how the formula was computed, not how good the model is. Evaluate the base, each fine-tune and "
  + `the merge on your tasks. Then tune ${scale === "alpha" ? "alpha first, and the weights second" : "the weights"}. rtsvm verify checks the files.`]);
for (const [term, text] of advice) {
  $("advice").append(element("dt", { textContent: term }), element("dd", { textContent: text }));
}

const PARTS = { statistics: "merge: statistics, pruning", spectral: "merge: spectral" };
const longest = Math.max(...Object.values(report.stages).map((spent) => Math.max(spent.wall, spent.cpu)), 1e-9);
for (const [stage, spent] of Object.entries(report.stages)) {
  const bar = drawn("svg", { class: "bar", viewBox: "0 0 100 10", preserveAspectRatio: "none", "aria-hidden": "true" });
  bar.append(drawn("rect", { class: "back", width: 100, height: 10 }),
    drawn("rect", { class: "wall", width: (100 * spent.wall) / longest, height: 10 }),
    drawn("rect", { class: "cpu", y: 3, width: (100 * spent.cpu) / longest, height: 4 }));
  $("stages").append(element("div", { className: stage in PARTS ? "stage part" : "stage" },
    element("div", {}, element("span", { textContent: PARTS[stage] || stage }),
      element("span", { textContent: `${seconds(spent.wall)}, CPU ${seconds(spent.cpu)}` })), bar));
}
$("stages").append(element("p", { className: "muted", textContent:
  "Wide bars: wall time; narrow bars: CPU time. Both are sums over tensors. Tensors overlap, so a sum may exceed the time of the merge." }));

function table(head, lines) {
  return element("table", {},
    element("thead", {}, element("tr", {}, ...head.map((text) => element("th", { scope: "col", textContent: text })))),
    element("tbody", {}, ...lines.map((line) => element("tr", {}, ...line.map((text, i) =>
      element(i ? "td" : "th", i ? { textContent: text } : { scope: "row", textContent: text }))))));
}
// A parameter as the recipe writes it: a number, a gradient, or values by filter.
function written(value) {
  if (Array.isArray(value)) {
    return value.map((part) => (part && typeof part === "object" ? `${part.filter || "others"}: ${written(part.value)}` : written(part)))
      .join(value.some((part) => part && typeof part === "object") ? "; " : " \u2192 ");
  }
  return isNumber(value) ? number(value) : String(value);
}
// Parameters that some model sets for itself have a column; the others hold for all models.
const own = [...new Set(["weight", ...report.model_parameters.flatMap(Object.keys)])];
$("models").append(table(["model", ...own, "norm of its task vector"], report.models.map((model, i) =>
  [model, ...own.map((name) => written(report.model_parameters[i][name] ?? report.parameters[name] ?? 1)), number(summary.task_norms && summary.task_norms[i])])));
const isEmpty = (value) => Array.isArray(value) && !value.length;
$("parameters").textContent = Object.entries(report.parameters).filter(([name, value]) => !own.includes(name) && !isEmpty(value))
  .map(([name, value]) => `${name} ${written(value)}`).join(" \u00b7 ") || "no parameters";

$("recipe").textContent = report.recipe_yaml;
const facts = {
  date: `${report.date.slice(0, 16).replace("T", " ")} UTC`,
  method: report.method.pretty_name, paper: report.method.paper_url, device: report.device, engine: report.engine,
  "wall time": seconds(report.seconds), read: bytes(report.bytes_read), written: bytes(report.bytes_written),
  ...report.versions,
  kernels: [...new Set(Object.values(report.kernels))].map((backend) =>
    `${backend}: ${Object.keys(report.kernels).filter((op) => report.kernels[op] === backend).join(", ")}`).join("\n"),
  solvers: Object.entries(summary.routes).map(([route, n]) => `${route}: ${number(n)}`).join(", ") || "none",
};
for (const [key, value] of Object.entries(facts)) {
  if (value) $("run").append(element("dt", { textContent: key }), element("dd", { textContent: value }));
}

// --- heat maps

// The colour of an error follows its logarithm.
const same = (values) => values.every((value) => value === values[0]);
const short = (model) => model.split("/").filter(Boolean).pop() || model;
// Of each parameter that a gradient or a filter sets: one map, or one for each model where models have their own values.
function mapsOf(title, note, values) {
  const lists = rows.map((row) => [values(row) ?? []].flat());
  const longest = Math.max(0, ...lists.map((of) => of.length));
  const parts = [...Array(longest).keys()].filter((i) => !same(lists.filter((of) => of.length).map((of) => of[i])));
  if (parts.length > 4) return [];
  return parts.map((i) => ({ title: longest > 1 ? `${title} of ${short(report.models[i] || String(i))}` : title, note,
    of: (row) => [values(row) ?? []].flat()[i] ?? null, format: number, more: (row) => (row.reason ? row.reason : "") }));
}
const varied = [...new Set(rows.flatMap((row) => Object.keys(row.parameters)))];
const MAPS = [
  ...varied.flatMap((name) => mapsOf(name, "parameter, after gradients and filters", (row) => row.parameters[name])),
  ...(varied.includes("weight") ? [] : mapsOf("Weight", "factor of the model, as the method computed it", (row) => (row.treatment === "merge" ? row.weights : null))),
  { title: "Rank", note: "sum of the ranks over the short side of the matrix",
    of: (r) => (r.ranks.length ? r.ranks.reduce((a, b) => a + b, 0) / Math.min(...r.shape) : null), format: percent,
    more: (r) => `ranks ${list(r.ranks)} of ${Math.min(...r.shape)}` },
  { title: "Sparsity", note: "share of small elements, mean of the task vectors", of: (r) => mean(r.sparsities), format: percent,
    more: (r) => list(r.sparsities, percent) },
  { title: "Outlier mass", note: "share of the magnitude above the outlier threshold, mean of the task vectors",
    of: (r) => mean(r.outlier_masses), format: percent, more: (r) => list(r.outlier_masses, percent) },
  { title: "Interference", note: "overlap of the tasks\u2019 subspaces; 0: independent tasks, 1: the same subspaces",
    of: (r) => mean(r.interference), format: number, more: (r) => `left, right ${list(r.interference)}` },
  { title: "Captured energy", note: "share of the squared norm that the ranks keep, mean of the tasks", of: (r) => mean(r.captured_energy),
    format: percent, more: (r) => list(r.captured_energy, percent) },
  { title: "Retained", note: "share of each task that orthogonalisation keeps, mean of the tasks", of: (r) => mean(r.retained),
    format: percent, more: (r) => list(r.retained, percent) },
  { title: "Damping", note: "factor of tasks that are far from the base, mean of the tasks", of: (r) => mean(r.damping),
    format: number, more: (r) => list(r.damping) },
  { title: "Error estimate", note: "relative, of the merged update; colours are logarithmic", of: (r) => r.error, format: number, logarithmic: true,
    most: true, more: (r) => `${r.route}, tolerance ${number(r.tolerance)}` },
  { title: "Size of the update", note: "norm of the update over the mean norm of the task vectors", format: number,
    of: (r) => (isNumber(r.update_norm) && mean(r.task_norms) ? r.update_norm / mean(r.task_norms) : null),
    more: (r) => `update ${number(r.update_norm)}, tasks ${list(r.task_norms)}` },
  { title: "Time", note: "wall time of merging the tensor", of: (r) => (r.treatment === "base" ? null : (r.stages.merge || [null])[0]), format: seconds,
    more: () => "" },
];
const ROW = 18;
const layered = rows.filter((row) => row.kind !== null);
// The largest matrices outside of the layers, such as embeddings and the output head: a bar each, below the layers.
const elements = (row) => row.shape.reduce((a, b) => a * b, 1);
const outside = rows.filter((row) => row.kind === null && row.shape.length > 1).sort((a, b) => elements(b) - elements(a)).slice(0, 6);

function cells(map) {
  const found = new Map();
  for (const row of layered) {
    const value = map.of(row);
    if (!isNumber(value)) continue;
    if (!found.has(row.kind)) found.set(row.kind, new Map());
    const line = found.get(row.kind);
    if (!line.has(row.layer)) line.set(row.layer, []);
    line.get(row.layer).push({ row, value });
  }
  return found;
}
function colour(share) {
  const [from, to, part] = share < 0.5 ? ["low", "middle", 2 * share] : ["middle", "high", 2 * share - 1];
  return `color-mix(in oklab, var(--${to}) ${(100 * part).toFixed(1)}%, var(--${from}))`;
}
function draw(map) {
  const found = cells(map);
  const bars = outside.map((row) => ({ row, value: map.of(row) })).filter((bar) => isNumber(bar.value));
  if (!found.size && !bars.length) return false;
  const layers = [...new Set(layered.map((row) => row.layer))].sort((a, b) => a - b);
  const column = new Map(layers.map((layer, i) => [layer, i]));
  const join = (group) => (map.most ? group.reduce((a, g) => Math.max(a, g.value), -Infinity) : mean(group.map((g) => g.value)));
  const wideX = Math.max(1, layers.length), height = found.size + bars.length;
  const spots = bars.map(({ row, value }, i) => ({ kind: row.name.replace(/\.weight$/, ""), layer: null, group: [{ row, value }], x: 0, y: found.size + i, wide: wideX, value }));
  [...found].forEach(([kind, line], y) => line.forEach((group, layer) =>
    spots.push({ kind, layer, group, y, x: column.get(layer), value: join(group) })));
  const scale = (x) => (map.logarithmic ? Math.log10(Math.max(x, 1e-17)) : x);
  let [low, high] = [Infinity, -Infinity];
  for (const spot of spots) { low = Math.min(low, spot.value); high = Math.max(high, spot.value); }
  // Values that print the same have one colour.
  const span = map.format(low) === map.format(high) ? 0 : scale(high) - scale(low);
  const svg = drawn("svg", { viewBox: `0 0 ${wideX} ${height}`, preserveAspectRatio: "none", role: "img",
    "aria-label": `${map.title} by layer and kind of matrix, from ${map.format(low)} to ${map.format(high)}; the table below has every value` });
  const wide = layers.length ? `max(${7 * layers.length}px, min(100%, ${44 * layers.length}px))` : "100%";
  svg.style.width = wide;
  svg.style.height = `${ROW * height}px`;
  for (const spot of spots) {
    const rect = drawn("rect", { x: spot.x + 0.03, y: spot.y + 0.05, width: (spot.wide || 1) - 0.06, height: 0.9 });
    rect.style.fill = colour(span > 0 ? (scale(spot.value) - scale(low)) / span : 0.5);
    rect.spot = spot;
    svg.append(rect);
  }
  svg.addEventListener("pointermove", (event) => tip(event, map));
  svg.addEventListener("pointerleave", () => { $("tip").hidden = true; });
  svg.addEventListener("click", (event) => {
    if (event.target.spot) details(event.target.spot.group[0].row);
  });
  const axis = element("div", { className: "axis" }, layers.length ? element("span", { textContent: `layer ${layers[0]}` }) : null,
    layers.length > 1 ? element("span", { textContent: layers[layers.length - 1] }) : null);
  axis.style.width = wide;
  const scroll = element("div", { className: "cells scroll", tabIndex: 0, role: "region", "aria-label": `${map.title}, map` }, svg, axis);
  $("maps").append(element("div", { className: "map" },
    element("h3", { textContent: map.title }), element("p", { className: "muted", textContent: map.note }),
    element("div", { className: "grid" },
      element("ul", { className: "kinds" }, ...[...found.keys(), ...spots.filter((spot) => spot.wide).map((spot) => spot.kind)].map((kind) => element("li", { title: kind }, element("bdi", { textContent: kind })))),
      scroll),
    map.format(low) === map.format(high)
      ? element("p", { className: "legend", textContent: `${map.format(low)} everywhere` })
      : element("div", { className: "legend" }, element("span", { textContent: map.format(low) }), element("i"),
        element("span", { textContent: map.format(high) }))));
  return true;
}
function tip(event, map) {
  const spot = event.target.spot, box = $("tip");
  box.hidden = !spot;
  if (!spot) return;
  const { row } = spot.group[0];
  const more = spot.group.length > 1 ? `${spot.group.length} tensors, ${map.most ? "the largest" : "mean"}` : map.more(row);
  box.textContent = `${spot.wide ? "" : `layer ${spot.layer}, `}${spot.kind}\n${map.title}: ${map.format(spot.value)}${more ? `\n${more}` : ""}`;
  box.style.left = `${Math.max(4, Math.min(event.clientX + 12, innerWidth - box.offsetWidth - 8))}px`;
  box.style.top = `${event.clientY + 18 + box.offsetHeight > innerHeight ? event.clientY - box.offsetHeight - 10 : event.clientY + 18}px`;
}
const shown = MAPS.filter(draw).length;
$("maps-note").textContent = shown ? "Point at a cell for its value; click it for everything about the tensor. Bars below the layers are tensors outside of them."
  : layered.length || outside.length ? "Nothing was measured by layer." : "No matrix, and no tensor whose name has the number of a layer.";

// --- the table: only the rows in sight are in the document

const COLUMNS = [
  { title: "tensor", width: innerWidth < 640 ? 230 : Math.min(520, 40 + 7.2 * Math.max(0, ...rows.map((r) => r.name.length))), of: (r) => r.name, text: true },
  { title: "treatment", width: 105, of: (r) => r.treatment, text: true },
  ...varied.map((name) => ({ title: name, width: 110, of: (r) => mean([r.parameters[name] ?? []].flat().filter(isNumber)), show: (r) => list([r.parameters[name] ?? []].flat(), written) })),
  { title: "weights", width: 130, of: (r) => mean(r.weights), show: (r) => list(r.weights) },
  { title: "ranks", width: 130, of: (r) => mean(r.ranks), show: (r) => list(r.ranks) },
  { title: "energy", width: 85, of: (r) => mean(r.captured_energy), format: percent },
  { title: "error", width: 90, of: (r) => r.error, format: number },
  { title: "interference", width: 125, of: (r) => mean(r.interference), format: number },
  { title: "update", width: 90, of: (r) => r.update_norm, format: number },
  { title: "sparsity", width: 90, of: (r) => mean(r.sparsities), format: percent },
  { title: "outlier mass", width: 115, of: (r) => mean(r.outlier_masses), format: percent },
  { title: "shape", width: 120, of: (r) => r.shape.reduce((a, b) => a * b, 1), show: (r) => r.shape.join(" \u00d7 ") || "scalar" },
  { title: "dtype", width: 90, of: (r) => r.dtype, text: true },
  { title: "size", width: 90, of: (r) => r.bytes, format: bytes },
  { title: "solver", width: 140, of: (r) => r.route, text: true },
  { title: "recomputed", width: 105, of: (r) => (r.route ? r.escalations.length : null), format: number },
  { title: "time", width: 90, of: (r) => (r.stages.merge || [null])[0], format: seconds },
];
// Leave out columns that no tensor fills.
const columns = COLUMNS.filter((c) => rows.some((row) => ![null, undefined].includes(c.of(row))));
const LINE = 34, SPARE = 12;
const state = { found: rows, by: null, falling: false };
const texts = rows.map((r) => [r.name, r.treatment, r.reason, r.route, r.arbitrary ? "arbitrary" : "", r.dtype, ...(r.escalations || [])].join(" ").toLowerCase());
const body = element("tbody"), above = element("tr", { className: "gap" }), below = element("tr", { className: "gap" });
for (const gap of [above, below]) {
  gap.setAttribute("aria-hidden", "true");
  gap.append(element("td", { colSpan: columns.length }));
}
const heads = columns.map((c) => element("th", { scope: "col", className: c.text ? "" : "number" },
  element("button", { type: "button", textContent: c.title, onclick: () => sort(c) })));
const big = element("table", {}, element("colgroup", {}, ...columns.map((c) => {
  const col = element("col");
  col.style.width = `${c.width}px`;
  return col;
})), element("thead", {}, element("tr", {}, ...heads)), body);
big.style.minWidth = `${columns.reduce((sum, c) => sum + c.width, 0)}px`;
$("table").append(big);
function hint() {
  $("wide").hidden = $("table").scrollWidth <= $("table").clientWidth;
}
addEventListener("resize", hint);
hint();

function line(row, index) {
  const made = element("tr", { "aria-rowindex": index + 2 });
  columns.forEach((c, i) => {
    const value = c.of(row), text = c.show ? c.show(row) : c.format ? c.format(value) : value ?? "\u2013";
    const cell = element("td", { className: c.text ? "" : "number", title: c.text || c.show ? text : "" });
    if (i) cell.textContent = text;
    else cell.append(element("button", { type: "button", textContent: text, onclick: () => details(row) }));
    made.append(cell);
  });
  return made;
}
let drawnLines = new Map(); // index in state.found -> row of the table; those that stay in sight keep the focus
function scrolled() {
  const box = $("table");
  const first = Math.max(0, Math.floor(box.scrollTop / LINE) - SPARE);
  const last = Math.min(state.found.length, Math.ceil((box.scrollTop + box.clientHeight) / LINE) + SPARE);
  const now = new Map();
  for (let i = first; i < last; i += 1) now.set(i, drawnLines.get(i) || line(state.found[i], i));
  for (const [i, old] of drawnLines) if (!now.has(i)) old.remove();
  let place = above;
  for (const made of now.values()) {
    if (place.nextSibling !== made) place.after(made);
    place = made;
  }
  drawnLines = now;
  above.firstChild.style.height = `${LINE * first}px`;
  below.firstChild.style.height = `${LINE * (state.found.length - last)}px`;
  above.hidden = first === 0;
  below.hidden = last === state.found.length;
}
function refresh() {
  const words = $("search").value.toLowerCase().split(/\s+/).filter(Boolean);
  state.found = rows.filter((_, i) => words.every((word) => texts[i].includes(word)));
  if (state.by) {
    const sign = state.falling ? -1 : 1, { of } = state.by;
    // Rows without a value are last in either order.
    state.found.sort((a, b) => {
      const [x, y] = [of(a), of(b)];
      if (x === null || x === undefined) return y === null || y === undefined ? 0 : 1;
      if (y === null || y === undefined) return -1;
      return x < y ? -sign : x > y ? sign : 0;
    });
  }
  for (const old of drawnLines.values()) old.remove();
  drawnLines = new Map();
  body.replaceChildren(above, below);
  big.setAttribute("aria-rowcount", state.found.length + 1);
  $("count").textContent = `${number(state.found.length)} of ${number(rows.length)}`;
  $("table").scrollTop = 0;
  scrolled();
}
function sort(column) {
  state.falling = state.by === column ? !state.falling : !column.text;
  state.by = column;
  heads.forEach((head, i) => {
    if (columns[i] === column) head.setAttribute("aria-sort", state.falling ? "descending" : "ascending");
    else head.removeAttribute("aria-sort");
  });
  refresh();
}
$("search").addEventListener("input", refresh);
$("table").addEventListener("scroll", scrolled, { passive: true });
addEventListener("resize", scrolled);
// Draw the next row before the next press of Tab.
body.addEventListener("focusin", (event) => {
  event.target.closest("tr").scrollIntoView({ block: "nearest", inline: "nearest" });
  scrolled();
});
refresh();

// --- everything about one tensor

function details(row) {
  const perTask = { rank: row.ranks, "rank that was asked for": row.ranks_asked, weight: row.weights,
    sparsity: row.sparsities, "outlier mass": row.outlier_masses, "captured energy": row.captured_energy,
    "norm of the task vector": row.task_norms, damping: row.damping, retained: row.retained };
  const measured = Object.entries(perTask).filter(([, values]) => values && values.length);
  const known = {
    treatment: row.reason ? `${row.treatment}: ${row.reason}` : row.treatment,
    "shape, dtype, size": `${row.shape.join(" \u00d7 ") || "scalar"}, ${row.dtype}, ${bytes(row.bytes)}`,
    parameters: Object.entries(row.parameters).map(([name, value]) => `${name} ${list([value].flat(), written)}`).join("\n"),
    "norm of the update": isNumber(row.update_norm) ? number(row.update_norm) : null,
    "factor for retention": isNumber(row.gain) ? number(row.gain) : null,
    "interference, left and right": row.interference.length ? list(row.interference) : null,
    "error estimate": row.route ? `${number(row.error)}, tolerance ${number(row.tolerance)}` : null,
    solver: row.route,
    "rank of the joined bases": row.basis_rank ? list(row.basis_rank) : null,
    "condition of the joined bases": row.basis_condition ? list(row.basis_condition) : null,
    "gap at the cut": isNumber(row.gap) ? `${number(row.gap)} of the last kept singular value` : null,
    "arbitrary choice": row.arbitrary ? "singular values at the cut are equal: another SVD may keep other directions" : null,
    "solvers tried before": row.escalations && row.escalations.length ? row.escalations.join("; ") : null,
    time: Object.entries(row.stages).map(([stage, [wall, cpu]]) => `${stage} ${seconds(wall)}, CPU ${seconds(cpu)}`).join("\n"),
  };
  const terms = element("dl", { className: "facts" });
  for (const [key, value] of Object.entries(known)) {
    if (value) terms.append(element("dt", { textContent: key }), element("dd", { textContent: value }));
  }
  $("details-title").textContent = row.name;
  $("details-body").replaceChildren(terms);
  if (measured.length) {
    const lines = report.models.map((model, i) => [model, ...measured.map(([, values]) => number(values[i]))]);
    const all = table(["model", ...measured.map(([title]) => title)], lines);
    $("details-body").append(element("div", { className: "scroll wrapped", tabIndex: 0, role: "region", "aria-label": "per model" }, all));
  }
  $("tip").hidden = true;
  $("details").showModal();
}
