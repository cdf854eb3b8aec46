// Runs on the browser's audio thread: `player` plays the samples it is sent without gaps, `recorder` sends those of the
// microphone.

class Player extends AudioWorkletProcessor {
  constructor() {
    super();
    this.queue = [];
    this.offset = 0;     // into the first array of the queue
    this.playing = false;
    this.complete = false;
    this.port.onmessage = ({ data }) => {
      if (data.samples) this.queue.push(data.samples);
      if (data.complete) this.complete = true;
      if (data.clear) {
        this.queue = [];
        this.offset = 0;
        this.complete = false;
        this.playing = false;
      }
    };
  }

  process(_, [[out]]) {
    let filled = 0;
    while (filled < out.length && this.queue.length) {
      const samples = this.queue[0];
      const count = Math.min(out.length - filled, samples.length - this.offset);
      out.set(samples.subarray(this.offset, this.offset + count), filled);
      filled += count;
      this.offset += count;
      if (this.offset === samples.length) {
        this.queue.shift();
        this.offset = 0;
      }
    }
    if (filled) {
      this.playing = true;
      this.port.postMessage({ played: out.slice(0, filled) });
    }
    if (this.playing && this.complete && filled < out.length) {
      this.port.postMessage({ ended: true });
      this.playing = this.complete = false;
    }
    return true;
  }
}

class Recorder extends AudioWorkletProcessor {
  process([input]) {
    // The microphone is opened with one channel.
    if (input.length) this.port.postMessage(input[0].slice());
    return true;
  }
}

registerProcessor("player", Player);
registerProcessor("recorder", Recorder);
