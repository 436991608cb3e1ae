// The console of ingestd. Every text that comes from a daemon is set as text (`el`, `put`), never as
// markup. The event stream of /v1/watch feeds it; while that is cut, it polls.
"use strict";

const API = "../";
const STREAM_AGAIN = 5000; // ms until a stream that was cut is tried again
const POLL = 2000; // ms between two polls while it is cut
const WORKERS = 2000; // ms between two looks at the workers
const RATE_STATUSES = 6; // statuses that the live rates are made of
const LETTERS = 20; // dead letters of one page
const BATCHES = 12; // rows of batches
const SVG = "http://www.w3.org/2000/svg";
const REASONS = ["malformed", "too_large", "unfinished", "schema", "unrouted", "undecodable",
  "rejected", "failed", "timeout", "crashed", "damaged"];

const $ = (id) => document.getElementById(id);
const state = {
  status: null, last: [], history: null, batches: Object.create(null), pipeline: "", token: sessionStorage.getItem("token") || "",
  letters: [], lettersKey: "", before: null, settings: null, link: "", asked: false,
};

// A table by the names of pipelines, one of which may be called constructor.
const byName = (table) => Object.assign(Object.create(null), table);

// -- elements ---------------------------------------------------------------------------------------

function el(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name === "class") node.className = value;
    else if (name === "on") for (const [event, call] of Object.entries(value)) node.addEventListener(event, call);
    else if (value !== undefined && value !== null && value !== false) node.setAttribute(name, value);
  }
  for (const child of children) if (child !== null && child !== undefined) node.append(child);
  return node;
}

function put(node, text) {
  const shown = String(text);
  if (node.textContent !== shown) node.textContent = shown;
}

function badge(node, text, kind) {
  put(node, text);
  node.className = `badge ${kind}`;
}

// A table that a narrow screen shows as blocks; the roles stay, whatever its display is.
function table(caption, columns, rows, empty) {
  if (!rows.length) return el("p", { class: "empty" }, empty);
  const head = columns.map(([name, kind]) => el("th", { scope: "col", role: "columnheader", class: kind || "" }, name));
  const body = rows.map((cells) => el("tr", { role: "row" }, ...cells.map((cell, place) => {
    const [name, kind] = columns[place];
    const content = cell instanceof Node ? cell : String(cell);
    const blank = content === "" ? " blank" : "";
    if (place === 0) return el("th", { scope: "row", role: "rowheader", "data-label": name, class: (kind || "") + blank }, content);
    return el("td", { role: "cell", "data-label": name, class: (kind || "") + blank }, content);
  })));
  return el("table", { role: "table" }, el("caption", {}, caption),
    el("thead", { role: "rowgroup" }, el("tr", { role: "row" }, ...head)), el("tbody", { role: "rowgroup" }, ...body));
}

let toastTimer = 0;
function toast(text) {
  put($("toast"), text);
  clearTimeout(toastTimer);
  toastTimer = setTimeout(() => put($("toast"), ""), 6000);
}

// -- numbers ----------------------------------------------------------------------------------------

const whole = new Intl.NumberFormat("en");
const compact = new Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 1 });
const number = (value) => (value < 1e7 ? whole.format(Math.round(value)) : compact.format(value));

function rate(value) {
  if (value === null) return "–";
  if (value >= 1e5) return compact.format(value);
  return value >= 10 || value === 0 ? whole.format(Math.round(value)) : value.toFixed(1);
}

function bytes(value) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let place = 0;
  let size = value;
  while (size >= 1024 && place < units.length - 1) { size /= 1024; place += 1; }
  return `${place && size < 10 ? size.toFixed(1) : Math.round(size)} ${units[place]}`;
}

function duration(seconds) {
  if (seconds < 0.0005) return "0 s";
  if (seconds < 1) return `${Math.round(seconds * 1000)} ms`;
  if (seconds < 10) return `${seconds.toFixed(1)} s`;
  if (seconds < 120) return `${Math.round(seconds)} s`;
  if (seconds < 7200) return `${Math.round(seconds / 60)} min`;
  if (seconds < 172800) return `${Math.round(seconds / 3600)} h`;
  return `${Math.round(seconds / 86400)} d`;
}

function when(at) {
  const date = new Date(typeof at === "number" ? at * 1000 : at);
  const today = date.toDateString() === new Date().toDateString();
  const text = today ? date.toLocaleTimeString() : date.toLocaleString();
  return el("time", { datetime: date.toISOString(), title: date.toISOString() }, text);
}

