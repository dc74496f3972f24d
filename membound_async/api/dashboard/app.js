// The dashboard: takes snapshots from the feed and hands them to the parts of the page.

import { Charts } from "./charts.js";
import { Details } from "./details.js";
import { Feed } from "./feed.js";
import { showLimit } from "./limit.js";
import { setText } from "./format.js";
import { Requests } from "./requests.js";
import { ComponentTable } from "./table.js";

const charts = new Charts();
const requests = new Requests();
const details = new Details();
const table = new ComponentTable({ onOpen: (path) => details.open(path) });

const connection = document.getElementById("connection");
const word = document.getElementById("connection-word");
const age = document.getElementById("age");
const pause = document.getElementById("pause");

let latest = null;
let pid = null;

function onSnapshot(snapshot) {
  latest = snapshot;
  if (pid !== snapshot.pid) {
    pid = snapshot.pid;
    details.forget(); // another process: its bounds may be others
  }
  showLimit(snapshot);
  charts.add(snapshot);
  table.update(snapshot.limiter);
  details.update(snapshot.limiter);
  requests.update(snapshot.limiter);
  showAge();
}

function onState(state) {
  connection.dataset.state = state;
  setText(word, state);
}

const feed = new Feed("events", { onSnapshot, onState });

function showAge() {
  const ms = feed.ageMs;
  setText(age, ms === null ? "" : ms < 1_000 ? "data is new" : `data ${Math.floor(ms / 1000)} s old`);
  connection.classList.toggle("stale", ms !== null && ms > feed.staleMs);
}

// Runs while somebody can see it and wants to: a hidden page costs the service nothing.
function openOrClose() {
  const isPaused = pause.getAttribute("aria-pressed") === "true";
  if (isPaused || document.hidden) feed.close();
  else feed.open(latest ? "reconnecting" : "connecting");
}

pause.addEventListener("click", () => {
  const isPaused = pause.getAttribute("aria-pressed") !== "true";
  pause.setAttribute("aria-pressed", String(isPaused));
  openOrClose();
});
document.addEventListener("visibilitychange", openOrClose);
setInterval(() => {
  if (document.hidden) return;
  showAge();
  feed.check();
}, 1_000);
openOrClose();
