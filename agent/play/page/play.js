"use strict";
// The page of `longdream play`: draws what the server sends, and sends keys and commands. All state is the server's.

const $ = (id) => document.getElementById(id);
const query = new URLSearchParams(location.search);
const SESSION = "longdream-session";
const RETRY_MS = [300, 1000, 2000, 5000];

let socket = null;
let attempts = 0;
let over = false; // the server has said that there is nothing to come back to
let hello = null;
let now = null; // header of the moment that is shown
const held = new Set(); // names of keys, from the first that was pressed to the last
let mouse = null;
let sequence = 0;
const highest = [1e-6, 1e-6, 1e-6]; // scales of the surprise bars
const stamps = []; // times of the last frames
const measured = { frames: 0, latency: [], sent: new Map() };
window.measured = measured; // for tests and measurements

// -- connection -----------------------------------------------------------------------------------------------------

function connect() {
  const parameters = new URLSearchParams();
  if (query.has("token")) parameters.set("token", query.get("token"));
  const session = sessionStorage.getItem(SESSION);
  if (session) parameters.set("session", session);
  const scheme = location.protocol === "https:" ? "wss" : "ws";
  const opened = new WebSocket(`${scheme}://${location.host}/socket?${parameters}`);
  socket = opened;
  opened.binaryType = "arraybuffer";
  opened.onopen = () => { attempts = 0; };
  opened.onmessage = (event) => {
    if (typeof event.data === "string") told(JSON.parse(event.data));
    else show(event.data);
  };
  opened.onclose = () => {
    if (socket !== opened || over) return;
    $("state").textContent = "connection lost, trying again";
    setTimeout(connect, RETRY_MS[Math.min(attempts++, RETRY_MS.length - 1)]);
  };
}

function send(message) {
  if (socket && socket.readyState === WebSocket.OPEN) socket.send(JSON.stringify(message));
}

function told(message) {
  if (message.session) sessionStorage.setItem(SESSION, message.session);
  if (message.hello) welcome(message);
  if (message.note) say("note", message.note);
  if (message.recorded) recorded(message.recorded);
  if (message.error) say("error", message.error);
  if (message.final) {
    over = true;
    $("state").textContent = "ended";
  }
}

let quiet = null;
function say(where, text) {
  $(where).textContent = text;
  $(where).hidden = false;
  clearTimeout(quiet);
  quiet = setTimeout(() => { if (!over) { $("error").hidden = true; } $("note").hidden = true; }, 6000);
}

function welcome(message) {
  hello = message;
  document.title = `${message.hello} · longdream`;
  $("title").textContent = message.hello;
  $("state").textContent = "";
  if (message.notes.length) say("note", message.notes.join("; "));
  const both = message.agent && message.environment;
  $("mode-both").hidden = !both;
  $("mode-dream").hidden = !message.agent;
  $("mode-reality").hidden = !message.environment;
  $("driver").hidden = !message.agent;
  $("judgement").hidden = !message.agent;
  $("memory").hidden = !message.memories.length;
  for (const what of ["scan", "attention"]) $(`forget-${what}`).hidden = !message.memories.includes(what);
  $("forget-both").hidden = message.memories.length < 2;
  $("eyes").hidden = !both;
  $("start-episode").hidden = !message.environment;
  $("start-replay").hidden = !message.replay;
  $("upload-label").hidden = Boolean(message.upload);
  $("speed").max = message.fastest;
  pad(message.keys);
  if (held.size) keysChanged(); // held while the connection was lost
}

// -- pictures -------------------------------------------------------------------------------------------------------

const decoder = new TextDecoder();
let drawing = Promise.resolve();

function show(buffer) {
  const length = new DataView(buffer).getUint32(0, true);
  const header = JSON.parse(decoder.decode(new Uint8Array(buffer, 4, length)));
  let offset = 4 + length;
  const pictures = Object.entries(header.pictures).map(([name, bytes]) => {
    const data = new Uint8Array(buffer, offset, bytes);
    const blob = new Blob([data], { type: data[0] === 0xff ? "image/jpeg" : "image/webp" });
    offset += bytes;
    return createImageBitmap(blob).then((bitmap) => [name, bitmap]);
  });
  // in the order of their moments, however long each takes to be decoded
  const decoded = Promise.all(pictures);
  drawing = drawing.then(() => decoded).then((bitmaps) => {
    for (const [name, bitmap] of bitmaps) draw($(name), bitmap);
    describe(header);
    send({ do: "seen" });
    count(header);
  }).catch((problem) => say("error", `a picture could not be drawn: ${problem.message}`));
}

