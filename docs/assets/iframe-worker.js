// Makes the search work where a page is opened from disk: browsers refuse to start a Worker from file://.
// There, and only there, this class takes the place of Worker. It loads the worker's script into a hidden frame and
// passes messages between the two windows, asynchronously and as copies, as a Worker does.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    onmessage = null;
    onerror = null;
    onmessageerror = null;
    #frame = document.createElement("iframe");
    #waiting = []; // messages that were sent before the script had been loaded

    constructor(url) {
      super();
      this.#frame.hidden = true;
      document.documentElement.append(this.#frame);
      const scope = this.#frame.contentWindow;
      scope.postMessage = data => this.#deliver(this, data);
      const script = scope.document.createElement("script");
      script.src = new URL(url, location);
      script.onload = () => {
        for (const data of this.#waiting.splice(0)) this.#deliver(scope, data);
        this.#waiting = null;
      };
      script.onerror = () => this.onerror?.(new ErrorEvent("error", { message: `${script.src} cannot be loaded` }));
      scope.document.documentElement.append(script);
    }

    postMessage(data) {
      if (this.#waiting) this.#waiting.push(data);
      else this.#deliver(this.#frame.contentWindow, data);
    }

    terminate() {
      this.#frame.remove();
    }

    #deliver(receiver, data) {
      const event = new MessageEvent("message", { data: structuredClone(data) });
      setTimeout(() => {
        receiver.onmessage?.(event);
        if (receiver === this) this.dispatchEvent(event);
      });
    }
  };
}