// -- requests ---------------------------------------------------------------------------------------

class Refused extends Error {
  constructor(status, detail) {
    super(detail);
    this.status = status;
  }
}

async function call(path, { body, signal } = {}) {
  const headers = {};
  if (state.token) headers.Authorization = `Bearer ${state.token}`;
  if (body !== undefined) headers["Content-Type"] = "application/json";
  const options = { headers, signal, credentials: "omit", cache: "no-store" };
  if (body !== undefined) Object.assign(options, { method: "POST", body: JSON.stringify(body) });
  const response = await fetch(API + path, options);
  if (response.ok) return response;
  let detail = `${response.status} ${response.statusText}`;
  try { detail = (await response.json()).detail || detail; } catch { /* no problem document */ }
  throw new Refused(response.status, detail);
}

const get = async (path, options) => (await call(path, options)).json();
const parameters = (values) => {
  const query = new URLSearchParams();
  for (const [name, value] of Object.entries(values)) if (value !== "" && value !== null) query.set(name, value);
  return query.size ? `?${query}` : "";
};

function askForToken(why) {
  put($("token-why"), why);
  $("token-input").value = "";
  if (!$("token").open) $("token").showModal();
  $("token-input").focus();
}

// Does a change; a token is asked for where one is missing.
async function change(path, body, done) {
  try {
    toast(done(await (await call(path, { body })).json()));
    return true;
  } catch (error) {
    if (error.status === 401 || error.status === 403) askForToken(error.message);
    else toast(`That failed: ${error.message}`);
    return false;
  }
}

function confirmed(title, text, yes) {
  const dialog = $("confirm");
  put($("confirm-h"), title);
  put($("confirm-text"), text);
  put($("confirm-yes"), yes);
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "yes"), { once: true });
  });
}

// -- what comes in ----------------------------------------------------------------------------------

const events = {
  status(data) {
    state.status = data;
    state.last.push(data);
    if (state.last.length > RATE_STATUSES) state.last.shift();
    const names = Object.keys(data.pipelines);
    if (!names.includes(state.pipeline)) {
      const wanted = decodeURIComponent(location.hash.split("pipeline=")[1] || "");
      choose(names.includes(wanted) ? wanted : names[0] || "");
    }
    showStatus();
  },
  batches(data) {
    for (const [name, tries] of Object.entries(data.pipelines)) {
      const known = state.batches[name] || [];
      const newest = known.length ? known[0].number : 0;
      const first = tries.length ? Math.max(...tries.map((one) => one.number)) : 0;
      const fresh = first < newest ? tries : tries.filter((one) => one.number > newest);
      const kept = first < newest ? [] : known; // it has been started anew
      state.batches[name] = [...fresh.sort((a, b) => b.number - a.number), ...kept].slice(0, 200);
    }
    showBatches();
  },
  history(data) {
    state.history = { ...data, pipelines: byName(data.pipelines) };
    showCharts();
  },
  sample(data) {
    if (!state.history) return;
    for (const [name, row] of Object.entries(data.pipelines)) {
      const rows = (state.history.pipelines[name] ||= []);
      if (!rows.length || rows.at(-1)[0] < row[0]) rows.push(row);
      while (rows.length > 180) rows.shift();
    }
    showCharts();
  },
};

function setLink(kind, text) {
  state.link = kind;
  badge($("link"), text, { live: "good", polling: "warn", off: "bad" }[kind]);
}

let streaming = null;
async function stream() {
  streaming = new AbortController();
  const response = await call("v1/watch", { signal: streaming.signal });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    buffer += value;
    let end;
    while ((end = buffer.indexOf("\n\n")) >= 0) {
      const lines = buffer.slice(0, end).split("\n");
      buffer = buffer.slice(end + 2);
      const kind = lines.find((line) => line.startsWith("event: "))?.slice(7);
      const data = lines.find((line) => line.startsWith("data: "))?.slice(6);
      if (kind in events && data) {
        setLink("live", "live");
        events[kind](JSON.parse(data));
      }
    }
  }
}

async function poll() {
  const [status, batches, history] = await Promise.all([get("v1/status"), get(`v1/batches?limit=${BATCHES}`), get("v1/history")]);
  setLink("polling", "polling");
  events.history(history);
  events.batches(batches);
  events.status({ at: Date.now() / 1000, ...status });
}

