// The page of omni_jax: a conversation over the Realtime API. The server finds where turns begin and end; the page sends
// what the microphone takes, plays answers while they are decoded, and shows what both sides say.
// No library, no build step.

import { RATE, Microphone, endOf, fromBase64, join, openPlayer, play, readFile, stopPlaying, toBase64, toFloat, toWav } from "./audio.js";
import { Realtime } from "./realtime.js";

const byId = (id) => document.getElementById(id);
const seconds = (value) => `${value.toFixed(2)} s`;

const SHORTEST = 0.3;         // seconds; anything shorter is a tap
const REMEMBERED = 120;       // seconds of the microphone that are kept until a turn is known

// For tests: the samples that were played, by answer; how many seconds before the limit a recording is sent; who has said
// what.
const playback = {
  turns: [],
  limitMargin: 0.3,
  messages: () => state.messages.map(({ role, text, pieces, cut }) => ({ role, text, cut, pieces: pieces.map((piece) => [...piece]) })),
};
window.omni = playback;

const state = {
  messages: [],         // in their order
  byItem: new Map(),    // by the id of the item
  listening: false,     // hands-free
  recording: null,      // while the button is held
  response: null,       // id of the one in progress
  answering: null,      // the message whose sound is played
  sent: { pieces: [], start: 0, end: 0 },    // of the microphone, in samples since the session began
  asked: 0,             // when the last question ended, in milliseconds
  microphone: new Microphone(),
};

const connection = new Realtime({ open: begin, message: handle, closed: lost, needsKey: askForKey, state: showModel });

function setStatus(message, error = false) {
  byId("state").textContent = message;
  byId("state").classList.toggle("error", error);
}

function setIdleStatus() {
  setStatus(state.listening ? "Listening …" : "Ready.");
}

function setEnabled(enabled) {
  for (const id of ["talk", "send"]) byId(id).disabled = !enabled;
}

// ---- session

function showModel(model) {
  byId("model").textContent = model.id;
  byId("untrained").hidden = model.trained;
  byId("forgets").hidden = model.conversation || !model.trained;
  byId("instructions-option").hidden = !model.conversation;
  byId("login").hidden = true;
  if (model.state === "warming up") setStatus("The server has just started and is compiling. One moment …");
  else if (model.state !== "ready") setStatus("The model has failed; the server must be started again.", true);
}

function askForKey() {
  byId("login").hidden = false;
  byId("key").focus();
  setStatus("API key required.", true);
}

function begin() {
  state.sent = { pieces: [], start: 0, end: 0 };
  state.byItem.clear();
  // After an interruption the server knows nothing of what was said.
  for (const message of state.messages) remind(message);
  configure();
  setEnabled(true);
  setIdleStatus();
}

function configure() {
  const hold = byId("hold").checked;
  connection.send("session.update", {
    session: {
      type: "realtime",
      instructions: byId("instructions").value.trim(),
      audio: {
        input: {
          transcription: {},
          turn_detection: hold ? null : { type: "server_vad", silence_duration_ms: 500, interrupt_response: true },
        },
      },
    },
  });
  byId("talk").textContent = hold ? "Hold to talk" : state.listening ? "Stop talking" : "Start talking";
  byId("how").textContent = hold
    ? "Hold the button or the space bar while you speak, or drop a recording anywhere on this page."
    : "Click once, then just talk. Speak, or press Escape, to interrupt.";
}

function remind(message) {
  const text = message.role === "user" ? message.text : playedText(message);
  message.item = null;
  if (!text || message.failed) return;
  message.item = newId();
  state.byItem.set(message.item, message);
  const type = message.role === "user" ? "input_text" : "output_text";
  connection.send("conversation.item.create", { item: item(message, [{ type, text }]) });
}

const newId = () => `item_${crypto.getRandomValues(new Uint32Array(2)).join("")}`;
const item = (message, content) => ({ id: message.item, type: "message", role: message.role, content });

function lost() {
  setEnabled(false);
  stopListening();
  cancelRecording();
  if (state.response) endAnswer("connection lost");
  setStatus("Disconnected. Reconnecting …", true);
}

// ---- events of the server

