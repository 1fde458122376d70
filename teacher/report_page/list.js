"use strict";
/* The list: only rows in sight exist; their pictures are asked for when scrolling rests. */

report.list = (() => {
  const { state, el } = report;
  const REST_MS = 60, SPARE = 2;
  const scroll = () => document.getElementById("scroll");
  const space = () => document.getElementById("space");
  const rows = new Map(); // place in the view -> row
  let height = 150, hidden = new Set(), timer = 0, framed = false, last = { top: 0, time: 0 };

  const shown = () => state.meta.planes.filter((p) => !hidden.has(p));
  const items = () => (state.tab === "labelled" ? state.view : othersShown());
  const othersShown = () => {
    const query = state.search.trim().toLowerCase();
    return state.others.filter((o) => o.state === state.tab && (!state.reason || kind(o.reason) === state.reason)
      && (!query || `${o.uri} ${o.key} ${o.reason}`.toLowerCase().includes(query)));
  };
  const kind = (reason) => (reason || "no reason given").replace(/[0-9a-f]{12,}|\d+(\.\d+)?/g, "#");

  function measure() {
    const wide = scroll().clientWidth, names = shown();
    const facts = Math.max(200, Math.min(300, wide * 0.2));
    const width = Math.max(104, Math.min(260, (wide - facts - 120) / Math.max(names.length, 1) - 6));
    const ratio = 0.75;
    document.documentElement.style.setProperty("--plane-width", `${Math.floor(width)}px`);
    document.documentElement.style.setProperty("--plane-height", `${Math.floor(width * ratio)}px`);
    document.documentElement.style.setProperty("--facts-width", `${Math.floor(facts)}px`);
    document.documentElement.style.setProperty("--planes", String(names.length));
    height = state.tab === "labelled" ? Math.max(Math.floor(width * ratio), 84) + 14 : 46;
  }

  function heads() {
    const box = document.getElementById("heads");
    box.hidden = state.tab !== "labelled";
    box.replaceChildren(...shown().map((name) => el("button", { class: "head-plane", title: `Hide ${report.planes.title(name)}`, onclick: () => { hidden.add(name); reset(); } }, report.planes.title(name))));
    const back = [...hidden].map((name) => el("button", { class: "tiny", title: "Show again", onclick: () => { hidden.delete(name); reset(); } }, `+ ${report.planes.title(name)}`));
    box.append(el("span", { class: "back" }, ...back));
  }

  function reset() {
    measure();
    heads();
    for (const row of rows.values()) row.remove();
    rows.clear();
    const all = items();
    space().style.height = `${all.length * height}px`;
    const empty = document.getElementById("empty");
    empty.hidden = all.length > 0;
    if (!all.length) empty.replaceChildren(...nothing());
    reasons();
    draw();
  }

  function nothing() {
    if (state.tab !== "labelled") return [el("h2", {}, "None"), el("p", {}, "No input of this label set ended here.")];
    if (!state.count) return [el("h2", {}, "No labelled image"), el("p", {}, "See the rejected inputs and their reasons.")];
    return [el("h2", {}, "Nothing fits these filters"), el("button", { onclick: () => report.panel.clearAll() }, "Clear all filters")];
  }

  function reasons() { // chips above the rejected inputs
    const old = document.getElementById("reasons");
    if (old) old.remove();
    if (state.tab !== "rejected") return;
    const counts = new Map();
    for (const o of state.others) if (o.state === "rejected") counts.set(kind(o.reason), (counts.get(kind(o.reason)) || 0) + 1);
    const chips = [...counts].sort((a, b) => b[1] - a[1]).slice(0, 12).map(([text, n]) => el("button", { class: state.reason === text ? "chip on" : "chip", title: text, onclick: () => { state.reason = state.reason === text ? null : text; reset(); } }, `${n} × ${text.length > 80 ? `${text.slice(0, 78)}…` : text}`));
    document.getElementById("tools").after(el("div", { id: "reasons" }, ...chips));
  }

  function sight() {
    const { scrollTop, clientHeight } = scroll();
    const first = Math.max(0, Math.floor(scrollTop / height) - SPARE);
    return [first, Math.min(items().length, Math.ceil((scrollTop + clientHeight) / height) + SPARE)];
  }

  /* Names and numbers at once; `bare` leaves the pictures for when the scrolling rests. */
  function draw(bare) {
    const [first, end] = sight(), all = items();
    for (const [place, row] of rows) if (place < first || place >= end) { row.remove(); rows.delete(place); }
    for (let place = first; place < end; place++) {
      if (rows.has(place)) continue;
      const row = state.tab === "labelled" ? sampleRow(place, all[place]) : otherRow(all[place]);
      row.style.transform = `translateY(${place * height}px)`;
      row.style.height = `${height}px`;
      rows.set(place, row);
      space().append(row);
    }
    if (state.tab === "labelled" && bare !== true) ask();
  }

  function ask() { // pictures for what is in sight, nearest to the middle first
    const places = [...rows.keys()].sort((a, b) => a - b);
    const missing = [];
    for (const place of places) {
      const row = rows.get(place);
      if (row.painted) continue;
      const found = report.sample(row.index);
      if (found) fill(row, found);
      else missing.push(row.index);
    }
    report.want(missing);
  }

  function sampleRow(place, index) {
    const { key, uri, columns } = state.rows;
    const planes = shown().map((name) => el("canvas", { class: "plane", "data-plane": name, width: 4, height: 3 }));
    const sorted = report.facts(state.sort);
    const numbers = el("dl", {});
    const telling = state.meta.columns.filter((c) => c !== sorted && report.panel.varies(c.name));
    for (const column of (sorted ? [sorted] : []).concat(telling).slice(0, Math.max(1, Math.floor((height - 40) / 18)))) {
      numbers.append(el("div", { class: column === sorted ? "sorted" : "" }, el("dt", {}, column.label), el("dd", {}, `${report.number(columns[column.name][index])}`)));
    }
    const name = uri[index] || key[index];
    const row = el("article", { class: "row", "data-key": key[index], "data-place": place },
      el("div", { class: "pictures" }, ...planes),
      el("div", { class: "facts" }, el("div", { class: "title", title: `${name}\n${key[index]}` }, el("span", { class: "rank" }, `${place + 1}`), el("bdi", {}, name.split("/").pop())), numbers),
      el("div", { class: "buttons" }, el("button", { class: "drop tiny", "data-mark": "drop", title: "Drop (x)" }, "drop"), el("button", { class: "keep tiny", "data-mark": "keep", title: "Keep (k)" }, "keep")));
    row.index = index;
    paintMark(row);
    row.classList.toggle("cursor", place === state.cursor);
    return row;
  }

  function otherRow(other) {
    return el("article", { class: "row other" }, el("div", { class: "title", title: other.key }, el("bdi", {}, other.uri || other.key)),
      el("div", { class: "reason" }, other.state === "duplicate_of" ? `same content as ${nameOf(other.reason)}` : other.reason || "no reason given"), el("code", {}, other.key));
  }

  function nameOf(key) {
    const at = state.rows.key.indexOf(key);
    return at >= 0 ? `${state.rows.uri[at]} (${key})` : key;
  }

  function fill(row, sample) {
    row.painted = true;
    if (sample.damaged) {
      row.querySelector(".pictures").replaceChildren(el("p", { class: "damaged" }, `cannot be read: ${sample.damaged}`));
      return;
    }
    for (const canvas of row.querySelectorAll("canvas")) {
      const name = canvas.dataset.plane, plane = sample.planes[name];
      if (!plane) { canvas.classList.add("absent"); continue; }
      report.planes.paint(canvas, name, plane).catch(() => canvas.classList.add("absent"));
    }
  }

  function paintMark(row) {
    row.dataset.state = ["none", "keep", "drop"][state.marks[row.index]];
    for (const button of row.querySelectorAll("button[data-mark]")) button.setAttribute("aria-pressed", button.dataset.mark === row.dataset.state);
  }

  function marks() {
    for (const row of rows.values()) if (row.index !== undefined) paintMark(row);
  }

  function moveTo(place) {
    if (!items().length) return;
    state.cursor = Math.max(0, Math.min(items().length - 1, place));
    const top = state.cursor * height, box = scroll();
    const head = document.getElementById("heads").offsetHeight;
    if (top < box.scrollTop) box.scrollTop = top;
    else if (top + height > box.scrollTop + box.clientHeight - head) box.scrollTop = top + height - box.clientHeight + head;
    draw();
    for (const [at, row] of rows) row.classList.toggle("cursor", at === state.cursor);
  }

  function scrolled() {
    if (framed) return;
    framed = true;
    requestAnimationFrame(() => {
      framed = false;
      const box = scroll(), now = performance.now();
      const fast = Math.abs(box.scrollTop - last.top) / Math.max(now - last.time, 1) > height / 15; // a row in 15 ms
      last = { top: box.scrollTop, time: now };
      clearTimeout(timer);
      draw(fast);
      if (fast) { report.want([]); timer = setTimeout(draw, REST_MS); }
    });
  }

  const rowsShown = () => rows;
  return { reset, draw, scrolled, ask, marks, moveTo, rowsShown, items };
})();