const pause = (milliseconds) => new Promise((resolve) => setTimeout(resolve, milliseconds));
const visible = () => new Promise((resolve) => {
  if (!document.hidden) resolve();
  else document.addEventListener("visibilitychange", () => resolve(), { once: true });
});

async function follow() {
  for (;;) {
    await visible();
    let again = Date.now() + STREAM_AGAIN;
    try {
      await stream();
    } catch (error) {
      if (error.status === 401) await tokenNeeded(error);
    }
    if (document.hidden) continue;
    while (Date.now() < again && !document.hidden) {
      try {
        await poll();
      } catch (error) {
        setLink("off", "no connection");
        if (error.status === 401) { await tokenNeeded(error); again = 0; }
      }
      await pause(POLL);
    }
  }
}

let tokenGiven = () => {};
async function tokenNeeded(error) {
  setLink("off", "token needed");
  if (!state.asked) askForToken(error.message);
  state.asked = true;
  await new Promise((resolve) => { tokenGiven = resolve; });
}

document.addEventListener("visibilitychange", () => { if (document.hidden) streaming?.abort(); });

// -- pipelines --------------------------------------------------------------------------------------

function choose(name) {
  if (state.pipeline === name) return;
  state.pipeline = name;
  history.replaceState(null, "", `#pipeline=${encodeURIComponent(name)}`);
  showStatus();
  showCharts();
  showBatches();
  showWorkers();
  loadLetters();
}

// Records a second, over the last statuses; null until there are two.
function perSecond(name, field) {
  const known = state.last.filter((one) => name in one.pipelines);
  if (known.length < 2) return null;
  const [first, last] = [known[0], known.at(-1)];
  const seconds = last.at - first.at;
  return seconds > 0 ? Math.max(0, field(last.pipelines[name]) - field(first.pipelines[name])) / seconds : null;
}

const deadEver = (one) => one.dead + one.dead_letters.requeued;

function healthOf(one) {
  if (!one.balanced || one.journal.poisoned) return ["fault", "bad"];
  if (one.handler.state !== "up") return [one.handler.state, "bad"];
  if (one.paused) return ["paused", "warn"];
  if (one.dispatch_stopped) return ["stopped", "bad"];
  if (one.bounds_near.length) return ["near a bound", "warn"];
  return ["well", "good"];
}

function showPipelines() {
  const names = Object.keys(state.status.pipelines);
  $("pipelines").hidden = names.length < 2;
  if (names.length < 2) return;
  const focused = document.activeElement?.dataset?.pipeline;
  const rows = names.map((name) => {
    const one = state.status.pipelines[name];
    const [text, kind] = healthOf(one);
    const button = el("button", {
      type: "button", class: "row", "data-pipeline": name, "aria-pressed": String(name === state.pipeline),
      on: { click: () => choose(name) },
    }, name === state.pipeline ? el("b", {}, name) : name);
    return [button, el("span", { class: `badge ${kind}` }, text),
      rate(perSecond(name, (p) => p.accepted)), rate(perSecond(name, (p) => p.processed)),
      number(one.pending), duration(one.oldest_pending_seconds), number(one.dead_letters.kept)];
  });
  $("pipelines-table").replaceChildren(table("Pipelines", [["Pipeline"], ["State"], ["In a second", "num"], ["Out a second", "num"],
    ["Pending", "num"], ["Oldest", "num"], ["Dead letters", "num"]], rows, ""));
  if (focused) [...document.querySelectorAll("[data-pipeline]")].find((one) => one.dataset.pipeline === focused)?.focus();
}

// -- the way of a record ----------------------------------------------------------------------------

const stations = {};
function station(key, title) {
  if (!stations[key]) {
    const parts = { big: el("div", { class: "big", "data-number": key }), lines: el("div") };
    stations[key] = parts;
    $("stations").append(el("li", {}, el("h3", {}, title), parts.big, parts.lines));
  }
  return stations[key];
}

function showStation(key, title, big, unit, lines, kind = "") {
  const parts = station(key, title);
  const text = `${big}|${unit}|${kind}|${lines.map((one) => (Array.isArray(one) ? one.join("\u0000") : one)).join("\u0001")}`;
  if (parts.text === text) return;
  parts.text = text;
  parts.big.className = `big ${kind}`;
  parts.big.replaceChildren(big, " ", el("small", {}, unit));
  parts.lines.replaceChildren(...lines.map((line) => {
    if (!Array.isArray(line)) return el("p", {}, line);
    const [label, used, bound] = line;
    const near = used >= 0.8 * bound;
    return el("p", { class: near ? "warn" : "" }, `${label}: ${bytes(used)} of ${bytes(bound)}`,
      el("meter", { min: 0, max: 1, low: 0.8, high: 0.95, optimum: 0, value: Math.min(1, used / bound), "aria-label": label }));
  }));
}

