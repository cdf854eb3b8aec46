// The page of omni_jax: sends requests over the WebSocket /live and plays answers while they are decoded.
// No library, no build step.

const byId = (id) => document.getElementById(id);
const seconds = (value) => `${value.toFixed(2)} s`;

// For tests: the samples that were played, per turn; how many seconds before the limit a recording is sent.
const playback = { turns: [], limitMargin: 0.3 };
window.omni = playback;

const SHORTEST = 0.3;      // seconds; anything shorter is a tap

const state = {
  socket: null,
  sampleRate: 24000,
  maxSeconds: 8,
  maxFileBytes: 0,
  apiKey: sessionStorage.getItem("omni-key") || "",
  turn: null,        // the one being answered
  turnCount: 0,      // of this connection, as the server counts
  items: new Map(),  // in the history, by the number of the turn
  compiled: false,
  microphone: null,
  recording: null,
  player: null,
  context: null,
  retryDelay: 500,
};

function setStatus(message, error = false) {
  byId("state").textContent = message;
  byId("state").classList.toggle("error", error);
}

function setEnabled(enabled) {
  for (const id of ["talk", "send"]) byId(id).disabled = !enabled;
}

// ---- WebSocket

function connect() {
  // Relative to the page: a proxy may serve it below any path.
  const address = new URL("live", location.href);
  address.protocol = address.protocol === "https:" ? "wss:" : "ws:";
  const socket = new WebSocket(address);
  state.socket = socket;
  state.turnCount = 0;
  state.items.clear();
  let accepted = false;
  socket.onopen = () => send({ type: "start", api_key: state.apiKey, transcript: true });
  socket.onmessage = ({ data }) => {
    const message = JSON.parse(data);
    if (message.type === "ready") accepted = true;
    handleMessage(message);
  };
  socket.onclose = ({ code }) => {
    setEnabled(false);
    if (state.recording) stopRecording();
    if (state.turn) endTurn(state.turn, "connection lost");
    if (code === 1008 && !accepted) {
      byId("login").hidden = false;
      byId("key").focus();
      setStatus("API key required.", true);
      return;
    }
    setStatus("Disconnected. Reconnecting …", true);
    setTimeout(connect, state.retryDelay);
    state.retryDelay = Math.min(state.retryDelay * 2, 10000);
  };
}

function send(message) {
  state.socket.send(JSON.stringify(message));
}

function handleMessage(message) {
  if (message.type === "ready") {
    state.sampleRate = message.sample_rate;
    state.maxSeconds = message.max_audio_seconds;
    state.maxFileBytes = message.max_file_bytes;
    state.retryDelay = 500;
    byId("model").textContent = message.model;
    byId("untrained").hidden = message.trained;
    byId("login").hidden = true;
    return;
  }
  if (message.type === "state") {
    state.compiled = message.state === "ready";
    setEnabled(state.compiled);
    setIdleStatus();
    return;
  }
  if (message.type === "transcript") {
    showTranscript(message);
    return;
  }
  const turn = state.turn;
  if (!turn) {
    if (message.type === "error") setStatus(problemOf(message), true);
    return;
  }
  // Messages of an earlier turn may arrive late.
  if (message.turn && message.turn !== turn.number) return;
  if (message.type === "text") {
    turn.item.querySelector(".answer").textContent += message.text;
  } else if (message.type === "audio") {
    play(turn, decodeSamples(message.data));
  } else if (message.type === "timing") {
    showTiming(turn, message);
  } else if (message.type === "error") {
    endTurn(turn, problemOf(message));
  } else if (message.type === "end") {
    state.player?.port.postMessage({ complete: true });
    endTurn(turn, message.outcome === "cancelled" ? "stopped" : "");
  }
}

// ---- turns

function beginTurn(question) {
  stop();
  const item = byId("turn").content.firstElementChild.cloneNode(true);
  item.querySelector(".question").textContent = question;
  byId("history").prepend(item);
  state.turn = { item, number: ++state.turnCount, audio: [] };
  state.items.set(state.turn.number, item);
  playback.turns.push({ played: [], ended: false });
  byId("stop").disabled = false;
  setStatus("Waiting for the answer …");
  return state.turn;
}

function endTurn(turn, problem) {
  if (problem) {
    const timing = turn.item.querySelector(".timing");
    timing.textContent = [timing.textContent, problem].filter(Boolean).join(" · ");
    timing.classList.add("failed");
  }
  if (turn.audio.length) {
    const replay = turn.item.querySelector(".replay");
    replay.hidden = false;
    replay.onclick = () => {
      clearPlayback();
      for (const samples of turn.audio) state.player.port.postMessage({ samples: samples.slice() });
      state.player.port.postMessage({ complete: true });
    };
  }
  if (state.turn === turn) {
    state.turn = null;
    byId("stop").disabled = true;
    setIdleStatus();
  }
}

function setIdleStatus() {
  setStatus(state.compiled ? "Ready." : "The server has just started and is compiling. One moment …");
}

