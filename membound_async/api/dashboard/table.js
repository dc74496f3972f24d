// The components: a row each, sorted, filtered, and written to only where something changed.

import { bytes, percent, seconds, setText, whole } from "./format.js";

const COLLATOR = new Intl.Collator("en", { numeric: true });

// What each column sorts by; numbers start with the largest, as one looks for the largest.
const SORT_BY = {
  path: (component) => component.path,
  share: (component) => held(component) / fullWidth(component),
  minimum: (component) => component.minimum_bytes,
  granted: (component) => component.granted_bytes,
  flight: (component) => component.in_flight_bytes,
  live: (component) => component.live_bytes,
  firm: (component) => component.firm_limit_bytes ?? Infinity,
  waiting: (component) => component.waiting,
  oldest: (component) => component.oldest_wait_seconds,
};

let effectiveLimitBytes = 1;

function held(component) {
  return Math.max(component.granted_bytes, component.live_bytes) + component.in_flight_bytes;
}

// What the whole width of a component's bar stands for.
function fullWidth(component) {
  return Math.max(component.firm_limit_bytes ?? effectiveLimitBytes, held(component), 1);
}

// Sets the five lengths that the style sheet paints a bar from; what there is none of lies
// outside of it.
export function drawBar(bar, component, width = fullWidth(component)) {
  const of = (count) => Math.min(1, count / width).toFixed(4);
  const lengths = {
    "--minimum-at": component.minimum_bytes ? of(component.minimum_bytes) : "-1",
    "--granted-to": of(component.granted_bytes),
    "--flight-to": of(component.granted_bytes + component.in_flight_bytes),
    "--live-to": of(component.live_bytes),
    "--firm-at": component.firm_limit_bytes === null ? "2" : of(component.firm_limit_bytes),
  };
  bar.lengths ??= {};
  for (const [name, length] of Object.entries(lengths)) {
    if (bar.lengths[name] === length) continue;
    bar.lengths[name] = length;
    bar.style.setProperty(name, length);
  }
}

class Row {
  constructor(template, path) {
    this.path = path;
    this.node = template.content.firstElementChild.cloneNode(true);
    this.node.dataset.path = path;
    const [name, use, ...cells] = this.node.children;
    name.firstElementChild.textContent = path;
    this.bar = use.firstElementChild;
    this.cells = [use.lastElementChild, ...cells];
    this.shown = [];
    this.isSkipped = false;
  }

  update(component, options) {
    this.component = component;
    this.options = options;
    if (!this.isSkipped) this.#write();
  }

  // The browser does not draw rows that are out of sight, and they are written to when they
  // come into it.
  onVisibility(isSkipped) {
    this.isSkipped = isSkipped;
    if (!isSkipped) this.#write();
  }

  #write() {
    const { component } = this;
    const { width, tracked } = this.options;
    drawBar(this.bar, component, width);
    const overdraft = component.overdraft_bytes;
    const live = bytes(component.live_bytes);
    const texts = [
      percent(held(component), fullWidth(component)),
      bytes(component.minimum_bytes),
      bytes(component.granted_bytes),
      component.in_flight_bytes ? bytes(component.in_flight_bytes) : "–",
      tracked ? (overdraft ? `▲ ${live}` : live) : "–",
      component.firm_limit_bytes === null ? "none" : bytes(component.firm_limit_bytes),
      component.waiting ? `${whole(component.waiting)} · ${bytes(component.waiting_bytes)}` : "–",
      component.waiting ? seconds(component.oldest_wait_seconds) : "–",
    ];
    texts.forEach((text, index) => {
      if (this.shown[index] === text) return;
      this.shown[index] = text;
      this.cells[index].textContent = text;
    });
    const state = `${component.waiting ? "waits " : ""}${overdraft ? "overdrawn" : ""}`;
    if (this.state !== state) {
      this.state = state;
      this.node.classList.toggle("waits", component.waiting > 0);
      this.node.classList.toggle("overdrawn", overdraft > 0);
    }
  }
}

export class ComponentTable {
  #template = document.getElementById("row");
  #body = document.getElementById("rows");
  #table = document.getElementById("table");
  #filter = document.getElementById("filter");
  #onlyWaiting = document.getElementById("only-waiting");
  #sameScale = document.getElementById("same-scale");
  #count = document.getElementById("components-count");
  #none = document.getElementById("no-rows");
  #headers = [...document.querySelectorAll("#table th[data-key]")];
  #rows = new Map();
  #limiter = null;
  #sortKey = "granted";
  #descending = true;
  #current = null; // the row that the Tab key leads to
  #onOpen;

