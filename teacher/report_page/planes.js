"use strict";
/* Coded planes -> canvases, and values back from them (format: teacher/report_planes.py). */

report.planes = (() => {
  const ramp = (text) => text.split(" ").map((h) => [1, 3, 5].map((i) => parseInt(h.slice(i, i + 2), 16)));
  // near is light, far is dark
  const DEPTH = table(ramp("#fcf6d4 #fec287 #fb8861 #e75263 #b5367a #812581 #4f127b #231151 #0b0924"));
  const SPREAD = table(ramp("#0c1b33 #1f4068 #2a6f97 #2a9d8f #8ab17d #e9c46a #f4a261 #e76f51 #ffe3dc"));
  const SKY = [137, 190, 235];
  const GOLDEN = 0.61803398875;

  function table(stops) {
    const out = new Uint8Array(256 * 3);
    for (let i = 0; i < 256; i++) {
      const at = (i / 255) * (stops.length - 1), k = Math.min(Math.floor(at), stops.length - 2);
      for (let c = 0; c < 3; c++) out[3 * i + c] = stops[k][c] + (at - k) * (stops[k + 1][c] - stops[k][c]);
    }
    return out;
  }

  function classColour(id) { // well apart for neighbouring ids
    const hue = (id * GOLDEN + 0.08) % 1, light = [0.58, 0.44, 0.7][id % 3], sat = 0.62;
    const f = (n) => {
      const k = (n + hue * 12) % 12, a = sat * Math.min(light, 1 - light);
      return Math.round(255 * (light - a * Math.max(-1, Math.min(k - 3, 9 - k, 1))));
    };
    return [f(0), f(8), f(4)];
  }

  function valueOf(plane, code) { // NaN unknown, Infinity sky
    if (code === 0) return NaN;
    if (code > plane.levels) return Infinity;
    const t = (code - 1) / Math.max(plane.levels - 1, 1);
    return plane.scale === "log" ? plane.low * (plane.high / plane.low) ** t : plane.low + t * (plane.high - plane.low);
  }

  async function pixels(src) {
    const image = new Image();
    image.src = src;
    await image.decode();
    const canvas = new OffscreenCanvas(image.naturalWidth, image.naturalHeight);
    const pen = canvas.getContext("2d", { willReadFrequently: true, colorSpace: "srgb" });
    pen.drawImage(image, 0, 0);
    return pen.getImageData(0, 0, canvas.width, canvas.height);
  }

  function colours(name, plane) { // code -> colour
    const spread = name.includes("uncertainty");
    const ramps = spread ? SPREAD : name.includes("confidence") ? SPREAD : DEPTH;
    let low = plane.low, high = plane.high;
    const range = report.sharedRange(name);
    if (range) [low, high] = range;
    const out = new Uint8ClampedArray((plane.levels + 2) * 4);
    for (let code = 1; code <= plane.levels; code++) {
      const value = valueOf(plane, code);
      let t = plane.scale === "log" ? Math.log(value / low) / Math.log(high / low) : (value - low) / (high - low);
      t = Math.max(0, Math.min(1, Number.isFinite(t) ? t : 0));
      const at = 3 * Math.round(255 * t);
      out.set([ramps[at], ramps[at + 1], ramps[at + 2], 255], 4 * code);
    }
    out.set([...SKY, 255], 4 * (plane.levels + 1));
    return out;
  }

  const packed = (r, g, b, a) => ((a << 24) | (b << 16) | (g << 8) | r) >>> 0; // little-endian RGBA

  /* Paint one plane; the canvas keeps what the probe needs. */
  async function paint(canvas, name, plane) {
    const job = (canvas.job = Symbol());
    const data = await pixels(plane.src);
    if (canvas.job !== job) return; // the row shows another sample by now
    const { width, height } = data, source = data.data;
    const codes = new Uint16Array(width * height), shown = new Uint32Array(width * height);
    if (plane.kind === "scalar" || plane.kind === "ids") {
      for (let i = 0; i < codes.length; i++) codes[i] = plane.wide ? (source[4 * i] << 8) | source[4 * i + 1] : source[4 * i];
    }
    if (plane.kind === "scalar") {
      const lookup = new Uint32Array(colours(name, plane).buffer);
      for (let i = 0; i < codes.length; i++) shown[i] = lookup[codes[i]];
    } else if (plane.kind === "ids") {
      const lookup = new Map([[plane.unknown, 0]]);
      let last = plane.unknown, colour = 0;
      for (let i = 0; i < codes.length; i++) {
        if (codes[i] !== last) {
          last = codes[i];
          if (!lookup.has(last)) lookup.set(last, packed(...classColour(last), 255));
          colour = lookup.get(last);
        }
        shown[i] = colour;
      }
    } else {
      shown.set(new Uint32Array(source.buffer));
      if (plane.kind === "normals") for (let i = 0; i < codes.length; i++) if (source[4 * i] + source[4 * i + 1] + source[4 * i + 2] < 40) shown[i] = 0;
    }
    canvas.width = width;
    canvas.height = height;
    canvas.getContext("2d").putImageData(new ImageData(new Uint8ClampedArray(shown.buffer), width, height), 0, 0);
    canvas.probe = { name, plane, codes, source, width, height };
  }

  function metres(value) { return value < 10 ? value.toFixed(3) : value < 100 ? value.toFixed(2) : value.toFixed(1); }

  /* The value at a pixel as text, or "" for plain pictures. */
  function read(probe, x, y) {
    const { name, plane, codes, source, width } = probe, i = y * width + x;
    if (plane.kind === "scalar") {
      const value = valueOf(plane, codes[i]);
      if (Number.isNaN(value)) return "unknown";
      if (value === Infinity) return "sky";
      if (name === "depth") return `${metres(value)} m`;
      return `${value.toPrecision(3)}${name === "normals_uncertainty" ? "°" : ""}`;
    }
    if (plane.kind === "ids") {
      if (codes[i] === plane.unknown) return name === "instances" ? "none" : "unknown";
      const title = name === "semantic" ? report.state.meta.classes[codes[i]] : null;
      return title ? `${title} (${codes[i]})` : `${codes[i]}`;
    }
    if (plane.kind === "normals") {
      const n = [0, 1, 2].map((c) => source[4 * i + c] / 127.5 - 1), length = Math.hypot(...n);
      if (source[4 * i] + source[4 * i + 1] + source[4 * i + 2] < 40) return "unknown";
      return `≈ (${n.map((v) => (v / length).toFixed(2)).join(", ")})`;
    }
    const rgb = [0, 1, 2].map((c) => source[4 * i + c].toString(16).padStart(2, "0")).join("");
    return `#${rgb}`;
  }

  /* Pixel of a canvas under a mouse event; the picture is fitted into the element. */
  function under(canvas, event) {
    const box = canvas.getBoundingClientRect(), { width, height } = canvas.probe;
    const scale = Math.min(box.width / width, box.height / height);
    const x = Math.floor((event.clientX - box.left - (box.width - width * scale) / 2) / scale);
    const y = Math.floor((event.clientY - box.top - (box.height - height * scale) / 2) / scale);
    return x < 0 || y < 0 || x >= width || y >= height ? null : { x, y };
  }

  const title = (name) => (name.startsWith("answer.") ? `${name.slice(7)}: raw answer` : name.replace("_", " "));
  return { paint, read, under, title, classColour, DEPTH, SPREAD, SKY, metres };
})();