const PROBLEMS = {
  no_speech: "No speech was found. Speak closer to the microphone, or louder.",
  busy: "The server is busy. Try again in a moment.",
  closed: "The server is shutting down.",
  failed: "The answer failed. Try again.",
};

function problemOf(message) {
  return PROBLEMS[message.code] || message.message;
}

function showTranscript(message) {
  const transcript = state.items.get(message.turn)?.querySelector(".transcript");
  if (!transcript) return;
  transcript.textContent = message.text ? `Transcript: ${message.text}` : "Nothing was understood.";
  transcript.hidden = false;
}

function showTiming(turn, timing) {
  const items = [];
  const duration = turn.audio.reduce((total, samples) => total + samples.length, 0) / state.sampleRate;
  if (timing.first_audio_seconds) items.push(`first audio after ${seconds(timing.first_audio_seconds)}`);
  if (timing.total_seconds) items.push(`complete after ${seconds(timing.total_seconds)}`);
  if (timing.real_time_factor) items.push(`real-time factor ${timing.real_time_factor.toFixed(2)}`);
  if (timing.total_seconds && duration) items.push(`${seconds(duration)} of audio`);
  turn.item.querySelector(".timing").textContent = items.join(" · ");
}

function stop() {
  clearPlayback();
  if (state.turn) {
    send({ type: "cancel" });
    endTurn(state.turn, "stopped");
  }
}

// ---- playback

async function openPlayer() {
  if (state.context) {
    await state.context.resume();
    return;
  }
  state.context = new AudioContext({ sampleRate: state.sampleRate });
  await state.context.audioWorklet.addModule("page/worklets.js");
  state.player = new AudioWorkletNode(state.context, "player", { outputChannelCount: [1] });
  state.player.connect(state.context.destination);
  state.player.port.onmessage = ({ data }) => {
    const turn = playback.turns.at(-1);
    if (data.played) {
      addToWaveform(data.played);
      turn?.played.push(data.played);
    }
    if (data.ended && turn) turn.ended = true;
  };
  await state.context.resume();
}

function decodeSamples(base64) {
  const bytes = Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
  const view = new DataView(bytes.buffer);
  return Float32Array.from({ length: bytes.length / 2 }, (_, index) => view.getInt16(2 * index, true) / 32768);
}

function play(turn, samples) {
  turn.audio.push(samples);
  state.player?.port.postMessage({ samples: samples.slice() });
  setStatus("Playing the answer …");
}

function clearPlayback() {
  state.player?.port.postMessage({ clear: true });
}

// ---- recording

async function startRecording(event) {
  if (state.recording || byId("talk").disabled) return;
  stop();
  const recording = { length: 0, open: true, pieces: [], start: event.timeStamp };
  state.recording = recording;
  byId("talk").setAttribute("aria-pressed", "true");
  setStatus("Listening …");
  try {
    await openPlayer();
    if (!state.microphone) await openMicrophone();
    await state.microphone.context.resume();
  } catch (error) {
    stopRecording();
    setStatus(`No microphone: ${error.message}`, true);
    return;
  }
  if (!recording.open) return;
  const { rate } = state.microphone;
  send({ type: "start", sample_rate: rate, transcript: true });
  state.microphone.node.port.onmessage = ({ data }) => {
    recording.length += data.length;
    recording.pieces.push(data);
    addToWaveform(data);
    state.socket.send(encodePcm(data));
    const left = state.maxSeconds - recording.length / rate;
    setStatus(`Listening … ${Math.max(0, left).toFixed(0)} s left`);
    if (left < playback.limitMargin) sendRecording({ remark: `the limit of ${seconds(state.maxSeconds)} is reached` });
  };
}

async function openMicrophone() {
  const stream = await navigator.mediaDevices.getUserMedia({ audio: { channelCount: 1 } });
  const context = new AudioContext();
  await context.audioWorklet.addModule("page/worklets.js");
  const node = new AudioWorkletNode(context, "recorder");
  context.createMediaStreamSource(stream).connect(node);
  // Some browsers do not run a node without a destination; a gain of 0 keeps it silent.
  node.connect(new GainNode(context, { gain: 0 })).connect(context.destination);
  state.microphone = { context, node, rate: context.sampleRate };
}

function stopRecording() {
  if (state.microphone) state.microphone.node.port.onmessage = null;
  if (state.recording) state.recording.open = false;
  state.recording = null;
  byId("talk").setAttribute("aria-pressed", "false");
}

function sendRecording({ event = null, remark = "" }) {
  const recording = state.recording;
  if (!recording) return;
  stopRecording();
  const duration = state.microphone ? recording.length / state.microphone.rate : 0;
  // Opening the microphone can delay the event that ends a tap until sound has been recorded.
  const held = event ? (event.timeStamp - recording.start) / 1000 : duration;
  if (Math.min(held, duration) < SHORTEST && !remark) {
    if (state.socket.readyState === WebSocket.OPEN) send({ type: "cancel" });
    setStatus("Hold the button while you speak.", true);
    return;
  }
  const turn = beginTurn([`Recording, ${seconds(duration)}`, remark].filter(Boolean).join(" · "));
  offerReplay(turn.item, recording.pieces, state.microphone.rate);
  send({ type: "end" });
}