  constructor({ onOpen }) {
    this.#onOpen = onOpen;
    for (const header of this.#headers) {
      header.firstElementChild.addEventListener("click", () => this.#sortBy(header.dataset.key));
    }
    this.#markSorted();
    this.#filter.addEventListener("input", () => this.#arrange());
    this.#onlyWaiting.addEventListener("change", () => this.#arrange());
    this.#sameScale.addEventListener("change", () => this.update(this.#limiter));
    this.#body.addEventListener("click", (event) => this.#open(event.target.closest("tr")));
    this.#body.addEventListener("keydown", (event) => this.#onKey(event));
    this.#body.addEventListener("contentvisibilityautostatechange", ({ target, skipped }) => {
      this.#rows.get(target.dataset.path)?.onVisibility(skipped);
    });
    this.#body.addEventListener("focusin", (event) => this.#makeCurrent(event.target.closest("tr")));
  }

  update(limiter) {
    if (!limiter) return;
    this.#limiter = limiter;
    effectiveLimitBytes = limiter.effective_limit_bytes;
    const components = limiter.components;
    let width;
    if (this.#sameScale.checked) {
      width = 1;
      for (const component of components) {
        width = Math.max(width, held(component), component.firm_limit_bytes ?? 0);
      }
    }
    const tracked = limiter.tracking === "on";
    const gone = new Set(this.#rows.keys());
    for (const component of components) {
      let row = this.#rows.get(component.path);
      if (!row) {
        row = new Row(this.#template, component.path);
        this.#rows.set(component.path, row);
      }
      gone.delete(component.path);
      row.update(component, { width, tracked });
    }
    for (const path of gone) {
      this.#rows.get(path).node.remove();
      this.#rows.delete(path);
    }
    // Rows do not change places under somebody's pointer or focus.
    const isHeld = this.#body.matches(":hover, :focus-within");
    this.#arrange({ keepOrder: isHeld });
  }

  #sortBy(key) {
    this.#descending = key === this.#sortKey ? !this.#descending : key !== "path";
    this.#sortKey = key;
    this.#markSorted();
    this.#arrange();
  }

  #markSorted() {
    for (const header of this.#headers) {
      const isSorted = header.dataset.key === this.#sortKey;
      const order = this.#descending ? "descending" : "ascending";
      header.setAttribute("aria-sort", isSorted ? order : "none");
    }
  }

  #arrange({ keepOrder = false } = {}) {
    const wanted = this.#filter.value.trim().toLowerCase();
    let shown = 0;
    for (const row of this.#rows.values()) {
      const isShown =
        row.path.toLowerCase().includes(wanted) &&
        (row.component.waiting > 0 || !this.#onlyWaiting.checked);
      if (row.node.hidden === isShown) row.node.hidden = !isShown;
      shown += isShown;
    }
    if (!keepOrder) place(this.#body, this.#sorted().map((row) => row.node));
    else for (const row of this.#rows.values()) if (!row.node.isConnected) this.#body.append(row.node);

    const all = this.#rows.size;
    setText(this.#count, shown === all ? whole(all) : `${whole(shown)} of ${whole(all)}`);
    this.#none.hidden = shown > 0;
    if (!this.#current?.isConnected || this.#current.hidden) this.#makeCurrent(this.#visible()[0]);
  }

  #sorted() {
    const valueOf = SORT_BY[this.#sortKey];
    const sign = this.#descending ? -1 : 1;
    const byPath = (one, other) => COLLATOR.compare(one.path, other.path);
    const rows = [...this.#rows.values()];
    if (this.#sortKey === "path") return rows.sort((one, other) => sign * byPath(one, other));
    for (const row of rows) row.rank = valueOf(row.component);
    return rows.sort((one, other) => {
      if (one.rank !== other.rank) return one.rank < other.rank ? -sign : sign;
      return byPath(one, other);
    });
  }

  #visible() {
    return [...this.#body.children].filter((node) => !node.hidden);
  }

  // One stop for the Tab key, however many rows there are; arrows go on from there.
  #makeCurrent(node) {
    if (node === this.#current) return;
    if (this.#current) this.#current.tabIndex = -1;
    this.#current = node ?? null;
    if (node) node.tabIndex = 0;
  }

  #onKey(event) {
    if (event.altKey || event.ctrlKey || event.metaKey) return;
    const node = event.target.closest("tr");
    if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      this.#open(node);
      return;
    }
    const steps = { ArrowDown: 1, ArrowUp: -1, PageDown: 10, PageUp: -10, End: Infinity, Home: -Infinity };
    const step = steps[event.key];
    if (!step) return;
    event.preventDefault();
    const nodes = this.#visible();
    const next = Math.max(0, Math.min(nodes.length - 1, nodes.indexOf(node) + step));
    nodes[next].focus();
  }

  #open(node) {
    if (node) this.#onOpen(node.dataset.path);
  }
}

// Brings nodes into an order by moving few of them: those that are in order already, found as
// the longest run that rises, stay where they are, and with them the reader's place.
export function place(parent, nodes) {
  const before = new Map([...parent.children].map((node, index) => [node, index]));
  const staying = longestRising(nodes.map((node) => before.get(node) ?? -1));
  let next = null;
  for (let index = nodes.length - 1; index >= 0; index -= 1) {
    if (!staying.has(index)) parent.insertBefore(nodes[index], next);
    next = nodes[index];
  }
}

// The indexes of a longest rising subsequence; -1 is never part of it.
function longestRising(values) {
  const tails = []; // tails[n]: where the run of n + 1 values with the lowest end ends
  const previous = [];
  values.forEach((value, index) => {
    if (value < 0) return;
    let low = 0;
    let high = tails.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (values[tails[middle]] < value) low = middle + 1;
      else high = middle;
    }
    previous[index] = tails[low - 1];
    tails[low] = index;
  });
  const staying = new Set();
  for (let index = tails.at(-1); index !== undefined; index = previous[index]) staying.add(index);
  return staying;
}
