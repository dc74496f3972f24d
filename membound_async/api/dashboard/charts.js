// Two lines of time: memory against its limits, and waiting. uPlot draws them.
/* global uPlot */

import { bytes, element, roundBytes, seconds, setText, timeOfDay, whole } from "./format.js";

// One snapshot a second for a quarter of an hour; older ones are forgotten.
const MOST_POINTS = 900;

// Lines differ in their dashes and widths too, for those who cannot tell the colours apart.
const MEMORY = [
  { key: "measured", label: "Measured", width: 2, filled: true, show: bytes },
  { key: "committed", label: "Baseline + committed", width: 1.5, dash: [2, 3], show: bytes },
  { key: "threshold", label: "Threshold", width: 1.5, dash: [8, 4], show: bytes },
  { key: "limit", label: "Effective limit", width: 2.5, show: bytes },
];

const WAITS = [
  { key: "waiting", label: "Requests waiting", width: 2, filled: true, stepped: true, show: whole },
  { key: "delay", label: "Delay of a new grant", width: 1.5, dash: [6, 4], scale: "s", show: seconds },
];

// 1, 2, 4, ... bytes: ticks that are round in binary units.
const BINARY_STEPS = Array.from({ length: 53 }, (_, power) => 2 ** power);

class Chart {
  #plot;
  #lines;
  #values;
  #data;
  #box;

  constructor(name, lines, axes, scales) {
    this.#lines = lines;
    this.#box = document.getElementById(`${name}-chart`);
    const legend = document.getElementById(`${name}-legend`);
    const swatches = lines.map(({ key }) => element("i", `swatch line ${key}`));
    this.#values = lines.map(() => element("dd", "", "–"));
    lines.forEach(({ label }, index) => {
      const item = element("div");
      const term = element("dt");
      term.append(swatches[index], label);
      item.append(term, this.#values[index]);
      legend.append(item);
    });

    // The canvas takes its colours from the style sheet, by way of the legend; looked up once
    // per theme, because a look-up makes the browser compute the styles of the whole page.
    const colours = () => ({
      text: getComputedStyle(legend).color,
      grid: getComputedStyle(this.#box).outlineColor,
      lines: swatches.map((swatch) => getComputedStyle(swatch).color),
    });
    let colour = colours();
    document.addEventListener("themechange", () => {
      colour = colours();
      this.#plot.redraw(false);
    });
    const axis = {
      stroke: () => colour.text,
      grid: { stroke: () => colour.grid, width: 1 },
      ticks: { show: false },
      font: "12px system-ui, sans-serif",
    };
    this.#data = [[], ...lines.map(() => [])];
    this.#plot = new uPlot(
      {
        width: this.#box.clientWidth,
        height: this.#box.clientHeight,
        legend: { show: false },
        cursor: { sync: { key: "membound" }, drag: { x: false, y: false }, y: false },
        scales: { x: { time: true }, ...scales },
        axes: [
          { ...axis, size: 26, space: 80, values: (_, splits) => splits.map(timeOfDay) },
          ...axes.map((own) => ({ ...axis, ...own })),
        ],
        series: [
          {},
          ...lines.map((line, index) => ({
            label: line.label,
            scale: line.scale ?? "y",
            width: line.width,
            dash: line.dash,
            spanGaps: false,
            stroke: () => colour.lines[index],
            fill: line.filled
              ? () => colour.lines[index].replace(/^rgb\((.*)\)$/, "rgba($1, 0.12)")
              : undefined,
            paths: line.stepped ? uPlot.paths.stepped({ align: 1 }) : undefined,
            points: { show: false },
          })),
        ],
        hooks: { setCursor: [() => this.#showValues()] },
      },
      this.#data,
      this.#box,
    );
    new ResizeObserver(() => {
      this.#plot.setSize({ width: this.#box.clientWidth, height: this.#box.clientHeight });
    }).observe(this.#box);
  }

  // Adds a point; a gap before it where time has passed unseen.
  add(unixSeconds, point, { afterGap }) {
    if (afterGap) this.#push(this.#data[0].at(-1) + 0.001, {});
    this.#push(unixSeconds, point);
    this.#plot.setData(this.#data);
    this.#showValues();
    const spoken = this.#lines.map(({ label, key, show }) => `${label} ${show(point[key])}`);
    this.#box.setAttribute("aria-description", spoken.join(", "));
  }

  #push(unixSeconds, point) {
    this.#data[0].push(unixSeconds);
    this.#lines.forEach(({ key }, index) => this.#data[index + 1].push(point[key] ?? null));
    if (this.#data[0].length > MOST_POINTS) for (const column of this.#data) column.shift();
  }

  // What the pointer is at, or else the present.
  #showValues() {
    const at = this.#plot?.cursor.idx ?? this.#data[0].length - 1;
    this.#lines.forEach(({ show }, index) => {
      const value = this.#data[index + 1][at];
      setText(this.#values[index], value == null ? "–" : show(value));
    });
  }
}

export class Charts {
  #memory = new Chart(
    "memory",
    MEMORY,
    [{ scale: "y", size: 72, incrs: BINARY_STEPS, values: (_, splits) => splits.map(roundBytes) }],
    { y: { range: (_, __, highest) => [0, Math.max(1, highest * 1.05)] } },
  );

  #waits = new Chart(
    "waits",
    WAITS,
    [
      { scale: "y", size: 40, incrs: [1, 2, 5, 10, 20, 50, 100, 200, 500, 1e3, 2e3, 5e3, 1e4, 1e5] },
      {
        scale: "s",
        side: 1,
        size: 56,
        grid: { show: false },
        values: (_, splits) => splits.map(seconds),
      },
    ],
    {
      y: { range: (_, __, highest) => [0, Math.max(5, highest * 1.1)] },
      s: { range: (_, __, highest) => [0, Math.max(0.03, highest * 1.1)] },
    },
  );

  #lastSeconds = null;
  #intervalSeconds = Infinity;

  add({ unix_seconds: now, limiter }) {
    if (this.#lastSeconds !== null && now <= this.#lastSeconds) return; // seen, or a clock set back
    const passed = this.#lastSeconds === null ? 0 : now - this.#lastSeconds;
    const afterGap = passed > 3 * this.#intervalSeconds + 1;
    if (passed && !afterGap) this.#intervalSeconds = passed;
    this.#lastSeconds = now;
    const memory = {
      measured: limiter.measured_bytes,
      committed: limiter.baseline_bytes + limiter.committed_bytes,
      threshold: limiter.threshold_bytes,
      limit: limiter.effective_limit_bytes,
    };
    this.#memory.add(now, memory, { afterGap });
    const waits = { waiting: limiter.waiting, delay: limiter.delay_seconds };
    this.#waits.add(now, waits, { afterGap });
  }
}
