// The picture of the conversation: chosen, dropped, pasted, or one of the examples.

import { PageError } from "./server.js";

const SMALL = 160; // pixels; smaller pictures are enlarged without smoothing
const MIB = 2 ** 20;

const element = (id) => document.getElementById(id);

export class PictureChooser {
  /** `onChange(example or null)` is called with every new picture, `onError(message)` where it cannot be shown. */
  constructor({ onChange, onError }) {
    this.url = null; // of the data: what is sent
    this.limits = null;
    this.onChange = onChange;
    this.onError = onError;
    this.image = element("picture");
    const input = element("file"), drop = element("drop");
    input.addEventListener("change", () => {
      if (input.files.length) this.#takeFile(input.files[0]);
      input.value = ""; // the same file may be chosen again
    });
    for (const kind of ["dragenter", "dragover"]) {
      document.addEventListener(kind, (event) => {
        if (!event.dataTransfer?.types.includes("Files")) return;
        event.preventDefault();
        drop.classList.add("over");
      });
    }
    document.addEventListener("dragleave", (event) => {
      if (event.relatedTarget === null) drop.classList.remove("over");
    });
    document.addEventListener("drop", (event) => {
      drop.classList.remove("over");
      if (!event.dataTransfer?.files.length) return;
      event.preventDefault();
      this.#takeFile(event.dataTransfer.files[0]);
    });
    document.addEventListener("paste", (event) => {
      const file = [...event.clipboardData.files].find((each) => each.type.startsWith("image/"));
      if (file) this.#takeFile(file);
    });
  }

  /** Take what the server allows and offers. */
  configure({ limits, images, examples }) {
    this.limits = limits;
    this.image.classList.toggle("stored", !images.exif_rotation); // show it as the model gets it
    const list = element("example-list");
    for (const example of examples) {
      const button = document.createElement("button"), image = document.createElement("img");
      button.type = "button";
      button.setAttribute("aria-pressed", "false");
      image.src = example.url;
      image.alt = example.description;
      button.append(image);
      button.addEventListener("click", () => this.#show(example.url, example, button));
      const item = document.createElement("li");
      item.append(button);
      list.append(item);
    }
    element("examples").hidden = examples.length === 0;
  }

  async #takeFile(file) {
    try {
      const most = this.limits?.image_bytes ?? Infinity;
      if (file.size > most) {
        throw new PageError(
          `${file.name || "The picture"} has ${(file.size / MIB).toFixed(1)} MiB; this server takes pictures of up to ` +
            `${(most / MIB).toFixed(1)} MiB. Make it smaller, for example by saving it as JPEG.`,
        );
      }
      await this.#show(await readAsUrl(file), null, null, file.name);
    } catch (error) {
      this.onError(error.message);
    }
  }

  async #show(url, example, button, name = "") {
    const probe = new Image();
    probe.src = url;
    try {
      await probe.decode();
      const pixels = probe.naturalWidth * probe.naturalHeight, most = this.limits?.image_pixels ?? Infinity;
      if (pixels > most) {
        throw new PageError(
          `${name || "The picture"} has ${probe.naturalWidth} x ${probe.naturalHeight} pixels, more than the ` +
            `${most} that this server takes. Make it smaller.`,
        );
      }
    } catch (error) {
      const message = error instanceof PageError ? error.message : `${name || "This file"} is no picture that a browser can show.`;
      this.onError(`${message} The picture before it is kept.`);
      return;
    }
    this.url = url;
    this.image.src = url;
    this.image.alt = example ? example.description : name ? `Your picture, ${name}` : "Your picture";
    await this.image.decode().catch(() => {});
    const { naturalWidth: width, naturalHeight: height } = this.image;
    element("frame").style.setProperty("--ratio", width / height);
    this.image.classList.toggle("small", Math.max(width, height) < SMALL);
    element("frame").hidden = false;
    for (const other of document.querySelectorAll("#example-list button")) {
      other.setAttribute("aria-pressed", String(other === button));
    }
    this.onChange(example);
  }
}

function readAsUrl(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => {
      // a file without a known type would be refused by the server; its bytes say what it is
      const url = reader.result;
      resolve(url.startsWith("data:image/") ? url : url.replace(/^data:[^;,]*/, "data:image/png"));
    };
    reader.onerror = () => reject(new PageError(`${file.name} cannot be read: ${reader.error.message}`));
    reader.readAsDataURL(file);
  });
}