function offerReplay(item, pieces, rate) {
  const mine = item.querySelector(".mine");
  mine.hidden = false;
  mine.onclick = async () => {
    await openPlayer();
    const buffer = new AudioBuffer({ length: pieces.reduce((sum, piece) => sum + piece.length, 0), sampleRate: rate });
    let offset = 0;
    for (const piece of pieces) {
      buffer.copyToChannel(piece, 0, offset);
      offset += piece.length;
    }
    const source = new AudioBufferSourceNode(state.context, { buffer });
    source.connect(state.context.destination);
    source.start();
  };
}

function encodePcm(samples) {
  const view = new DataView(new ArrayBuffer(2 * samples.length));
  samples.forEach((value, index) => {
    view.setInt16(2 * index, Math.max(-32768, Math.min(32767, Math.round(value * 32768))), true);
  });
  return view.buffer;
}

async function sendFile(file) {
  if (byId("talk").disabled) return;
  stop();
  if (file.size > state.maxFileBytes) {
    setStatus(`${file.name} has ${file.size} bytes; the limit is ${state.maxFileBytes}.`, true);
    return;
  }
  let data;
  try {
    // As it is: the server reads more formats than a browser.
    const url = await new Promise((resolve, reject) => {
      const reader = new FileReader();
      reader.onload = () => resolve(reader.result);
      reader.onerror = () => reject(reader.error);
      reader.readAsDataURL(file);
    });
    data = url.slice(url.indexOf(",") + 1);
    await openPlayer();
  } catch (error) {
    setStatus(`${file.name} cannot be read: ${error.message}`, true);
    return;
  }
  beginTurn(file.name);
  send({ type: "file", data });
}

// ---- waveform of the last four seconds of microphone and answer

const waveform = { peaks: new Float32Array(400), next: 0, peak: 0, count: 0 };

function addToWaveform(samples) {
  for (const value of samples) {
    waveform.peak = Math.max(waveform.peak, Math.abs(value));
    if (++waveform.count >= state.sampleRate / 100) {
      waveform.peaks[waveform.next++ % waveform.peaks.length] = waveform.peak;
      waveform.peak = waveform.count = 0;
    }
  }
}

function drawWaveform() {
  const canvas = byId("wave");
  const context = canvas.getContext("2d");
  context.clearRect(0, 0, canvas.width, canvas.height);
  context.fillStyle = getComputedStyle(byId("talk")).backgroundColor;
  const { peaks, next } = waveform;
  const step = canvas.width / peaks.length;
  for (let index = 0; index < peaks.length; index++) {
    const height = Math.max(2, peaks[(next + index) % peaks.length] * canvas.height);
    context.fillRect(index * step, (canvas.height - height) / 2, step * 0.7, height);
  }
  requestAnimationFrame(drawWaveform);
}

// ---- event handlers

const talk = byId("talk");
talk.addEventListener("pointerdown", (event) => {
  talk.setPointerCapture(event.pointerId);
  startRecording(event);
});
for (const kind of ["pointerup", "pointercancel"]) talk.addEventListener(kind, (event) => sendRecording({ event }));
talk.addEventListener("contextmenu", (event) => event.preventDefault());
const isTalkKey = (event) => event.code === "Space" && !event.target.closest("input, a, button:not(#talk)");
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") stop();
  if (!isTalkKey(event)) return;
  event.preventDefault();
  if (!event.repeat) startRecording(event);
});
document.addEventListener("keyup", (event) => {
  if (!isTalkKey(event)) return;
  event.preventDefault();
  sendRecording({ event });
});
window.addEventListener("blur", (event) => sendRecording({ event }));
byId("stop").addEventListener("click", stop);
byId("typed").addEventListener("submit", async (event) => {
  event.preventDefault();
  const text = byId("text").value.trim();
  if (!text || byId("send").disabled) return;
  byId("text").value = "";
  stop();
  await openPlayer();
  beginTurn(text);
  send({ type: "text", text });
});
byId("file").addEventListener("change", () => {
  if (byId("file").files.length) sendFile(byId("file").files[0]);
  byId("file").value = "";
});
byId("login").addEventListener("submit", (event) => {
  event.preventDefault();
  state.apiKey = byId("key").value;
  sessionStorage.setItem("omni-key", state.apiKey);
  connect();
});
for (const kind of ["dragover", "dragleave", "drop"]) {
  document.addEventListener(kind, (event) => {
    event.preventDefault();
    document.body.classList.toggle("dropping", kind === "dragover");
    if (kind === "drop" && event.dataTransfer.files.length) sendFile(event.dataTransfer.files[0]);
  });
}

drawWaveform();
connect();