function showStatus() {
  const { status } = state;
  if (!status) return;
  put($("version"), status.version);
  put($("uptime"), `up ${duration(status.uptime_seconds)}`);
  badge($("state"), status.state, status.state === "running" ? "good" : "warn");
  showPipelines();
  const name = state.pipeline;
  const one = status.pipelines[name];
  put($("pipeline-name"), name);
  document.title = one ? `${one.dead_letters.kept ? `(${one.dead_letters.kept}) ` : ""}ingestd · ${name}` : "ingestd console";
  if (!one) return;
  $("pause").hidden = false;
  put($("pause"), one.paused ? "Resume" : "Pause");
  showAlerts(name, one);
  const sources = Object.entries(status.sources || {});
  const invalid = one.invalid ? [`${number(one.invalid)} invalid kept`] : [];
  showStation("in", "Sources", rate(perSecond(name, (p) => p.accepted)), "records/s in", [
    `${number(one.accepted)} accepted in all`, ...invalid,
    ...sources.slice(0, 4).map(([source, its]) => `${source}${source === its.kind ? "" : ` (${its.kind})`}: ${its.state}`),
    ...(sources.length > 4 ? [`and ${sources.length - 4} more`] : []),
  ]);
  const age = one.oldest_pending_seconds;
  showStation("pending", "Journal", number(one.pending), "pending", [
    one.pending ? `the oldest for ${duration(age)}` : "nothing waits",
    ["journal", one.journal.bytes, one.journal.bytes_max],
  ]);
  showStation("queue", "Queue", number(one.queue.chunks), one.queue.chunks === 1 ? "chunk in memory" : "chunks in memory", [
    ["memory", one.queue.bytes, one.queue.bytes_max],
  ]);
  const waiting = one.batches.waiting_retry;
  showStation("batches", "Batches", number(one.batches.sealed), "ready", [
    waiting ? `${number(waiting)} wait for a retry (${number(one.batches.waiting_records)} records)` : "none waits for a retry",
  ], waiting ? "warn" : "");
  showStation("workers", "Workers", number(one.batches.running), "busy", [`in a ${one.executor || "?"}`]);
  const [up, kind] = { up: ["up", "good"], down: ["down", "bad"], blocked: ["blocked", "bad"] }[one.handler.state];
  showStation("out", "Handler", rate(perSecond(name, (p) => p.processed)), "records/s out", [
    `${number(one.processed)} processed in all`, `${number(one.dead)} dead`, `it is ${up}`,
  ], kind === "bad" ? "bad" : "");
  put($("dead-count"), `${number(one.dead_letters.kept)} kept, ${bytes(one.dead_letters.bytes + one.dead_letters.invalid_bytes)}`);
  lettersChanged(one);
}

let alerts = "";
function showAlerts(name, one) {
  const found = [];
  if (!one.balanced) found.push(["bad", "The numbers do not add up: accepted is not processed, dead and pending together."]);
  if (one.journal.poisoned) found.push(["bad", "The journal has failed: nothing is accepted. The daemon recovers at its next start."]);
  if (one.handler.state !== "up") {
    const since = one.handler.down_since ? ` since ${new Date(one.handler.down_since).toLocaleString()}` : "";
    found.push(["bad", `The handler is ${one.handler.state}${since}: ${one.handler.error}`]);
  }
  if (one.paused) {
    const since = one.paused_since ? ` since ${new Date(one.paused_since).toLocaleString()}` : "";
    found.push(["warn", `Paused${since}: records are accepted, and no batch is given to the handler.`]);
  } else if (one.dispatch_stopped) found.push(["bad", `No batch is given to the handler: ${one.dispatch_stopped}`]);
  for (const bound of one.bounds_near) found.push(["warn", `Near its bound: ${bound}`]);
  if (state.status.state !== "running") found.push(["warn", `The daemon is ${state.status.state}.`]);
  const text = JSON.stringify([name, found]);
  if (text === alerts) return;
  alerts = text;
  $("alerts").replaceChildren(...found.map(([kind, line]) => el("p", { class: `alert ${kind}` }, line)));
}

