// The connection to the server: OpenAI's Realtime API. It opens again by itself.

const RETRY = { first: 500, most: 10000 };     // milliseconds

export class Realtime {
  // handlers: open(event), message(event), closed(), needsKey(), state(model)
  constructor(handlers) {
    this.handlers = handlers;
    this.key = sessionStorage.getItem("omni-key") || "";
    this.delay = RETRY.first;
  }

  setKey(key) {
    this.key = key;
    sessionStorage.setItem("omni-key", key);
  }

  // Relative to the page: a proxy may serve it below any path.
  fetch(path, options = {}) {
    const headers = this.key ? { authorization: `Bearer ${this.key}` } : {};
    return fetch(path, { ...options, headers: { ...headers, ...options.headers } });
  }

  // Connects once the server is ready.
  async connect() {
    try {
      // Browsers do not tell why a WebSocket was refused.
      const listed = await this.fetch("v1/models");
      if (listed.status === 401) {
        this.handlers.needsKey();
        return;
      }
      this.model = (await listed.json()).data[0];
      this.handlers.state(this.model);
      if (this.model.state !== "ready") {
        setTimeout(() => this.connect(), RETRY.first);
        return;
      }
    } catch {
      this.retry();
      return;
    }
    const address = new URL("v1/realtime", location.href);
    address.protocol = address.protocol === "https:" ? "wss:" : "ws:";
    const protocols = ["realtime", ...(this.key ? [`openai-insecure-api-key.${this.key}`] : [])];
    this.socket = new WebSocket(address, protocols);
    this.socket.onmessage = ({ data }) => {
      const event = JSON.parse(data);
      if (event.type === "session.created") {
        this.delay = RETRY.first;
        this.handlers.open(event);
      } else {
        this.handlers.message(event);
      }
    };
    this.socket.onclose = () => this.retry();
  }

  retry() {
    this.handlers.closed();
    setTimeout(() => this.connect(), this.delay);
    this.delay = Math.min(2 * this.delay, RETRY.most);
  }

  send(type, fields = {}) {
    if (this.socket?.readyState === WebSocket.OPEN) this.socket.send(JSON.stringify({ type, ...fields }));
  }
}
