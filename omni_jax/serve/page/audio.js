// Sound: the microphone, the player, files, and the encodings of the Realtime API (16-bit samples in base64).

export const RATE = 24000;     // samples per second in both directions

let context = null;
let player = null;

// Opens the player, which browsers allow only after a click or a key.
//   onPlayed(id, samples): samples of an answer were given to the loudspeaker
//   onEnded(id): all of an answer was
export async function openPlayer(onPlayed, onEnded) {
  if (!context) {
    context = new AudioContext({ sampleRate: RATE });
    await context.audioWorklet.addModule("page/worklets.js");
    player = new AudioWorkletNode(context, "player", { outputChannelCount: [1] });
    player.connect(context.destination);
    player.port.onmessage = ({ data }) => (data.ended ? onEnded(data.id) : onPlayed(data.id, data.played));
  }
  await context.resume();
}

export const play = (id, samples) => player?.port.postMessage({ id, samples: toFloat(samples) });
export const endOf = (id) => player?.port.postMessage({ id, complete: true });
export const stopPlaying = () => player?.port.postMessage({ clear: true });

// The microphone, which sends samples (Int16Array at RATE) while it is open.
export class Microphone {
  async open(onSamples) {
    if (!this.node) {
      // Without echo cancellation, loudspeakers would interrupt the answer.
      const audio = { channelCount: 1, echoCancellation: true, noiseSuppression: true, autoGainControl: true };
      this.stream = await navigator.mediaDevices.getUserMedia({ audio });
      this.context = new AudioContext();
      await this.context.audioWorklet.addModule("page/worklets.js");
      this.node = new AudioWorkletNode(this.context, "recorder", { processorOptions: { rate: RATE } });
      this.context.createMediaStreamSource(this.stream).connect(this.node);
      // Some browsers do not run a node without a destination; a gain of 0 keeps it silent.
      this.node.connect(new GainNode(this.context, { gain: 0 })).connect(this.context.destination);
    }
    await this.context.resume();
    this.node.port.onmessage = ({ data }) => onSamples(data);
  }

  // Ends the stream, so that the browser shows that the microphone is off.
  close() {
    if (this.node) this.node.port.onmessage = null;
    this.stream?.getTracks().forEach((track) => track.stop());
    this.context?.close();
    this.node = this.stream = this.context = null;
  }
}

// The samples of a file that the browser can read.
export async function readFile(file) {
  const decoder = new OfflineAudioContext(1, 1, RATE);
  const decoded = await decoder.decodeAudioData(await file.arrayBuffer());
  const mixer = new OfflineAudioContext(1, Math.max(1, Math.ceil(decoded.duration * RATE)), RATE);
  const source = new AudioBufferSourceNode(mixer, { buffer: decoded });
  source.connect(mixer.destination);
  source.start();
  const [mono] = [(await mixer.startRendering()).getChannelData(0)];
  return Int16Array.from(mono, (value) => Math.max(-32768, Math.min(32767, Math.round(value * 32768))));
}

export function join(pieces) {
  const joined = new Int16Array(pieces.reduce((total, piece) => total + piece.length, 0));
  let offset = 0;
  for (const piece of pieces) {
    joined.set(piece, offset);
    offset += piece.length;
  }
  return joined;
}

export const toFloat = (samples) => Float32Array.from(samples, (value) => value / 32768);

export function toBase64(samples) {
  const bytes = new Uint8Array(samples.buffer, samples.byteOffset, samples.byteLength);
  let text = "";
  for (let start = 0; start < bytes.length; start += 32768) {
    text += String.fromCharCode(...bytes.subarray(start, start + 32768));
  }
  return btoa(text);
}

export function fromBase64(text) {
  const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  return new Int16Array(bytes.buffer, 0, bytes.length >> 1);
}

// A wav file of recordings, one after another.
export function toWav(pieces) {
  const samples = join(pieces);
  const view = new DataView(new ArrayBuffer(44));
  const word = (offset, text) => [...text].forEach((letter, index) => view.setUint8(offset + index, letter.charCodeAt(0)));
  word(0, "RIFF");
  view.setUint32(4, 36 + samples.byteLength, true);
  word(8, "WAVEfmt ");
  view.setUint32(16, 16, true);     // bytes of the format
  view.setUint16(20, 1, true);      // PCM
  view.setUint16(22, 1, true);      // channels
  view.setUint32(24, RATE, true);
  view.setUint32(28, 2 * RATE, true);
  view.setUint16(32, 2, true);      // bytes of a sample
  view.setUint16(34, 16, true);     // bits of a sample
  word(36, "data");
  view.setUint32(40, samples.byteLength, true);
  return new Blob([view, samples], { type: "audio/wav" });
}