// -- charts -----------------------------------------------------------------------------------------

function svg(tag, attributes, text) {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text !== undefined) node.textContent = text;
  return node;
}

function niceMax(value) {
  if (value <= 0) return 1;
  const step = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 2.5, 5, 10].map((factor) => factor * step).find((one) => one >= value);
}

// The window is as long as what is known, in steps, each with its marks in minutes.
const WINDOWS = [[120, [2, 1, 0]], [300, [5, 2.5, 0]], [900, [15, 10, 5, 0]]];
function chart(title, series, show) {
  const [width, height, left, right, top, bottom] = [Math.max(240, Math.min(620, Math.round(($("chart-grid").clientWidth || 360)
    / (innerWidth > 1060 ? 3 : 1) - 30))), 150, 52, 8, 8, 20];
  const values = series.flatMap((one) => one.points.map(([, value]) => value)).filter((value) => value !== null);
  const max = niceMax(Math.max(0, ...values));
  const now = state.history.pipelines[state.pipeline]?.at(-1)?.[0] ?? Date.now() / 1000;
  const known = now - (series[0].points[0]?.[0] ?? now);
  const [span, marks] = WINDOWS.find(([seconds]) => known <= seconds) || WINDOWS.at(-1);
  const x = (at) => left + (width - left - right) * (1 - (now - at) / span);
  const y = (value) => top + (height - top - bottom) * (1 - value / max);
  const last = (one) => one.points.filter(([, value]) => value !== null).at(-1)?.[1];
  const told = series.map((one) => `${one.name} ${last(one) === undefined ? "unknown" : show(last(one))}`).join(", ");
  const drawing = svg("svg", { class: "chart", viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `${title}: now ${told}; scale to ${show(max)}` });
  for (const part of [0, 0.5, 1]) {
    drawing.append(svg("line", { class: "rule", x1: left, x2: width - right, y1: y(part * max), y2: y(part * max) }));
    drawing.append(svg("text", { x: left - 6, y: y(part * max) + 4, "text-anchor": "end" }, show(part * max)));
  }
  for (const minutes of marks) {
    const anchor = minutes === marks[0] ? "start" : minutes ? "middle" : "end";
    drawing.append(svg("text", { x: x(now - minutes * 60), y: height - 4, "text-anchor": anchor }, minutes ? `−${minutes} min` : "now"));
  }
  series.forEach((one, place) => {
    let path = "";
    let drawn = false;
    for (const [at, value] of one.points) {
      if (value === null || now - at > span) { drawn = drawn && value !== null; continue; }
      path += `${drawn ? "L" : "M"}${x(at).toFixed(1)} ${y(value).toFixed(1)}`;
      drawn = true;
    }
    if (path) drawing.append(svg("path", { class: `s${place}`, d: path }));
  });
  const keys = series.map((one, place) => el("span", { class: `key s${place}` }, `${one.name} ${last(one) === undefined ? "–" : show(last(one))}`));
  return el("figure", {}, el("figcaption", {}, el("b", {}, title), ...keys), drawing);
}

function showCharts() {
  if (!state.history) return;
  const rows = state.history.pipelines[state.pipeline] || [];
  const at = (field) => state.history.fields.indexOf(field);
  const rates = (field) => rows.slice(1).map((row, place) => {
    const before = rows[place];
    const seconds = row[0] - before[0];
    const grown = row[at(field)] - before[at(field)];
    return [row[0], seconds > 0 && grown >= 0 ? grown / seconds : null];
  });
  const plain = (field) => rows.map((row) => [row[0], row[at(field)] < 0 ? null : row[at(field)]]);
  $("chart-grid").replaceChildren(
    chart("Records a second", [
      { name: "accepted", points: rates("accepted") }, { name: "processed", points: rates("processed") },
      { name: "dead", points: rates("dead") },
    ], rate),
    chart("From acceptance to done, by batch", [
      { name: "half within", points: plain("age_50") }, { name: "99 % within", points: plain("age_99") },
    ], duration),
    chart("Pending records", [{ name: "pending", points: plain("pending") }], (value) => compact.format(value)),
  );
}

let resizing = 0;
addEventListener("resize", () => { clearTimeout(resizing); resizing = setTimeout(showCharts, 150); });

// -- workers and batches ----------------------------------------------------------------------------