function handle(event) {
  const message = state.byItem.get(event.item_id ?? event.item?.id);
  switch (event.type) {
    case "input_audio_buffer.speech_started":
      interrupt();
      add("user", event.item_id).begin = (event.audio_start_ms / 1000) * RATE;
      setStatus("Listening …");
      break;
    case "input_audio_buffer.speech_stopped":
      state.asked = performance.now();
      setAudio(message, message.begin, (event.audio_end_ms / 1000) * RATE);
      setStatus("Waiting for the answer …");
      break;
    case "input_audio_buffer.committed":
      if (state.recorded) {
        const { pieces, remark } = state.recorded;
        state.recorded = null;
        const mine = add("user", event.item_id);
        mine.pieces = pieces;
        if (remark) note(mine, remark);
        offerReplay(mine);
      }
      break;
    case "conversation.item.input_audio_transcription.delta":
      if (message) setText(message, message.text + event.delta);
      break;
    case "conversation.item.input_audio_transcription.completed":
      if (message) setText(message, event.transcript, event.transcript || "Nothing was understood.");
      break;
    case "conversation.item.input_audio_transcription.failed":
      if (message) note(message, problemOf(event.error), true);
      break;
    case "response.created":
      state.response = event.response.id;
      byId("stop").disabled = false;
      break;
    case "response.output_item.added":
      state.answering = add("assistant", event.item.id);
      playback.turns.push({ played: [], ended: false });
      state.answering.turn = playback.turns.at(-1);
      break;
    case "response.output_audio_transcript.delta":
      setText(message, message.text + event.delta);
      break;
    case "response.output_audio.delta":
      if (message !== state.answering) break;
      if (!message.pieces.length) message.first = performance.now() - state.asked;
      message.pieces.push(fromBase64(event.delta));
      play(event.item_id, message.pieces.at(-1));
      setStatus("Playing the answer …");
      break;
    case "response.output_audio.done":
      if (message === state.answering) endOf(event.item_id);
      break;
    case "response.done":
      if (event.response.id === state.response) finish(event.response);
      break;
    case "error":
      if (event.error.code !== "response_cancel_not_active") setStatus(problemOf(event.error), true);
      break;
  }
}

const PROBLEMS = {
  no_speech: "No speech was found. Speak closer to the microphone, or louder.",
  busy: "The server is busy. Try again in a moment.",
  closed: "The server is shutting down.",
  failed: "The answer failed. Try again.",
};

const problemOf = (error) => PROBLEMS[error.code] || error.message;

function finish({ status, status_details: details }) {
  const message = state.answering;
  if (status === "failed") {
    const problem = problemOf(details.error);
    const asked = state.messages.findLast(({ role }) => role === "user");
    if (asked) note(asked, problem, true);
    endAnswer("");
    setStatus(problem, true);
    return;
  }
  if (message && status !== "cancelled") {
    const total = (performance.now() - state.asked) / 1000;
    const duration = length(message) / RATE;
    const parts = [`first audio after ${seconds(message.first / 1000)}`, `complete after ${seconds(total)}`];
    if (duration) parts.push(`real-time factor ${(total / duration).toFixed(2)}`, `${seconds(duration)} of audio`);
    if (message.pieces.length) note(message, parts.join(" · "));
  }
  endAnswer(status === "cancelled" ? "interrupted" : "");
}

function endAnswer(problem) {
  const message = state.answering;
  if (message) {
    if (problem) note(message, problem, true);
    offerReplay(message);
  }
  state.response = null;
  byId("stop").disabled = !message || message.turn.ended || !message.pieces.length;
  if (byId("stop").disabled) setIdleStatus();
}

// ---- messages

function add(role, itemId) {
  const element = byId("message").content.firstElementChild.cloneNode(true);
  element.classList.add(role);
  element.querySelector(".who").textContent = role === "user" ? "You" : "omni";
  const message = { role, item: itemId, element, text: "", pieces: [], played: 0 };
  state.messages.push(message);
  state.byItem.set(itemId, message);
  byId("history").append(element);
  element.scrollIntoView({ block: "end" });
  return message;
}

function setText(message, text, shown = text) {
  message.text = text;
  message.element.querySelector(".text").textContent = shown;
  message.element.scrollIntoView({ block: "end" });
}

function note(message, text, failed = false) {
  const timing = message.element.querySelector(".timing");
  timing.textContent = [timing.textContent, text].filter(Boolean).join(" · ");
  timing.classList.toggle("failed", failed);
  message.failed ||= failed && message.role === "user";
}

const length = (message) => message.pieces.reduce((total, piece) => total + piece.length, 0);

// Of an answer that was interrupted, the words whose sound was played.
function playedText(message) {
  const total = length(message);
  if (!message.cut || !total) return message.text;
  const words = message.text.split(" ");
  return words.slice(0, Math.floor((words.length * message.played) / total)).join(" ");
}

