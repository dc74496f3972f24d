// Who waits for what and since when, and who holds how much: lists of sentences.

import { bytes, element, plural, seconds, setText, whole } from "./format.js";

const ASKED = {
  grant: "a grant",
  grow: "to grow a grant",
  enter: "to enter, which reserves its minimum",
  transfer: "to take over a grant",
};

function withOthers(size, also) {
  const others = Object.entries(also).map(([kind, count]) => `${count} ${kind}`);
  return [bytes(size), ...others].join(" + ");
}

function why({ component, waits_for, threshold_bytes, missing }) {
  switch (waits_for) {
    case "bytes":
      return `needs ${bytes(threshold_bytes)} free, ${bytes(missing)} of it are missing`;
    case "firm limit":
      return `${bytes(missing)} over the firm limit with it: waits until ${component} gives something back`;
    case "turn":
      return "there is room; it waits for its turn";
    default:
      return `lacks ${plural(missing, "unit", "units")} of ${waits_for}`;
  }
}

function item(component, sender, amount, since, note) {
  const node = element("li");
  const who = element("span", "who", component);
  if (sender !== null) who.append(element("span", "sender", ` for ${sender}`));
  node.append(who, element("span", "since", since), element("span", "amount", amount));
  if (note) node.append(element("span", "note", note));
  return node;
}

export function waiterItem(request) {
  const notes = [ASKED[request.kind], why(request)];
  if (request.bypassed_bytes > 0) notes.push(`${bytes(request.bypassed_bytes)} went past it`);
  if (request.is_barrier) notes.push("■\u00a0nobody passes it any more");
  return item(
    request.component,
    request.sender,
    withOthers(request.wanted_bytes, request.also),
    `since ${seconds(request.waited_seconds)}`,
    notes.join("; "),
  );
}

export function holderItem(grant) {
  const amount = withOthers(grant.size_bytes, grant.also);
  const note = grant.is_alone ? "holds the pool alone" : "";
  return item(grant.component, grant.sender, amount, `for ${seconds(grant.age_seconds)}`, note);
}

// Fills a list; says so where there is nothing, or more than is listed.
export function fill(list, items, { total, none }) {
  if (!items.length) {
    list.replaceChildren(element("li", "none muted", none));
    return;
  }
  const left = total - items.length;
  if (left > 0) items.push(element("li", "none muted", `and ${plural(left, "other", "others")}`));
  list.replaceChildren(...items);
}

const LISTED = 6;
const LEAST_WAIT_MS = 2_000; // between two questions: an answer costs more the more is held

// Asks who waits and who holds: one question at a time, however slow the answer.
export class Asker {
  #isAsking = false;
  #askedAt = -Infinity;

  // Gives the first `most` of both; null where it is too early or there is no answer.
  async ask(most) {
    if (this.#isAsking || performance.now() - this.#askedAt < LEAST_WAIT_MS) return null;
    this.#isAsking = true;
    this.#askedAt = performance.now();
    try {
      const answer = await fetch(`grants?held_limit=${most}&waiting_limit=${most}`);
      return answer.ok ? await answer.json() : null;
    } catch (error) {
      if (error instanceof TypeError) return null; // the connection is lost; the feed says so
      throw error;
    } finally {
      this.#isAsking = false;
    }
  }

  forget() {
    this.#askedAt = -Infinity;
  }
}

export class Requests {
  #asker = new Asker();

  async update(limiter) {
    setText(document.getElementById("waiters-count"), whole(limiter.waiting));
    setText(document.getElementById("holders-count"), whole(limiter.grants));
    const found = await this.#asker.ask(LISTED);
    if (!found) return;
    const { waiting, held } = found;
    fill(document.getElementById("waiters"), waiting.items.map(waiterItem), {
      total: waiting.total,
      none: "Nobody waits.",
    });
    fill(document.getElementById("holders"), held.items.map(holderItem), {
      total: held.total,
      none: "Nothing is granted.",
    });
  }
}
