"use strict";
// The page of `longdream watch`: asks every two seconds for what is new in the runs, and draws it.

const $ = (id) => document.getElementById(id);
const query = new URLSearchParams(location.search);
const EVERY_MS = 2000;
const COLOURS = ["#388bfd", "#f0883e", "#3fb950", "#bc8cff", "#f85149", "#39c5cf", "#d29922", "#ff7bac"];
// groups of curves, by how their names begin; a curve is in the first that fits
const GROUPS = [
  ["returns", /^(evaluate\/return_mean|final\/return_mean|train\/return|train\/reward|episode\/return|held_out\/)/],
  ["surprise by episode", /^episode\/surprise/],
  ["what M, V and C learn", /^(model|encoder|controller)\//],
  ["system", /^time\/(updates_per_s|rows_per_s|dreamt_steps_per_s|gpu)$/],
];
const MOST_SHOWN = 4; // runs that are shown at first

const runs = new Map(); // everything known, by name
const shown = new Set();
let chosen = false; // whether somebody has chosen what is shown
let order = [];

const token = () => (query.has("token") ? { token: query.get("token") } : {});

async function ask() {
  const seen = Object.fromEntries([...runs].map(([name, run]) => [name, run.version]));
  try {
    const response = await fetch(`data?${new URLSearchParams({ ...token(), seen: JSON.stringify(seen) })}`);
    if (!response.ok) throw new Error((await response.text()).trim());
    update(await response.json());
    $("error").hidden = true;
  } catch (problem) {
    $("error").textContent = `no news: ${problem.message}`;
    $("error").hidden = false;
  }
  setTimeout(ask, EVERY_MS);
}

function update(news) {
  const gone = order.some((name) => !news.names.includes(name));
  order = news.names;
  for (const name of [...runs.keys()]) if (!order.includes(name)) runs.delete(name);
  for (const [name, run] of Object.entries(news.runs)) runs.set(name, run);
  if (!chosen) {
    shown.clear();
    order.slice(0, MOST_SHOWN).forEach((name) => shown.add(name));
  }
  document.title = `${news.root} · longdream`;
  $("title").textContent = news.root;
  $("state").textContent = `${order.length} ${order.length === 1 ? "run" : "runs"}`;
  const { cores, load, free_memory: memory, free_disk: disk } = news.machine;
  const gib = (bytes) => `${(bytes / 2 ** 30).toFixed(0)} GiB`;
  $("machine").textContent = `load ${load} of ${cores} cores, ${gib(memory)} of memory and ${gib(disk)} of disk free`;
  if (gone || Object.keys(news.runs).length || !$("runs").children.length) render();
}

const colourOf = (name) => COLOURS[order.indexOf(name) % COLOURS.length];

function element(kind, properties = {}, ...children) {
  const made = Object.assign(document.createElement(kind), properties);
  made.append(...children);
  return made;
}

function render() {
  $("runs").replaceChildren(...order.map((name) => {
    const run = runs.get(name);
    const dot = element("i");
    dot.style.background = colourOf(name);
    const total = run.about.total ? ` of ${run.about.total.toLocaleString("en")}` : "";
    const text = run.about.problem || `${run.state}, ${run.step.toLocaleString("en")}${total}`;
    const button = element("button", { title: run.about.env || "" }, dot, `${name} `, element("span", { className: "muted" }, text));
    button.setAttribute("aria-pressed", "false");
    button.style.opacity = shown.has(name) ? 1 : 0.45;
    button.onclick = () => {
      chosen = true;
      if (!shown.delete(name)) shown.add(name);
      render();
    };
    return button;
  }));
  const visible = order.filter((name) => shown.has(name));
  pictures(visible);
  const keys = [...new Set(visible.flatMap((name) => Object.keys(runs.get(name).curves)))].sort();
  const left = new Set(keys);
  const sections = GROUPS.map(([title, pattern]) => {
    const mine = keys.filter((key) => left.has(key) && pattern.test(key));
    mine.forEach((key) => left.delete(key));
    return section(title, mine, visible, true);
  });
  sections.push(section("all else", [...left], visible, false));
  const open = new Map([...$("curves").querySelectorAll("details")].map((part) => [part.dataset.title, part.open]));
  $("curves").replaceChildren(...sections.filter(Boolean));
  for (const part of $("curves").querySelectorAll("details")) if (open.has(part.dataset.title)) part.open = open.get(part.dataset.title);
  for (const canvas of $("curves").querySelectorAll("canvas")) plot(canvas, canvas.dataset.key, visible);
}

function section(title, keys, visible, open) {
  if (!keys.length) return null;
  const grid = element("div", { className: "curves" });
  for (const key of keys) {
    const canvas = element("canvas", { width: 520, height: 240 });
    canvas.dataset.key = key;
    const last = visible.map((name) => runs.get(name).curves[key]).filter(Boolean).map(([, y]) => short(y[y.length - 1]));
    grid.append(element("div", { className: "panel" }, element("h2", {}, `${key} `, element("span", { className: "number" }, last.join(", "))), canvas));
  }
  const part = element("details", { open }, element("summary", {}, title), grid);
  part.dataset.title = title;
  return part;
}

function short(value) {
  if (value === undefined) return "";
  const size = Math.abs(value);
  if (size >= 1e6) return `${(value / 1e6).toPrecision(3)}M`;
  if (size >= 1e4) return `${(value / 1e3).toPrecision(3)}k`;
  return String(Number(value.toPrecision(3)));
}

function plot(canvas, key, visible) {
  const curves = visible.map((name) => [name, runs.get(name).curves[key]]).filter(([, curve]) => curve && curve[0].length);
  const pen = canvas.getContext("2d");
  const { width, height } = canvas;
  pen.clearRect(0, 0, width, height);
  const xs = curves.flatMap(([, [x]]) => [x[0], x[x.length - 1]]);
  const ys = curves.flatMap(([, [, y]]) => y);
  const [left, right] = [Math.min(...xs), Math.max(...xs)];
  let [low, high] = [Math.min(...ys), Math.max(...ys)];
  if (high === low) { low -= Math.abs(low) / 10 || 0.5; high += Math.abs(high) / 10 || 0.5; }
  const [edge, foot] = [104, 26];
  const px = (x) => edge + ((width - edge - 8) * (x - left)) / (right - left || 1);
  const py = (y) => 8 + (height - foot - 16) * (1 - (y - low) / (high - low));
  pen.font = "20px system-ui, sans-serif";
  pen.fillStyle = "#8b949e";
  pen.strokeStyle = "#30363d";
  pen.textAlign = "right";
  for (const y of [low, high]) {
    pen.fillText(short(y), edge - 8, py(y) + (y === low ? 0 : 14));
    pen.beginPath();
    pen.moveTo(edge, py(y));
    pen.lineTo(width - 8, py(y));
    pen.stroke();
  }
  pen.textAlign = "left";
  pen.fillText(short(left), edge, height - 4);
  pen.textAlign = "right";
  pen.fillText(short(right), width - 8, height - 4);
  pen.lineWidth = 2.5;
  for (const [name, [x, y]] of curves) {
    pen.strokeStyle = pen.fillStyle = colourOf(name);
    pen.beginPath();
    x.forEach((value, i) => (i ? pen.lineTo(px(value), py(y[i])) : pen.moveTo(px(value), py(y[i]))));
    pen.stroke();
    if (x.length === 1) pen.fillRect(px(x[0]) - 3, py(y[0]) - 3, 6, 6);
  }
}

function pictures(visible) {
  const sections = visible.filter((name) => Object.keys(runs.get(name).pictures).length).map((name) => {
    const figures = Object.entries(runs.get(name).pictures).map(([file, version]) => {
      const source = `picture?${new URLSearchParams({ ...token(), run: name, name: file, version })}`;
      return element("figure", {}, element("h2", {}, `${name}: ${file.replace(/\.\w+$/, "").replaceAll("-", " ")}`), element("img", { src: source, alt: file }));
    });
    return element("div", { className: "pictures" }, ...figures);
  });
  $("pictures").replaceChildren(...sections);
}

ask();
