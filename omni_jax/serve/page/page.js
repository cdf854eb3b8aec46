// The page of omni_jax: talks over the socket /live, plays answers while they are made. No library, no build step.

const at = (id) => document.getElementById(id);
const seconds = (value) => `${value.toFixed(2)} s`;

// What a test may look at: the samples that really went to the loudspeaker, and how many were missing in between.
const heard = { turns: [], gap: 0 };
window.omni = heard;

const page = { socket: null, rate: 24000, limit: 8, key: sessionStorage.getItem("omni-key") || "", turn: null, asked: 0,
  microphone: null, recording: null, player: null, context: null, retry: 500 };

function say(message, error = false) {
  at("state").textContent = message;
  at("state").classList.toggle("error", error);
}

function ready(yes) {
  for (const id of ["talk", "send"]) at(id).disabled = !yes;
}

// ---- the socket

function connect() {
  const socket = new WebSocket(`${location.protocol === "https:" ? "wss" : "ws"}://${location.host}/live`);
  page.socket = socket;
  page.asked = 0;
  let welcome = false;
  socket.onopen = () => send({ type: "start", api_key: page.key });
  socket.onmessage = ({ data }) => {
    const message = JSON.parse(data);
    if (message.type === "ready") welcome = true;
    take(message);
  };
  socket.onclose = ({ code }) => {
    ready(false);
    if (page.turn) finish(page.turn, "the connection was lost");
    if (code === 1008 && !welcome) {
      at("login").hidden = false;
      at("key").focus();
      say("A key is needed.", true);
      return;
    }
    say("Not connected, trying again …", true);
    setTimeout(connect, page.retry);
    page.retry = Math.min(page.retry * 2, 10000);
  };
}

function send(message) {
  page.socket.send(JSON.stringify(message));
}

function take(message) {
  if (message.type === "ready") {
    page.rate = message.sample_rate;
    page.limit = message.max_audio_seconds;
    page.retry = 500;
    at("model").textContent = message.model;
    at("untrained").hidden = message.trained;
    at("login").hidden = true;
    ready(true);
    say("Ready.");
    return;
  }
  const turn = page.turn;
  if (!turn) {
    if (message.type === "error") say(message.message, true);
    return;
  }
  // Both sides count the questions of a socket; what belongs to an earlier one is late.
  if (message.turn && message.turn !== turn.number) return;
  if (message.type === "text") {
    turn.item.querySelector(".answered").textContent += message.text;
  } else if (message.type === "audio") {
    play(turn, samplesOf(message.data));
  } else if (message.type === "timing") {
    show(turn, message);
  } else if (message.type === "error") {
    finish(turn, message.message);
  } else if (message.type === "end") {
    page.player?.port.postMessage({ complete: true });
    finish(turn, message.outcome === "cancelled" ? "stopped" : "");
  }
}

// ---- turns

function begin(asked) {
  stop();
  const item = at("turn").content.firstElementChild.cloneNode(true);
  item.querySelector(".asked").textContent = asked;
  at("history").prepend(item);
  page.turn = { item, number: ++page.asked, sound: [] };
  heard.turns.push({ played: [], ended: false });
  at("stop").disabled = false;
  say("Thinking …");
  return page.turn;
}

function finish(turn, problem) {
  if (problem) {
    const place = turn.item.querySelector(".timing");
    place.textContent = [place.textContent, problem].filter(Boolean).join(" · ");
    place.classList.add("failed");
  }
  if (turn.sound.length) {
    const again = turn.item.querySelector(".again");
    again.hidden = false;
    again.onclick = () => {
      silence();
      for (const samples of turn.sound) page.player.port.postMessage({ samples: samples.slice() });
      page.player.port.postMessage({ complete: true });
    };
  }
  if (page.turn === turn) {
    page.turn = null;
    at("stop").disabled = true;
    say("Ready.");
  }
}

function show(turn, timing) {
  const parts = [];
  const sound = turn.sound.reduce((total, samples) => total + samples.length, 0) / page.rate;
  if (timing.first_sound_seconds) parts.push(`first sound after ${seconds(timing.first_sound_seconds)}`);
  if (timing.total_seconds) parts.push(`all after ${seconds(timing.total_seconds)}`);
  if (timing.real_time_factor) parts.push(`${timing.real_time_factor.toFixed(2)}× real time`);
  if (timing.total_seconds && sound) parts.push(`${seconds(sound)} of speech`);
  turn.item.querySelector(".timing").textContent = parts.join(" · ");
}

function stop() {
  silence();
  if (page.turn) {
    send({ type: "cancel" });
    finish(page.turn, "stopped");
  }
}

// ---- sound out

async function openSound() {
  if (page.context) {
    await page.context.resume();
    return;
  }
  page.context = new AudioContext({ sampleRate: page.rate });
  await page.context.audioWorklet.addModule("/page/sound.js");
  page.player = new AudioWorkletNode(page.context, "player", { outputChannelCount: [1] });
  page.player.connect(page.context.destination);
  page.player.port.onmessage = ({ data }) => {
    const turn = heard.turns.at(-1);
    if (data.played) {
      draw(data.played);
      turn?.played.push(data.played);
    }
    if (data.gap) heard.gap += data.gap;
    if (data.ended && turn) turn.ended = true;
  };
  await page.context.resume();
}

function samplesOf(text) {
  const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const view = new DataView(bytes.buffer);
  return Float32Array.from({ length: bytes.length / 2 }, (_, index) => view.getInt16(2 * index, true) / 32768);
}

function play(turn, samples) {
  turn.sound.push(samples);
  page.player?.port.postMessage({ samples: samples.slice() });
  say("Speaking …");
}

function silence() {
  page.player?.port.postMessage({ clear: true });
}

// ---- sound in

