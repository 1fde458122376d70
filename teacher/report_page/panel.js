"use strict";
/* The side panel: a histogram per column, dragged over to filter; facts of the set; classes. */

report.el = (tag, attributes = {}, ...children) => {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "class") node.className = value;
    else if (value !== undefined && value !== false) node.setAttribute(name, value);
  }
  node.append(...children.filter((c) => c !== null && c !== undefined));
  return node;
};

report.number = (value) => {
  if (!Number.isFinite(value)) return "–";
  const size = Math.abs(value);
  if (Number.isInteger(value) && size < 1e6) return value.toLocaleString("en");
  return size >= 1000 ? value.toFixed(0) : size >= 0.001 || size === 0 ? String(+value.toPrecision(3)) : value.toExponential(1);
};

report.panel = (() => {
  const { state, el } = report;
  const BINS = 48, HEIGHT = 44;
  const histograms = [];

  class Histogram {
    constructor(column) {
      this.column = column;
      this.values = state.rows.columns[column.name];
      const known = this.values.filter((v) => !Number.isNaN(v)).sort();
      this.missing = this.values.length - known.length;
      this.low = known[0];
      this.high = known[known.length - 1];
      // long tails would squeeze all into one bar: logarithmic when the spread asks for it
      const middle = known[Math.floor(known.length / 2)];
      this.log = this.low > 0 && this.high / this.low > 50 && this.high / middle > 8;
      this.all = this.count([...this.values.keys()]);
      this.canvas = el("canvas", { tabindex: "0", role: "img", "aria-label": `Histogram of ${column.label}; drag to filter` });
      this.range = el("output", {});
      this.clear = el("button", { class: "quiet tiny", title: "Remove this filter", onclick: () => this.set(null) }, "clear");
      const name = el("button", { class: "name", title: `Sort by ${column.label}`, onclick: () => report.sortBy(column.name) }, column.label);
      this.node = el("section", { class: "histogram", "data-column": column.name }, el("div", { class: "line" }, name, el("span", { class: "unit" }, column.unit)), this.canvas,
        el("div", { class: "line small" }, this.range, this.clear));
      this.drag();
    }

    at(value) { // 0..1
      if (this.high === this.low) return 0.5;
      return this.log ? Math.log(value / this.low) / Math.log(this.high / this.low) : (value - this.low) / (this.high - this.low);
    }

    back(t) {
      return this.log ? this.low * (this.high / this.low) ** t : this.low + t * (this.high - this.low);
    }

    count(indices) {
      const bins = new Uint32Array(BINS);
      for (const i of indices) {
        const v = this.values[i];
        if (v === v) bins[Math.min(BINS - 1, Math.max(0, Math.floor(this.at(v) * BINS)))]++;
      }
      return bins;
    }

    set(range) {
      if (range) state.ranges[this.column.name] = range;
      else delete state.ranges[this.column.name];
      state.cursor = 0;
      report.update();
    }

    drag() {
      let from = null;
      const place = (event) => {
        const box = this.canvas.getBoundingClientRect();
        return Math.max(0, Math.min(1, (event.clientX - box.left) / box.width));
      };
      this.canvas.addEventListener("pointerdown", (event) => { from = place(event); this.canvas.setPointerCapture(event.pointerId); });
      this.canvas.addEventListener("pointermove", (event) => {
        const t = place(event);
        if (from === null) { this.hint(t); return; }
        this.draft = [Math.min(from, t), Math.max(from, t)];
        this.draw();
      });
      this.canvas.addEventListener("pointerleave", () => this.label());
      this.canvas.addEventListener("pointerup", (event) => {
        const t = place(event), [a, b] = [Math.min(from, t), Math.max(from, t)];
        from = null;
        this.draft = null;
        if (b - a < 0.01) { this.set(null); return; }
        // the outermost bars reach to the ends, whatever rounding says
        this.set([a < 0.005 ? this.low : this.back(a), b > 0.995 ? this.high : this.back(b)]);
      });
    }

    hint(t) {
      const bin = Math.min(BINS - 1, Math.floor(t * BINS));
      this.range.textContent = `${report.number(this.back(bin / BINS))} – ${report.number(this.back((bin + 1) / BINS))}: ${this.all[bin].toLocaleString("en")}`;
    }

    label() {
      const range = state.ranges[this.column.name] || [this.low, this.high];
      const missing = this.missing ? ` (${this.missing.toLocaleString("en")} without)` : "";
      this.range.textContent = `${report.number(range[0])} – ${report.number(range[1])}${missing}`;
      this.clear.hidden = !state.ranges[this.column.name];
    }

    draw() {
      const ratio = window.devicePixelRatio || 1, width = this.canvas.clientWidth || 240;
      this.canvas.width = width * ratio;
      this.canvas.height = HEIGHT * ratio;
      const pen = this.canvas.getContext("2d"), style = getComputedStyle(document.documentElement);
      pen.scale(ratio, ratio);
      const some = this.count(state.view), top = Math.max(...this.all, 1), step = width / BINS;
      const tall = (n) => (n ? Math.max(2, Math.sqrt(n / top) * (HEIGHT - 2)) : 0); // square root: rare bars stay visible
      const bars = (bins, colour) => {
        pen.fillStyle = colour;
        bins.forEach((n, i) => pen.fillRect(i * step + 0.5, HEIGHT - tall(n), Math.max(step - 1, 1), tall(n)));
      };
      bars(this.all, style.getPropertyValue("--bar-all"));
      bars(some, style.getPropertyValue("--bar"));
      const range = state.ranges[this.column.name];
      const span = this.draft || (range && range.map((v) => this.at(v)));
      if (span) {
        pen.fillStyle = style.getPropertyValue("--brush");
        pen.fillRect(span[0] * width, 0, (span[1] - span[0]) * width, HEIGHT);
      }
      this.node.classList.toggle("sorted", state.sort === this.column.name);
      this.label();
    }
  }

  function build(side) {
    const useful = state.meta.columns.filter((c) => state.rows.columns[c.name].some((v) => !Number.isNaN(v)));
    const box = el("div", { id: "histograms" });
    for (const column of useful) {
      const histogram = new Histogram(column);
      if (histogram.low === histogram.high) continue; // one value says nothing
      histograms.push(histogram);
      box.append(histogram.node);
    }
    const facts = el("dl", {});
    for (const [name, text] of state.meta.facts) {
      const long = text.length > 60 || text.includes("\n");
      facts.append(el("dt", {}, name), el("dd", {}, long ? el("details", {}, el("summary", {}, `${text.slice(0, 28).replace(/\s+/g, " ")}…`), el("pre", {}, text)) : text));
    }
    const classes = el("ul", { class: "classes" });
    for (const [id, name] of Object.entries(state.meta.classes)) {
      const [r, g, b] = report.planes.classColour(Number(id));
      const chip = el("i", {});
      chip.style.background = `rgb(${r},${g},${b})`;
      classes.append(el("li", {}, chip, `${name}`));
    }
    side.append(
      el("div", { class: "head" }, el("h2", {}, "Filter"), el("button", { class: "quiet tiny", id: "clear-all", onclick: clearAll }, "clear all")),
      el("p", { class: "small" }, "Drag over a histogram to filter; click its name to sort."), box,
      Object.keys(state.meta.classes).length ? el("h2", {}, "Classes") : null, classes,
      el("h2", {}, "This label set"), facts,
    );
  }

  function clearAll() {
    Object.assign(state, { ranges: {}, search: "", markFilter: "", cursor: 0 });
    document.getElementById("search").value = "";
    document.getElementById("marks").value = "";
    report.update();
  }

  const draw = () => histograms.forEach((h) => h.draw());
  const varies = (name) => histograms.some((h) => h.column.name === name);
  return { build, draw, clearAll, varies, set: (name, range) => histograms.find((h) => h.column.name === name).set(range) };
})();
