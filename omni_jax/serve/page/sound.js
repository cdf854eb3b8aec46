// Runs on the browser's audio thread: one worklet plays what it is sent without gaps, one listens to the microphone.

class Player extends AudioWorkletProcessor {
  constructor() {
    super();
    this.queue = [];
    this.place = 0;      // in the first piece of the queue
    this.playing = false;
    this.complete = false;
    this.port.onmessage = ({ data }) => {
      if (data.samples) this.queue.push(data.samples);
      if (data.complete) this.complete = true;
      if (data.clear) {
        this.queue = [];
        this.place = 0;
        this.complete = false;
        this.playing = false;
      }
    };
  }

  process(_, [[out]]) {
    let filled = 0;
    while (filled < out.length && this.queue.length) {
      const piece = this.queue[0];
      const count = Math.min(out.length - filled, piece.length - this.place);
      out.set(piece.subarray(this.place, this.place + count), filled);
      filled += count;
      this.place += count;
      if (this.place === piece.length) {
        this.queue.shift();
        this.place = 0;
      }
    }
    if (filled) {
      this.playing = true;
      this.port.postMessage({ played: out.slice(0, filled) });
    }
    if (this.playing && filled < out.length) {
      // Either the end of the answer, or sound that has not come in time.
      this.port.postMessage(this.complete ? { ended: true } : { gap: out.length - filled });
      this.playing = !this.complete;
      if (this.complete) this.complete = false;
    }
    return true;
  }
}

class Listener extends AudioWorkletProcessor {
  process([input]) {
    // One channel is enough: the microphone is asked for one.
    if (input.length) this.port.postMessage(input[0].slice());
    return true;
  }
}

registerProcessor("player", Player);
registerProcessor("listener", Listener);
