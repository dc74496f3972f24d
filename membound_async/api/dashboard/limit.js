// How close to the limit: the verdict, the large figures, and what the limit is divided into.

import { bytes, percent, plural, seconds, setText, whole } from "./format.js";

const WORDS = { ok: "OK", over_limit: "Over the limit", stalled: "Stalled" };

const at = (id) => document.getElementById(id);
const show = (id, text) => setText(at(id), text);

// Sets lengths, as fractions of the whole, that the style sheet draws from.
function setLengths(node, lengths) {
  for (const [name, fraction] of Object.entries(lengths)) {
    const value = Math.max(0, Math.min(1, fraction)).toFixed(4);
    if (node.style.getPropertyValue(name) !== value) node.style.setProperty(name, value);
  }
}

function showVerdict({ status, reason, limiter }) {
  at("verdict").dataset.status = status;
  show("status", WORDS[status] ?? status);
  const fallback = limiter.waiting
    ? `${plural(limiter.waiting, "request waits", "requests wait")} for memory`
    : "nobody waits for memory";
  show("reason", reason ?? fallback);
}

function showFigures(limiter) {
  const effective = limiter.effective_limit_bytes;
  show("measured", bytes(limiter.measured_bytes));
  show(
    "measured-of",
    `measured (${limiter.measured_name}), ${percent(limiter.measured_bytes, effective)} of the effective limit of ${bytes(effective)}`,
  );
  show("free", bytes(limiter.free_bytes));
  show("free-note", limiter.free_bytes < 0 ? "more is out than there is" : percent(limiter.free_bytes, effective));
  show("granted", bytes(limiter.granted_bytes));
  const flight = limiter.in_flight_bytes ? `, ${bytes(limiter.in_flight_bytes)} in flight` : "";
  show("granted-note", `${plural(limiter.grants, "grant", "grants")}${flight}`);
  show("waiting", whole(limiter.waiting));
  show(
    "waiting-note",
    limiter.waiting
      ? `for ${bytes(limiter.waiting_bytes)}, since ${seconds(limiter.oldest_wait_seconds)}`
      : "requests",
  );
  show("delay", seconds(limiter.delay_seconds));
  show("delay-note", `pressure ${percent(limiter.level, 1)}`);
}

// What is taken is laid end to end from the left; what of it reaches the effective limit, and
// into the slop behind it, is more than there is.
function showDivision(limiter) {
  const { baseline_bytes, committed_bytes, drift_bytes, measured_bytes, limit_bytes } = limiter;
  const effective = limiter.effective_limit_bytes;
  const width = Math.max(limit_bytes, baseline_bytes + committed_bytes + drift_bytes, measured_bytes);
  setLengths(at("part-baseline"), { "--length": baseline_bytes / width });
  setLengths(at("part-committed"), { "--length": committed_bytes / width });
  setLengths(at("part-drift"), { "--length": drift_bytes / width });
  setLengths(at("scale"), {
    "--threshold-at": limiter.threshold_bytes / width,
    "--effective-at": effective / width,
    "--limit-at": limit_bytes / width,
    "--measured-at": measured_bytes / width,
  });
  at("at-measured").classList.toggle("flip", measured_bytes / width > 0.5);
  show("baseline", bytes(baseline_bytes));
  show("committed", bytes(committed_bytes));
  show("drift", bytes(drift_bytes));
  show("free-part", bytes(limiter.free_bytes));
  show("slop", bytes(limit_bytes - effective));
  show("threshold", bytes(limiter.threshold_bytes));
  show("effective", bytes(effective));
}

function showNotes(limiter) {
  const notes = [
    `Limit ${bytes(limiter.limit_bytes)} (${limiter.limit_source}), slop factor ${limiter.slop_factor}. ` +
      `Peak ${bytes(limiter.peak_measured_bytes)}.`,
  ];
  for (const [kind, { free, limit }] of Object.entries(limiter.resources)) {
    notes.push(`${whole(limit - free)} of ${whole(limit)} ${kind} in use.`);
  }
  if (limiter.observe) {
    notes.push(
      `Observe only: nothing is held back. ${plural(limiter.would_wait, "request", "requests")} would have ` +
        `waited, ${whole(limiter.would_refuse)} would have been refused.`,
    );
  }
  if (limiter.tracking !== "on") notes.push(`Live bytes are not known: tracking is ${limiter.tracking}.`);
  if (limiter.probe_failures) notes.push(`${plural(limiter.probe_failures, "reading", "readings")} of memory failed.`);
  show("notes", notes.join(" "));
}

export function showLimit(snapshot) {
  const { limiter, status } = snapshot;
  showVerdict(snapshot);
  showFigures(limiter);
  showDivision(limiter);
  showNotes(limiter);
  show("process", `${snapshot.membound_version} · pid ${snapshot.pid} · up ${seconds(limiter.age_seconds)}`);
  const sign = { ok: "", over_limit: "▲ ", stalled: "■ " }[status] ?? "";
  const title = `${sign}${percent(limiter.measured_bytes, limiter.effective_limit_bytes)} · membound`;
  if (document.title !== title) document.title = title;
}
