// One component in full: its figures, why its bounds are what they are, who waits and holds in it.

import { bytes, element, exactBytes, plural, seconds, setText, whole } from "./format.js";
import { Asker, fill, holderItem, waiterItem } from "./requests.js";
import { drawBar } from "./table.js";

const LISTED = 20;
// The service lists requests of all components; those of one are looked for among so many.
const SEARCHED = 1000;

function facts(component, limiter) {
  const tracked = limiter.tracking === "on";
  const size = (count) => [bytes(count), count < 1024 ? "" : exactBytes(count)];
  const lines = [
    ["Minimum", ...size(component.minimum_bytes), component.entered ? "reserved" : "not entered: not reserved"],
    ["Granted", ...size(component.granted_bytes)],
    ["Granted at most", ...size(component.peak_granted_bytes), "in flight included"],
    ["In flight to it", ...size(component.in_flight_bytes), component.senders ? `of ${plural(component.senders, "sender", "senders")}` : ""],
    tracked ? ["Live", ...size(component.live_bytes)] : ["Live", "not known", `tracking is ${limiter.tracking}`],
    tracked && ["Live at most", ...size(component.peak_live_bytes)],
    tracked && ["Beyond its grants", ...size(component.overdraft_bytes), `at most ${bytes(component.peak_overdraft_bytes)}`],
    component.firm_limit_bytes === null
      ? ["Firm limit", "none", "only the quota bounds it"]
      : ["Firm limit", ...size(component.firm_limit_bytes)],
    ["Grants held", whole(component.grants)],
    [
      "Waiting",
      plural(component.waiting, "request", "requests"),
      component.waiting
        ? `for ${bytes(component.waiting_bytes)}, the oldest since ${seconds(component.oldest_wait_seconds)}`
        : "",
    ],
    ["Waited in all", seconds(component.total_wait_seconds)],
    ["Delayed in all", seconds(component.total_delay_seconds), "under pressure"],
    ["Given, refused", `${whole(component.admissions)}, ${whole(component.refusals)}`],
    ...Object.entries(component.resources).map(([kind, count]) => [kind, whole(count), "other resource, in flight included"]),
    limiter.observe && [
      "Would have",
      `waited ${whole(component.would_wait)} times, ${seconds(component.would_wait_seconds)}`,
      `refused ${whole(component.would_refuse)}`,
    ],
  ];
  return lines.filter(Boolean);
}

// A line for each item of a minimum or of what comes on top of it, with its sum before them.
function reasons(title, expression) {
  const isSum = expression.kind === "sum" && !expression.name;
  const items = isSum ? expression.children : [expression];
  return [`${title}: ${bytes(expression.value)}`, ...items.map(({ why }) => `    ${why}`)];
}

function* everyPart(bounds) {
  yield [bounds.path, bounds];
  for (const part of bounds.subcomponents) yield* everyPart(part);
}

export class Details {
  #dialog = document.getElementById("details");
  #facts = document.getElementById("details-facts");
  #bar = document.getElementById("details-bar");
  #bounds = document.getElementById("details-bounds");
  #path = null;
  #asker = new Asker();
  #limiter = null;
  #declared = null; // path -> bounds; asked for once per process of the service

  constructor() {
    document.getElementById("details-close").addEventListener("click", () => this.#dialog.close());
    this.#dialog.addEventListener("click", (event) => {
      if (event.target === this.#dialog) this.#dialog.close(); // beside it
    });
    this.#dialog.addEventListener("close", () => {
      this.#path = null;
    });
  }

  open(path) {
    this.#path = path;
    setText(document.getElementById("details-path"), path);
    this.#facts.replaceChildren();
    this.#bounds.replaceChildren();
    for (const id of ["details-waiters", "details-holders"]) document.getElementById(id).replaceChildren();
    this.#asker.forget();
    this.update(this.#limiter);
    this.#showBounds(path);
    this.#dialog.showModal();
    this.#dialog.scrollTop = 0;
  }

  forget() {
    this.#declared = null;
  }

  update(limiter) {
    this.#limiter = limiter;
    if (this.#path === null) return;
    const component = limiter.components.find(({ path }) => path === this.#path);
    if (!component) return; // gone; what was last known of it stays
    drawBar(this.#bar, component);
    this.#bar.parentElement.classList.toggle("overdrawn", component.overdraft_bytes > 0);
    const lines = facts(component, limiter);
    while (this.#facts.children.length > lines.length) this.#facts.lastChild.remove();
    lines.forEach(([name, value, ...notes], index) => {
      const line = this.#facts.children[index] ?? this.#addFact();
      setText(line.children[0], name);
      setText(line.children[1].firstChild, value);
      setText(line.children[1].lastChild, notes.filter(Boolean).map((note) => ` ${note}`).join(","));
    });
    this.#showRequests(component);
  }

  #addFact() {
    const line = element("div");
    const value = element("dd");
    value.append(element("span"), element("span", "exact"));
    line.append(element("dt"), value);
    this.#facts.append(line);
    return line;
  }

  async #showRequests(component) {
    const found = await this.#asker.ask(SEARCHED);
    if (!found || this.#path !== component.path) return;
    const ofIt = ({ items }) => items.filter((one) => one.component === component.path).slice(0, LISTED);
    fill(document.getElementById("details-waiters"), ofIt(found.waiting).map(waiterItem), {
      total: component.waiting,
      none: component.waiting ? `None among the ${whole(SEARCHED)} that wait longest.` : "Nobody waits.",
    });
    fill(document.getElementById("details-holders"), ofIt(found.held).map(holderItem), {
      total: component.grants,
      none: component.grants ? `None among the ${whole(SEARCHED)} largest.` : "Nothing is granted.",
    });
  }

  async #showBounds(path) {
    try {
      this.#declared ??= await this.#askForBounds();
    } catch (error) {
      if (!(error instanceof TypeError)) throw error;
    }
    if (this.#path !== path) return;
    const bounds = this.#declared?.get(path);
    const said = [];
    if (bounds?.minimum) said.push(...reasons("minimum", bounds.minimum));
    if (bounds?.firm) said.push(...reasons("firm limit, on top of the minimum", bounds.firm));
    if (!said.length) said.push("It declares no bounds.");
    this.#bounds.replaceChildren(...said.map((text) => element("span", "why", text)));
  }

  async #askForBounds() {
    const answer = await fetch("bounds");
    return answer.ok ? new Map(everyPart((await answer.json()).bounds)) : null;
  }
}
