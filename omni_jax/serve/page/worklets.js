// Runs on the browser's audio thread: `player` plays the samples it is sent without gaps, `recorder` sends those of the
// microphone, resampled.

class Player extends AudioWorkletProcessor {
  constructor() {
    super();
    this.queue = [];     // { id, samples } or { id, complete: true }
    this.offset = 0;     // into the first samples of the queue
    this.port.onmessage = ({ data }) => {
      if (data.clear) {
        this.queue = [];
        this.offset = 0;
      } else {
        this.queue.push(data);
      }
    };
  }

  process(_, [[out]]) {
    let filled = 0;
    while (this.queue.length) {
      const { id, samples, complete } = this.queue[0];
      if (complete) {
        this.port.postMessage({ id, ended: true });
        this.queue.shift();
        continue;
      }
      const count = Math.min(out.length - filled, samples.length - this.offset);
      if (!count) break;
      out.set(samples.subarray(this.offset, this.offset + count), filled);
      this.port.postMessage({ id, played: out.slice(filled, filled + count) });
      filled += count;
      this.offset += count;
      if (this.offset === samples.length) {
        this.queue.shift();
        this.offset = 0;
      }
    }
    return true;
  }
}

const PHASES = 64;
const BLOCK_SECONDS = 0.04;

class Recorder extends AudioWorkletProcessor {
  // A low-pass filter, a sinc in a Hann window, evaluated at each sample of the output.
  constructor({ processorOptions: { rate } }) {
    super();
    this.step = sampleRate / rate;     // samples of the input per sample of the output
    const cutoff = 0.46 / Math.max(1, this.step);     // in periods per sample of the input
    this.half = Math.ceil(16 * Math.max(1, this.step));
    this.filters = Array.from({ length: PHASES + 1 }, (_, phase) => {
      const taps = Float32Array.from({ length: 2 * this.half }, (_, tap) => {
        const distance = tap - this.half + 1 - phase / PHASES;
        const angle = 2 * Math.PI * cutoff * distance;
        const sinc = Math.abs(angle) < 1e-9 ? 1 : Math.sin(angle) / angle;
        return Math.max(0, 0.5 + 0.5 * Math.cos((Math.PI * distance) / this.half)) * sinc;
      });
      const sum = taps.reduce((total, tap) => total + tap, 0);
      return taps.map((tap) => tap / sum);
    });
    this.input = new Float32Array(this.half);
    this.at = this.half - 1;     // of the next sample of the output, in samples of `input`
    this.block = new Int16Array(Math.round(BLOCK_SECONDS * rate));
    this.filled = 0;
  }

  process([channels]) {
    // The microphone is opened with one channel.
    if (!channels.length) return true;
    const input = new Float32Array(this.input.length + channels[0].length);
    input.set(this.input);
    input.set(channels[0], this.input.length);
    while (Math.floor(this.at) + this.half < input.length) {
      this.push(this.step === 1 ? input[this.at] : this.filtered(input));
      this.at += this.step;
    }
    const used = Math.floor(this.at) - this.half + 1;
    this.input = input.slice(used);
    this.at -= used;
    return true;
  }

  filtered(input) {
    const first = Math.floor(this.at);
    const taps = this.filters[Math.round((this.at - first) * PHASES)];
    let sum = 0;
    for (let tap = 0; tap < taps.length; tap++) sum += taps[tap] * input[first - this.half + 1 + tap];
    return sum;
  }

  push(value) {
    this.block[this.filled++] = Math.max(-32768, Math.min(32767, Math.round(value * 32768)));
    if (this.filled === this.block.length) {
      this.port.postMessage(this.block.slice());
      this.filled = 0;
    }
  }
}

registerProcessor("player", Player);
registerProcessor("recorder", Recorder);