function draw(canvas, bitmap) {
  if (canvas.width !== bitmap.width || canvas.height !== bitmap.height) {
    canvas.width = bitmap.width;
    canvas.height = bitmap.height;
  }
  canvas.getContext("2d").drawImage(bitmap, 0, 0);
  bitmap.close();
}

function count(header) {
  const time = performance.now();
  measured.frames++;
  stamps.push(time);
  while (stamps.length > 60 || time - stamps[0] > 3000) stamps.shift();
  const rate = stamps.length > 1 ? (1000 * (stamps.length - 1)) / (time - stamps[0]) : 0;
  $("rate").textContent = header.playing && rate >= 5 ? `${rate.toFixed(0)} frames/s` : "";
  for (const [sent, when] of measured.sent) {
    if (sent > header.seq) break;
    measured.latency.push(time - when);
    if (measured.latency.length > 1000) measured.latency.shift();
    measured.sent.delete(sent);
  }
}

// -- what stands beside the pictures --------------------------------------------------------------------------------

const two = (value) => (Math.abs(value) < 0.005 ? "0.00" : value.toFixed(2));

function describe(header) {
  now = header;
  const real = header.mode !== "dream";
  const dream = header.mode !== "reality";
  const free = dream && (!real || !header.eyes);
  $("side-real").hidden = !real;
  $("side-dream").hidden = !dream;
  $("side-other").hidden = !header.other;
  $("between").hidden = header.mode !== "both";
  $("side-dream").classList.toggle("free", free);
  $("dream-name").textContent = free ? "M's dream, alone" : "M's dream, corrected";
  $("real-text").textContent = real ? `reward ${two(header.reward)}, sum ${two(header.total)}` : "";
  const expected = header.expected;
  $("dream-text").textContent = expected ? `expected ${two(expected.reward)}, sum ${two(header.dreamt)}` : "";
  if (header.other) $("other-text").textContent = real ? `sum ${two(header.other.total)}` : `sum ${two(header.other.dreamt)}`;
  surprise(header.surprise || [0, 0, 0]);
  $("state").textContent = header.over ? `over (${header.over}): the next step begins anew` : "";

  for (const mode of ["both", "dream", "reality"]) press(`mode-${mode}`, header.mode === mode);
  press("eyes", !header.eyes);
  $("eyes").textContent = header.eyes ? "let go" : "look again";
  $("eyes").disabled = header.mode !== "both";
  $("eyes-text").textContent = header.mode !== "both" ? "" : header.eyes ? "M sees what comes" : "M sees your actions alone";
  press("driver", header.driver === "agent");
  $("driver").textContent = header.driver === "agent" ? "you drive" : "agent drives";
  press("play", header.playing);
  $("play").textContent = header.playing ? "pause" : "play";
  slide("speed", header.speed);
  slide("temperature", header.temperature);
  slide("steps", header.steps);
  const [first, last] = header.kept;
  const time = $("time");
  time.min = first;
  time.max = last;
  time.value = header.number;
  $("moment").textContent = header.number < last ? `${header.number} of ${last}` : `${header.number}`;
  $("swap").hidden = !header.branch;
  press("record", header.recording !== null);
  $("record").textContent = header.recording === null ? "record" : "stop and save";
  $("recorded").textContent = header.recording === null ? "" : `${header.recording} moments`;
  meters(header);
  map(header.map);
}

function press(id, on) { $(id).setAttribute("aria-pressed", String(on)); }

function slide(id, value) {
  if (document.activeElement !== $(id)) $(id).value = value;
  $(`${id}-text`).textContent = Number(value.toFixed(2));
}

function surprise(parts) {
  parts.forEach((value, i) => {
    highest[i] = Math.max(highest[i], value);
    $(`surprise-${i}`).style.height = `${(100 * value) / highest[i]}%`;
  });
  $("surprise-text").textContent = two(parts[0] + parts[1] + parts[2]);
}

let meterRows = [];
function meters(header) {
  const rows = [];
  if (header.expected) {
    rows.push(["end", header.expected.end, two(header.expected.end)]);
    rows.push(["reward", Math.min(1, Math.abs(header.expected.reward)), two(header.expected.reward)]);
  }
  if (header.value !== undefined) {
    rows.push(["C's value", Math.min(1, Math.abs(header.value)), two(header.value)]);
    header.probs.forEach((part, p) => part.forEach((probability, i) => {
      const names = hello.labels[p];
      const name = names ? names[i] : `action ${i}`;
      const share = names ? probability : (probability + 1) / 2;
      rows.push([hello.labels.length > 1 ? `${p}: ${name}` : name, share, two(probability)]);
    }));
  }
  const meter = $("meter");
  if (meterRows.length !== rows.length) {
    meterRows = rows.map(() => {
      const name = document.createElement("span");
      const bar = document.createElement("span");
      const fill = document.createElement("i");
      const number = document.createElement("span");
      bar.className = "bar";
      number.className = "number";
      bar.append(fill);
      return [name, bar, number, fill];
    });
    meter.replaceChildren(...meterRows.flatMap((row) => row.slice(0, 3)));
  }
  rows.forEach(([name, share, text], i) => {
    const [label, , number, fill] = meterRows[i];
    label.textContent = name;
    number.textContent = text;
    fill.style.width = `${100 * share}%`;
  });
}