async function listen() {
  if (page.recording || at("talk").disabled) return;
  stop();
  const take = { length: 0, open: true };
  page.recording = take;
  at("talk").setAttribute("aria-pressed", "true");
  say("Listening …");
  try {
    await openSound();
    if (!page.microphone) {
      const stream = await navigator.mediaDevices.getUserMedia({ audio: { channelCount: 1 } });
      const context = new AudioContext();
      await context.audioWorklet.addModule("/page/sound.js");
      const node = new AudioWorkletNode(context, "listener");
      context.createMediaStreamSource(stream).connect(node);
      // A node that leads nowhere is not run everywhere; what leads to the loudspeaker here is silence.
      node.connect(new GainNode(context, { gain: 0 })).connect(context.destination);
      page.microphone = { context, node, rate: context.sampleRate };
    }
    await page.microphone.context.resume();
  } catch (error) {
    release();
    say(`No microphone: ${error.message}`, true);
    return;
  }
  if (!take.open) return;
  send({ type: "start", sample_rate: page.microphone.rate });
  page.microphone.node.port.onmessage = ({ data }) => {
    take.length += data.length;
    draw(data);
    page.socket.send(pcm(data));
    if (take.length > (page.limit - 0.3) * page.microphone.rate) ask();
  };
}

function release() {
  if (page.microphone) page.microphone.node.port.onmessage = null;
  if (page.recording) page.recording.open = false;
  page.recording = null;
  at("talk").setAttribute("aria-pressed", "false");
}

function ask() {
  const take = page.recording;
  if (!take) return;
  release();
  if (!take.length) {
    say("Hold the button while you speak.", true);
    return;
  }
  begin(`a question of ${seconds(take.length / page.microphone.rate)}`);
  send({ type: "end" });
}

function pcm(samples) {
  const view = new DataView(new ArrayBuffer(2 * samples.length));
  samples.forEach((value, index) => {
    view.setInt16(2 * index, Math.max(-32768, Math.min(32767, Math.round(value * 32768))), true);
  });
  return view.buffer;
}

async function askFile(file) {
  if (at("talk").disabled) return;
  stop();
  try {
    await openSound();
    // The browser brings it to 16 kHz, which is what the model hears.
    const decoded = await new OfflineAudioContext(1, 1, 16000).decodeAudioData(await file.arrayBuffer());
    if (decoded.duration > page.limit) {
      say(`${file.name} lasts ${seconds(decoded.duration)}; at most ${seconds(page.limit)} are heard.`, true);
      return;
    }
    const mono = new Float32Array(decoded.length);
    for (let channel = 0; channel < decoded.numberOfChannels; channel++) {
      decoded.getChannelData(channel).forEach((value, index) => { mono[index] += value / decoded.numberOfChannels; });
    }
    send({ type: "start", sample_rate: decoded.sampleRate });
    page.socket.send(pcm(mono));
    begin(`${file.name}, ${seconds(decoded.duration)}`);
    send({ type: "end" });
  } catch (error) {
    say(`${file.name} can't be read as a recording: ${error.message}`, true);
  }
}

// ---- the waveform: the last four seconds of what is said or heard

const wave = { peaks: new Float32Array(400), place: 0, held: 0, count: 0 };

function draw(samples) {
  for (const value of samples) {
    wave.held = Math.max(wave.held, Math.abs(value));
    if (++wave.count >= page.rate / 100) {
      wave.peaks[wave.place++ % wave.peaks.length] = wave.held;
      wave.held = wave.count = 0;
    }
  }
}

function paint() {
  const canvas = at("wave");
  const brush = canvas.getContext("2d");
  brush.clearRect(0, 0, canvas.width, canvas.height);
  brush.fillStyle = getComputedStyle(at("talk")).backgroundColor;
  const step = canvas.width / wave.peaks.length;
  for (let index = 0; index < wave.peaks.length; index++) {
    const height = Math.max(2, wave.peaks[(wave.place + index) % wave.peaks.length] * canvas.height);
    brush.fillRect(index * step, (canvas.height - height) / 2, step * 0.7, height);
  }
  requestAnimationFrame(paint);
}

// ---- hands

const talk = at("talk");
talk.addEventListener("pointerdown", (event) => { talk.setPointerCapture(event.pointerId); listen(); });
for (const kind of ["pointerup", "pointercancel"]) talk.addEventListener(kind, ask);
talk.addEventListener("contextmenu", (event) => event.preventDefault());
const holds = (event) => event.code === "Space" && !event.target.closest("input, a, button:not(#talk)");
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") stop();
  if (!holds(event)) return;
  event.preventDefault();
  if (!event.repeat) listen();
});
document.addEventListener("keyup", (event) => {
  if (!holds(event)) return;
  event.preventDefault();
  ask();
});
window.addEventListener("blur", () => { if (page.recording) ask(); });
at("stop").addEventListener("click", stop);
at("typed").addEventListener("submit", async (event) => {
  event.preventDefault();
  const text = at("text").value.trim();
  if (!text || at("send").disabled) return;
  at("text").value = "";
  stop();
  await openSound();
  begin(text);
  send({ type: "text", text });
});
at("file").addEventListener("change", () => {
  if (at("file").files.length) askFile(at("file").files[0]);
  at("file").value = "";
});
at("login").addEventListener("submit", (event) => {
  event.preventDefault();
  page.key = at("key").value;
  sessionStorage.setItem("omni-key", page.key);
  connect();
});
for (const kind of ["dragover", "dragleave", "drop"]) {
  document.addEventListener(kind, (event) => {
    event.preventDefault();
    document.body.classList.toggle("dropping", kind === "dragover");
    if (kind === "drop" && event.dataTransfer.files.length) askFile(event.dataTransfer.files[0]);
  });
}

paint();
connect();
