// Numbers as a person reads them, the way the library's own messages write them.

const UNITS = ["KiB", "MiB", "GiB", "TiB"];

// "64.0 MiB"; a minus sign, not a hyphen, for what is missing.
export function bytes(count) {
  const sign = count < 0 ? "−" : "";
  let value = Math.abs(count);
  if (value < 1024) return `${sign}${value} B`;
  let unit = 0;
  value /= 1024;
  while (value >= 1023.95 && unit < UNITS.length - 1) {
    value /= 1024;
    unit += 1;
  }
  return `${sign}${value.toFixed(1)} ${UNITS[unit]}`;
}

// "64 MiB" on an axis, where the ticks are round.
export function roundBytes(count) {
  return bytes(count).replace(".0 ", " ");
}

const grouped = new Intl.NumberFormat("en", { useGrouping: true });

export function whole(count) {
  return grouped.format(count).replaceAll(",", " ");
}

export function exactBytes(count) {
  return `${whole(count)} bytes`;
}

export function percent(part, of) {
  return of > 0 ? `${Math.round((100 * part) / of)}\u00a0%` : "–";
}

// A length of time with the two units that matter.
export function seconds(value) {
  if (value < 0.001) return "0 s";
  if (value < 1) return `${Math.round(value * 1000)} ms`;
  if (value < 10) return `${value.toFixed(1)} s`;
  const total = Math.round(value);
  if (total < 60) return `${total} s`;
  if (total < 3600) return `${Math.floor(total / 60)} min ${total % 60} s`;
  const minutes = Math.round(total / 60);
  if (minutes < 1440) return `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
  const hours = Math.round(total / 3600);
  return `${Math.floor(hours / 24)} d ${hours % 24} h`;
}

const clock = new Intl.DateTimeFormat(undefined, {
  hour: "2-digit",
  minute: "2-digit",
  second: "2-digit",
  hourCycle: "h23",
});

export function timeOfDay(unixSeconds) {
  return clock.format(unixSeconds * 1000);
}

export function plural(count, one, many) {
  return `${whole(count)} ${count === 1 ? one : many}`;
}

// Writes only what is new: an unchanged text costs no layout, and is not read out again.
export function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

export function element(name, className, text = "") {
  const node = document.createElement(name);
  if (className) node.className = className;
  if (text) node.textContent = text;
  return node;
}