function map(maze) {
  $("map-panel").hidden = !maze;
  $("map-read-side").hidden = !(maze && maze.read);
  if (maze) drawMap($("map-true"), maze, maze.true);
  if (maze && maze.read) drawMap($("map-read"), maze, maze.read);
}

const WALL = [110, 118, 129];
const FREE = [33, 38, 45];

// the truth, or what is read of it: walls in percent, rows from the top, and the places of the targets
function drawMap(canvas, maze, { walls, targets }) {
  const pen = canvas.getContext("2d");
  const cells = walls.length;
  const cell = canvas.width / (cells + 2);
  const at = ([x, y]) => [(x + 1) * cell, (cells - y + 1) * cell]; // y grows upwards in the maze
  pen.fillStyle = `rgb(${WALL.join(",")})`;
  pen.fillRect(0, 0, canvas.width, canvas.height);
  walls.forEach((row, r) => row.forEach((percent, c) => {
    pen.fillStyle = `rgb(${WALL.map((wall, i) => Math.round(FREE[i] + (percent / 100) * (wall - FREE[i]))).join(",")})`;
    pen.fillRect((c + 1) * cell, (r + 1) * cell, cell + 0.5, cell + 0.5);
  }));
  targets.forEach((place, i) => {
    const [x, y] = at(place);
    pen.beginPath();
    pen.arc(x, y, 0.28 * cell, 0, 2 * Math.PI);
    pen.fillStyle = i === maze.prompted ? `rgb(${maze.colour.join(",")})` : "#8b949e";
    pen.fill();
  });
  const [x, y] = at(maze.agent);
  const angle = Math.atan2(-maze.heading[1], maze.heading[0]);
  pen.save();
  pen.translate(x, y);
  pen.rotate(angle);
  pen.beginPath();
  pen.moveTo(0.42 * cell, 0);
  pen.lineTo(-0.26 * cell, 0.26 * cell);
  pen.lineTo(-0.26 * cell, -0.26 * cell);
  pen.closePath();
  pen.fillStyle = "#e6edf3";
  pen.fill();
  pen.restore();
}

// -- keys, mouse, touch ---------------------------------------------------------------------------------------------

const NAMES = { ArrowLeft: "←", ArrowRight: "→", ArrowUp: "↑", ArrowDown: "↓", Space: "space" };
const nameOf = (key) => NAMES[key] || key.replace(/^Key|^Digit/, "");

function pad(keys) {
  const buttons = keys.bindings.map((binding) => {
    const button = document.createElement("button");
    button.textContent = binding.label;
    const shown = document.createElement("kbd");
    shown.textContent = binding.keys.map(nameOf).join(" ");
    button.append(shown);
    button.dataset.keys = binding.keys.join(" ");
    const down = (event) => {
      event.preventDefault();
      button.setPointerCapture(event.pointerId);
      binding.keys.forEach((key) => held.add(key));
      keysChanged();
    };
    const up = () => { binding.keys.forEach((key) => held.delete(key)); keysChanged(); };
    button.addEventListener("pointerdown", down);
    button.addEventListener("pointerup", up);
    button.addEventListener("pointercancel", up);
    button.addEventListener("contextmenu", (event) => event.preventDefault());
    return button;
  });
  $("pad").replaceChildren(...buttons);
  const time = keys.idle ? "Time goes on while it plays; paused, a key is one step." : "Time goes on while a key is held.";
  $("hint").textContent = keys.mouse ? `${time} Drag on a picture: across is the first number, up the second.` : time;
}

function keysChanged() {
  sequence++;
  measured.sent.set(sequence, performance.now());
  if (measured.sent.size > 100) measured.sent.delete(measured.sent.keys().next().value);
  send({ do: "keys", held: [...held], mouse, seq: sequence });
}

function means(key) {
  if (!hello) return false;
  return hello.keys.bindings.some((binding) => binding.keys.includes(key)) || key in hello.keys.twins;
}