let workers = byName({});
async function lookAtWorkers() {
  for (;;) {
    await visible();
    try {
      if (state.link && state.link !== "off") {
        workers = byName((await get("v1/workers")).pipelines);
        showWorkers();
      }
    } catch { /* the state of the connection says so */ }
    await pause(state.link ? WORKERS : 100);
  }
}

function showWorkers() {
  const one = workers[state.pipeline];
  const rows = (one?.workers || []).map((worker) => [worker.name, worker.pid || "",
    el("span", { class: `badge ${worker.batch ? "good" : ""}` }, worker.batch ? "busy" : "idle"),
    worker.batch ? el("span", { class: "mono id" }, worker.batch) : "", worker.batch ? number(worker.records) : "",
    worker.batch ? worker.attempt : "", worker.batch ? duration(worker.seconds) : "", worker.ahead || ""]);
  const empty = one ? `${one.running} batches are with the executor, which names no workers` : "no workers yet";
  $("workers-table").replaceChildren(table("Workers", [["Worker"], ["Process", "num"], ["State"], ["Batch"], ["Records", "num"],
    ["Attempt", "num"], ["For", "num"], ["Ahead", "num"]], rows, empty));
}

const OUTCOMES = { done: "good", retry: "warn", split: "warn", failed: "bad" };
function showBatches() {
  const rows = (state.batches[state.pipeline] || []).slice(0, BATCHES).map((one) => [
    el("span", { class: "mono id" }, one.id), el("span", { class: `badge ${OUTCOMES[one.outcome] || ""}` }, one.outcome),
    number(one.records), bytes(one.bytes), one.attempts, duration(one.seconds), duration(one.age), when(one.at), one.error,
  ]);
  $("batches-table").replaceChildren(table("Last tries of batches, the newest first", [["Batch"], ["Outcome"], ["Records", "num"],
    ["Size", "num"], ["Tries", "num"], ["Handler", "num"], ["Age", "num"], ["Ended", "time"], ["Error"]], rows, "no batch yet"));
}

// -- dead letters -----------------------------------------------------------------------------------

function letterFilter() {
  const seconds = $("dead-since").value;
  return {
    pipeline: state.pipeline, reason: $("dead-reason").value, error: $("dead-error").value,
    since: seconds ? (Date.now() / 1000 - Number(seconds)).toFixed(3) : "",
  };
}

// The filter as a change takes it.
function letterChoice() {
  const { pipeline, reason, error, since } = letterFilter();
  const choice = { pipeline, reasons: reason ? [reason] : [], error };
  if (since) choice.since = Number(since);
  return { ...choice, all: !reason && !error && !since };
}

let loading = 0;
async function loadLetters({ more = false } = {}) {
  if (!state.pipeline) return;
  const mine = (loading += 1);
  try {
    const page = await get(`v1/dead${parameters({ ...letterFilter(), limit: LETTERS, before: more ? state.before : null })}`);
    if (mine !== loading) return;
    state.letters = more ? [...state.letters, ...page.letters] : page.letters;
    state.before = page.letters.length === LETTERS ? page.letters.at(-1).id : null;
    state.found = page;
    showLetters();
    if ($("dead-summary").open) loadSummary();
  } catch (error) {
    if (mine !== loading) return;
    $("dead-table").replaceChildren(el("p", { class: "empty" }, error.message));
  }
}

function showLetters() {
  const rows = state.letters.map((one) => [
    el("button", { type: "button", class: "row", "aria-label": `Open dead letter ${one.id}`, on: { click: () => openLetter(one.id) } }, `#${one.id}`),
    when(one.last_at), one.retry ? `${one.reason}, requeued` : one.reason, one.attempts, bytes(one.bytes),
    one.records > 1 ? `[${one.records} records] ${one.error}` : one.error,
  ]);
  $("dead-table").replaceChildren(table("Dead letters, the newest first", [["Number"], ["Given up", "time"], ["Reason"], ["Tries", "num"],
    ["Size", "num"], ["Error"]], rows, "no dead letters here"));
  $("dead-more").hidden = state.before === null;
  const none = !state.letters.length;
  for (const id of ["dead-retry", "dead-export", "dead-purge"]) $(id).disabled = none;
}

// Loads the list anew when letters came or went, unless a person is busy in it.
let lettersDue = 0;
function lettersChanged(one) {
  const its = one.dead_letters;
  const key = [state.pipeline, its.kept, its.purged, its.requeued, its.readmitted, its.expired].join();
  if (key === state.lettersKey) return;
  const busy = $("dead-table").contains(document.activeElement) || $("letter").open || state.letters.length > LETTERS;
  if (busy && state.lettersKey.startsWith(`${state.pipeline},`)) return;
  if (Date.now() < lettersDue) return;
  lettersDue = Date.now() + 2000;
  state.lettersKey = key;
  loadLetters();
}

