// The stream of snapshots: opened, watched, opened again, closed while nobody looks.

const FIRST_RETRY_MS = 1_000;
const LONGEST_RETRY_MS = 15_000;
const LEAST_SILENCE_MS = 15_000;

export class Feed {
  #url;
  #onSnapshot;
  #onState;
  #source = null;
  #timer = 0;
  #retryMs = FIRST_RETRY_MS;
  #openedAt = 0;
  #receivedAt = null;
  #intervalMs = 1_000;

  constructor(url, { onSnapshot, onState }) {
    this.#url = url;
    this.#onSnapshot = onSnapshot;
    this.#onState = onState;
  }

  // How old the last snapshot is by this computer's clock; null if there was none.
  get ageMs() {
    return this.#receivedAt === null ? null : performance.now() - this.#receivedAt;
  }

  // Data older than this is stale: it should have been replaced some time ago.
  get staleMs() {
    return 3 * this.#intervalMs + 1_000;
  }

  open(state = "connecting") {
    this.#drop();
    this.#onState(state);
    this.#openedAt = performance.now();
    const source = new EventSource(this.#url);
    this.#source = source;
    let lastAt = null;
    source.addEventListener("snapshot", (event) => {
      const now = performance.now();
      if (lastAt !== null) this.#intervalMs = now - lastAt;
      lastAt = this.#receivedAt = now;
      this.#retryMs = FIRST_RETRY_MS;
      this.#onState("live");
      this.#onSnapshot(JSON.parse(event.data));
    });
    source.addEventListener("error", () => {
      lastAt = null;
      this.#onState("reconnecting");
      // An EventSource tries again by itself after a lost connection, and gives up for good
      // after an answer that is no stream, such as a proxy's 502 while the service restarts.
      if (source.readyState === EventSource.CLOSED) this.#retryLater();
    });
  }

  close(state = "paused") {
    this.#drop();
    this.#onState(state);
  }

  // Called now and then: a connection that died without a word is opened anew.
  check() {
    if (this.#source?.readyState !== EventSource.OPEN) return;
    const heard = Math.max(this.#openedAt, this.#receivedAt ?? 0);
    const silence = performance.now() - heard;
    if (silence > Math.max(LEAST_SILENCE_MS, 5 * this.#intervalMs)) this.open("reconnecting");
  }

  #retryLater() {
    this.#drop();
    this.#timer = setTimeout(() => this.open("reconnecting"), this.#retryMs);
    this.#retryMs = Math.min(2 * this.#retryMs, LONGEST_RETRY_MS);
  }

  #drop() {
    clearTimeout(this.#timer);
    this.#source?.close();
    this.#source = null;
  }
}