function offerReplay(message) {
  if (!message.pieces.length) return;
  const replay = message.element.querySelector(".replay");
  replay.hidden = false;
  replay.onclick = async () => {
    await openSpeaker();
    stopPlaying();
    play(null, join(message.pieces));
  };
}

// ---- interruption

// Stops the answer that is being decoded or played.
function interrupt() {
  const message = state.answering;
  if (!message || message.turn.ended) return;
  stopPlaying();
  message.turn.ended = true;
  message.cut = true;
  state.answering = null;
  const played = Math.min(message.played, length(message));
  connection.send("conversation.item.truncate", {
    item_id: message.item,
    content_index: 0,
    audio_end_ms: Math.floor((played / RATE) * 1000),
  });
  note(message, "interrupted", true);
  offerReplay(message);
}

function stop() {
  if (state.response) connection.send("response.cancel", { response_id: state.response });
  interrupt();
  state.response = null;
  byId("stop").disabled = true;
  setIdleStatus();
}

// ---- loudspeaker

const openSpeaker = () => openPlayer(
  (id, samples) => {
    addToWaveform(samples);
    const message = state.byItem.get(id);
    if (!message) return;
    message.played += samples.length;
    message.turn.played.push(samples);
  },
  (id) => {
    const message = state.byItem.get(id);
    if (!message) return;
    message.turn.ended = true;
    if (message === state.answering && !state.response) {
      byId("stop").disabled = true;
      setIdleStatus();
    }
  },
);

// ---- microphone

async function openMicrophone(onSamples) {
  try {
    await openSpeaker();
    await state.microphone.open(onSamples);
    return true;
  } catch (error) {
    setStatus(`No microphone: ${error.message}`, true);
    return false;
  }
}

function sendSamples(samples) {
  addToWaveform(toFloat(samples));
  connection.send("input_audio_buffer.append", { audio: toBase64(samples) });
  const { sent } = state;
  sent.pieces.push(samples);
  sent.end += samples.length;
  while (sent.end - sent.start > REMEMBERED * RATE) sent.start += sent.pieces.shift().length;
}

// The samples of a turn, which the server has found.
function setAudio(message, begin, end) {
  const all = join(state.sent.pieces);
  message.pieces = [all.slice(Math.max(0, begin - state.sent.start), Math.max(0, end - state.sent.start))];
  offerReplay(message);
}

async function startListening() {
  state.listening = true;
  configureTalk();
  if (!(await openMicrophone(sendSamples))) stopListening();
  else setIdleStatus();
}

function stopListening() {
  if (!state.listening) return;
  state.listening = false;
  state.microphone.close();
  connection.send("input_audio_buffer.clear");
  configureTalk();
  setIdleStatus();
}

function configureTalk() {
  byId("talk").setAttribute("aria-pressed", String(state.listening));
  if (!byId("hold").checked) byId("talk").textContent = state.listening ? "Stop talking" : "Start talking";
}

// ---- hold to talk

async function startRecording(event) {
  if (state.recording || byId("talk").disabled) return;
  stop();
  const recording = { pieces: [], length: 0, start: event.timeStamp };
  state.recording = recording;
  byId("talk").setAttribute("aria-pressed", "true");
  setStatus("Listening …");
  connection.send("input_audio_buffer.clear");
  const opened = await openMicrophone((samples) => {
    recording.pieces.push(samples);
    recording.length += samples.length;
    sendSamples(samples);
    const left = connection.model.max_audio_seconds - recording.length / RATE;
    setStatus(`Listening … ${Math.max(0, left).toFixed(0)} s left`);
    const limit = `the limit of ${seconds(connection.model.max_audio_seconds)} is reached`;
    if (left < playback.limitMargin) sendRecording({ remark: limit });
  });
  if (!opened || state.recording !== recording) {
    state.microphone.close();
    if (!opened) cancelRecording();
  }
}

function cancelRecording() {
  if (!state.recording) return null;
  const { recording } = state;
  state.recording = null;
  state.microphone.close();
  byId("talk").setAttribute("aria-pressed", "false");
  return recording;
}