async function loadSummary() {
  try {
    const { errors } = await get(`v1/dead/summary${parameters(letterFilter())}`);
    const rows = errors.map((one) => [
      el("button", { type: "button", class: "row", on: { click: () => { $("dead-reason").value = one.reason; openLetter(one.example); } } }, number(one.letters)),
      one.reason, when(one.first_at), when(one.last_at), one.error]);
    $("dead-errors").replaceChildren(table("Dead letters by error", [["Letters"], ["Reason"], ["First", "time"], ["Last", "time"], ["Error"]], rows, "no dead letters here"));
  } catch (error) {
    $("dead-errors").replaceChildren(el("p", { class: "empty" }, error.message));
  }
}

let opened = null;
async function openLetter(id) {
  try {
    const one = await get(`v1/dead/${id}${parameters({ pipeline: state.pipeline })}`);
    opened = one;
    put($("letter-h"), `Dead letter #${one.id}`);
    const facts = [["Reason", one.reason], ["Error", one.error], ["Record", one.record || "never accepted"], ["Tries", one.attempts],
      ["Accepted", when(one.first_at)], ["Given up", when(one.last_at)], ["Size", bytes(one.bytes)],
      ["Requeued", one.retry ? "yes, it will be tried again" : "no"]];
    if (one.records > 1) facts.push(["Records", number(one.records)]);
    const origin = Object.entries(one.envelope || {}).flatMap(([name, value]) => (value !== null && typeof value === "object"
      ? Object.entries(value).map(([key, inner]) => [`${name === "headers" ? "header " : ""}${key}`, inner]) : [[name.replaceAll("_", " "), value]]));
    $("letter-body").replaceChildren(
      definitions(facts),
      el("h3", {}, "Payload"), payloadOf(one),
      ...(one.traceback ? [el("h3", {}, "Traceback"), el("pre", { tabindex: 0, "aria-label": "Traceback" }, one.traceback)] : []),
      ...(origin.length ? [el("h3", {}, "Envelope"), definitions(origin)] : []),
    );
    $("letter-retry").disabled = one.retry;
    $("letter-purge").disabled = one.retry;
    if (!$("letter").open) $("letter").showModal();
  } catch (error) {
    toast(error.message);
  }
}

const definitions = (pairs) => el("dl", {}, ...pairs.flatMap(([name, value]) => [el("dt", {}, name),
  el("dd", {}, value instanceof Node ? value : String(value))]));

function payloadOf(one) {
  if (one.payload_hidden) {
    return el("p", { class: "empty" }, "Payloads are hidden here: they are shown on a loopback address, or as admin.payloads says.");
  }
  let text = one.payload ?? one.payload_base64;
  if (one.payload !== undefined && !one.payload_cut && text.length < 65536) {
    try { text = JSON.stringify(JSON.parse(text), null, 2); } catch { /* no JSON: as it is */ }
  }
  const note = one.payload_cut ? "Only the beginning; an export has all of it." : one.payload === undefined ? "In base64." : "";
  return el("div", {}, note ? el("p", { class: "quiet" }, note) : null, el("pre", { tabindex: 0, "aria-label": "Payload", id: "payload" }, text));
}

const retried = (answer) => {
  const stay = answer.incomplete + answer.invalid;
  return `${number(answer.marked)} will be tried again within a second${stay ? `; ${number(stay)} are no whole records and stay` : ""}`;
};
const purged = (answer) => `${number(answer.purged)} deleted${answer.marked ? `; ${number(answer.marked)} are being requeued and stay` : ""}`;
const afterwards = () => setTimeout(() => { state.lettersKey = ""; loadLetters(); }, 1500);

async function onLetter(path, body, done) {
  if (!await change(path, { ...body, pipeline: opened.pipeline, ids: [opened.id] }, done)) return;
  $("letter").close();
  afterwards();
}