const COMMANDS = {
  KeyP: () => $("play").click(), KeyG: () => $("driver").click(), KeyL: () => $("eyes").click(),
  Comma: () => $("back").click(), Period: () => $("step").click(),
};

addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || !hello) return;
  if (means(event.code)) {
    event.preventDefault();
    if (event.repeat || held.has(event.code)) return;
    held.add(event.code);
    keysChanged();
  } else if (event.code in COMMANDS && !event.repeat) {
    event.preventDefault();
    COMMANDS[event.code]();
  }
});
addEventListener("keyup", (event) => { if (held.delete(event.code)) keysChanged(); });
addEventListener("blur", () => { if (held.size || mouse) { held.clear(); mouse = null; keysChanged(); } });

for (const id of ["real", "dream"]) {
  const canvas = $(id);
  const move = (event) => {
    if (!hello || !hello.keys.mouse) return;
    const box = canvas.getBoundingClientRect();
    const clip = (value) => Math.max(-1, Math.min(1, value));
    mouse = [clip((2 * (event.clientX - box.left)) / box.width - 1), clip(1 - (2 * (event.clientY - box.top)) / box.height)];
    keysChanged();
  };
  canvas.addEventListener("pointerdown", (event) => { canvas.setPointerCapture(event.pointerId); move(event); });
  canvas.addEventListener("pointermove", (event) => { if (mouse) move(event); });
  const up = () => { if (mouse) { mouse = null; keysChanged(); } };
  canvas.addEventListener("pointerup", up);
  canvas.addEventListener("pointercancel", up);
}

// -- commands -------------------------------------------------------------------------------------------------------

// a button that was clicked would otherwise be pressed again by the space bar, which may be an action
addEventListener("click", (event) => { if (event.detail > 0 && event.target instanceof HTMLButtonElement) event.target.blur(); });

const pressed = (id) => $(id).getAttribute("aria-pressed") === "true";
$("play").onclick = () => send({ do: "play", on: !pressed("play") });
$("step").onclick = () => send({ do: "step" });
$("back").onclick = () => now && send({ do: "go", to: Math.max(0, now.number - 1) });
$("time").oninput = () => send({ do: "go", to: Number($("time").value) });
$("swap").onclick = () => send({ do: "swap" });
$("driver").onclick = () => send({ do: "set", agent: !pressed("driver") });
$("eyes").onclick = () => send({ do: "set", eyes: pressed("eyes") });
for (const mode of ["both", "dream", "reality"]) $(`mode-${mode}`).onclick = () => send({ do: "set", mode });
for (const what of ["scan", "attention", "both"]) $(`forget-${what}`).onclick = () => send({ do: "forget", what });
for (const id of ["speed", "temperature", "steps"]) {
  $(id).oninput = () => { $(`${id}-text`).textContent = $(id).value; send({ do: "set", [id]: Number($(id).value) }); };
}
$("start-episode").onclick = () => send({ do: "start", at: "episode" });
$("start-replay").onclick = () => send({ do: "start", at: "replay" });
$("upload").onchange = async () => {
  const [file] = $("upload").files;
  $("upload").value = "";
  if (!file) return;
  try { // made small here: the server takes no large ones
    const bitmap = await createImageBitmap(file);
    const scale = Math.min(1, 512 / Math.max(bitmap.width, bitmap.height));
    const canvas = document.createElement("canvas");
    canvas.width = Math.max(1, Math.round(bitmap.width * scale));
    canvas.height = Math.max(1, Math.round(bitmap.height * scale));
    canvas.getContext("2d").drawImage(bitmap, 0, 0, canvas.width, canvas.height);
    send({ do: "start", at: "picture", picture: canvas.toDataURL("image/png").split(",")[1] });
  } catch {
    say("error", `${file.name} is no picture that this browser can read`);
  }
};
$("record").onclick = () => send({ do: "record", on: !pressed("record"), form: $("form").value });

function recorded(names) {
  const [film, ...episodes] = names;
  const token = query.has("token") ? `?token=${encodeURIComponent(query.get("token"))}` : "";
  const shown = film.address.endsWith(".gif") ? document.createElement("img") : document.createElement("video");
  shown.className = "shown";
  shown.src = film.address + token;
  if (shown instanceof HTMLVideoElement) { shown.controls = true; shown.muted = true; shown.preload = "auto"; }
  const lines = [film, ...episodes].map(({ path, address }) => {
    const line = document.createElement("div");
    const link = document.createElement("a");
    link.href = address + token;
    link.textContent = path;
    link.download = path.split("/").pop();
    line.append(link);
    return line;
  });
  $("files").replaceChildren(...lines, shown);
  $("recorded").textContent = "";
}

connect();