function sendRecording({ event = null, remark = "" }) {
  const recording = cancelRecording();
  if (!recording) return;
  const duration = recording.length / RATE;
  // Opening the microphone can delay the event that ends a tap until sound has been recorded.
  const held = event ? (event.timeStamp - recording.start) / 1000 : duration;
  if (Math.min(held, duration) < SHORTEST && !remark) {
    connection.send("input_audio_buffer.clear");
    setStatus("Hold the button while you speak.", true);
    return;
  }
  state.recorded = { pieces: recording.pieces, remark };
  state.asked = performance.now();
  connection.send("input_audio_buffer.commit");
  connection.send("response.create");
  setStatus("Waiting for the answer …");
}

// ---- typed questions and files

async function ask(shown, content, { file = "", pieces = [] } = {}) {
  stop();
  await openSpeaker();
  const message = add("user", newId());
  setText(message, shown);
  if (file) message.element.querySelector(".who").textContent += ` · ${file}`;
  message.pieces = pieces;
  offerReplay(message);
  state.asked = performance.now();
  connection.send("conversation.item.create", { item: item(message, content) });
  connection.send("response.create");
  setStatus("Waiting for the answer …");
}

async function sendFile(file) {
  if (byId("talk").disabled) return;
  try {
    const samples = await readFile(file);
    await ask("", [{ type: "input_audio", audio: toBase64(samples) }], { file: file.name, pieces: [samples] });
  } catch {
    await sendUnknownFile(file);
  }
}

// The server reads more formats than a browser, and writes down what is said.
async function sendUnknownFile(file) {
  const form = new FormData();
  form.append("model", connection.model.id);
  form.append("file", file);
  setStatus(`Transcribing ${file.name} …`);
  try {
    const response = await connection.fetch("v1/audio/transcriptions", { method: "POST", body: form });
    const found = await response.json();
    if (!response.ok) throw new Error(problemOf(found.error));
    await ask(found.text, [{ type: "input_text", text: found.text }], { file: file.name });
  } catch (error) {
    setStatus(`${file.name}: ${error.message}`, true);
  }
}

// ---- download

function download(name, blob) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

const transcript = () => state.messages
  .filter(({ text }) => text)
  .map((message) => `${message.role === "user" ? "You" : "omni"}: ${message.text}\n`)
  .join("");

// ---- waveform of the last four seconds of microphone and answer

const waveform = { peaks: new Float32Array(400), next: 0, peak: 0, count: 0 };

function addToWaveform(samples) {
  for (const value of samples) {
    waveform.peak = Math.max(waveform.peak, Math.abs(value));
    if (++waveform.count >= RATE / 100) {
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
talk.addEventListener("click", () => {
  if (byId("hold").checked) return;
  if (state.listening) stopListening();
  else startListening();
});
talk.addEventListener("pointerdown", (event) => {
  if (!byId("hold").checked) return;
  talk.setPointerCapture(event.pointerId);
  startRecording(event);
});
for (const kind of ["pointerup", "pointercancel"]) talk.addEventListener(kind, (event) => sendRecording({ event }));
talk.addEventListener("contextmenu", (event) => event.preventDefault());
const isTalkKey = (event) => event.code === "Space" && byId("hold").checked && !event.target.closest("input, a, summary, button:not(#talk)");
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
byId("hold").addEventListener("change", () => {
  stopListening();
  cancelRecording();
  configure();
});
byId("instructions").addEventListener("change", configure);
byId("typed").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = byId("text").value.trim();
  if (!text || byId("send").disabled) return;
  byId("text").value = "";
  ask(text, [{ type: "input_text", text }]);
});
byId("file").addEventListener("change", () => {
  if (byId("file").files.length) sendFile(byId("file").files[0]);
  byId("file").value = "";
});
byId("save-text").addEventListener("click", () => download("conversation.txt", new Blob([transcript()], { type: "text/plain" })));
byId("save-sound").addEventListener("click", () => download("conversation.wav", toWav(state.messages.flatMap(({ pieces }) => pieces))));
byId("clear").addEventListener("click", () => {
  stop();
  for (const { item: id } of state.messages) if (id) connection.send("conversation.item.delete", { item_id: id });
  state.messages = [];
  byId("history").replaceChildren();
});
byId("login").addEventListener("submit", (event) => {
  event.preventDefault();
  connection.setKey(byId("key").value);
  connection.connect();
});
for (const kind of ["dragover", "dragleave", "drop"]) {
  document.addEventListener(kind, (event) => {
    event.preventDefault();
    document.body.classList.toggle("dropping", kind === "dragover");
    if (kind === "drop" && event.dataTransfer.files.length) sendFile(event.dataTransfer.files[0]);
  });
}

drawWaveform();
connection.connect();