function wireLetters() {
  $("dead-reason").append(...REASONS.map((reason) => el("option", { value: reason }, reason)));
  $("dead-filter").addEventListener("submit", (event) => { event.preventDefault(); loadLetters(); });
  for (const id of ["dead-reason", "dead-since"]) $(id).addEventListener("change", () => loadLetters());
  $("dead-refresh").addEventListener("click", () => loadLetters());
  $("dead-more").addEventListener("click", () => loadLetters({ more: true }));
  $("dead-summary").addEventListener("toggle", () => { if ($("dead-summary").open) loadSummary(); });
  $("letter-retry").addEventListener("click", () => onLetter("v1/dead/retry", {}, retried));
  $("letter-purge").addEventListener("click", async () => {
    if (await confirmed(`Purge dead letter #${opened.id}?`, "It is deleted for good.", "Purge")) onLetter("v1/dead/purge", {}, purged);
  });
  const count = () => `${number(state.found?.count ?? 0)} dead letters of pipeline ${state.pipeline}`;
  $("dead-retry").addEventListener("click", async () => {
    if (!await confirmed("Retry these?", `${count()} are given to the handler again.`, "Retry")) return;
    if (await change("v1/dead/retry", letterChoice(), retried)) afterwards();
  });
  $("dead-purge").addEventListener("click", async () => {
    if (!await confirmed("Purge these?", `${count()} are deleted for good. An export keeps a copy.`, "Purge")) return;
    if (await change("v1/dead/purge", letterChoice(), purged)) afterwards();
  });
  $("dead-export").addEventListener("click", exportLetters);
}

async function exportLetters() {
  try {
    const blob = await (await call(`v1/dead/export${parameters(letterFilter())}`)).blob();
    const url = URL.createObjectURL(blob);
    const link = el("a", { href: url, download: `dead-letters-${state.pipeline}.ndjson` });
    document.body.append(link);
    link.click();
    link.remove();
    setTimeout(() => URL.revokeObjectURL(url), 10000);
    toast(`${bytes(blob.size)} exported`);
  } catch (error) {
    if (error.status === 401) askForToken(error.message);
    else toast(error.message);
  }
}

// -- settings ---------------------------------------------------------------------------------------

async function loadSettings() {
  try {
    state.settings = (await get("v1/settings")).settings;
    showSettings();
  } catch (error) {
    $("settings-table").replaceChildren(el("p", { class: "empty" }, error.message));
  }
}

function showSettings() {
  if (!state.settings) return;
  const key = $("settings-key").value.trim().toLowerCase();
  const rows = state.settings
    .filter((one) => one.key.toLowerCase().includes(key) && (!$("settings-set").checked || !(one.origin === "default" || one.origin.startsWith("as "))))
    .slice(0, 500)
    .map((one) => [el("span", { class: "mono" }, one.key), el("span", { class: "mono" }, typeof one.value === "string" ? one.value : JSON.stringify(one.value)), one.origin]);
  $("settings-table").replaceChildren(table("Settings in effect", [["Key"], ["Value"], ["From"]], rows,
    state.settings.length ? "none of these; take the check mark away to see defaults" : "this daemon does not tell its settings"));
}

// -- start ------------------------------------------------------------------------------------------

function useToken(token) {
  state.token = token;
  state.asked = false;
  if (token) sessionStorage.setItem("token", token);
  else sessionStorage.removeItem("token");
  put($("token-open"), token ? "Token: set" : "Token");
  if ($("token").open) $("token").close();
  tokenGiven();
  streaming?.abort();
  loadSettings();
  loadLetters();
}

function wire() {
  for (const button of document.querySelectorAll("[data-close]")) button.addEventListener("click", () => button.closest("dialog").close());
  $("confirm-yes").addEventListener("click", () => $("confirm").close("yes"));
  $("token-open").addEventListener("click", () => askForToken("A token for this daemon."));
  $("token-forget").addEventListener("click", () => useToken(""));
  $("token-form").addEventListener("submit", (event) => { event.preventDefault(); useToken($("token-input").value.trim()); });
  $("pause").addEventListener("click", async () => {
    const one = state.status.pipelines[state.pipeline];
    const path = `v1/pipelines/${encodeURIComponent(state.pipeline)}/${one.paused ? "resume" : "pause"}`;
    await change(path, {}, (answer) => (answer.paused ? "The pipeline is paused" : "The pipeline goes on"));
  });
  $("settings-filter").addEventListener("submit", (event) => event.preventDefault());
  $("settings-key").addEventListener("input", showSettings);
  $("settings-set").addEventListener("change", showSettings);
  wireLetters();
}

wire();
if (state.token) put($("token-open"), "Token: set");
showLetters();
follow();
lookAtWorkers();
loadSettings();
