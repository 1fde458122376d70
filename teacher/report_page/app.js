"use strict";
/* What ties the page together: tabs, tools, probe, the large view, saving, keyboard, theme. */

(() => {
  const { state, el } = report;
  const $ = (id) => document.getElementById(id);
  const TABS = [["labelled", "Labelled"], ["rejected", "Rejected"], ["duplicate_of", "Duplicates"]];
  let shared = false;

  /* Uncertain samples must stand out among all; depth may use each picture's own range. */
  report.sharedRange = (name) => (shared || name !== "depth" ? state.meta.ranges[name] : null);

  report.start = () => {
    const { meta } = state;
    document.title = `${meta.title}: label set`;
    $("title").textContent = meta.title;
    $("subtitle").textContent = meta.sealed < meta.shards ? `not complete: ${meta.sealed} of ${meta.shards} shards` : "";
    report.recall();
    const numbers = meta.columns.map((c) => el("option", { value: c.name }, c.label));
    $("sort").append(el("optgroup", { label: "Numbers" }, ...numbers), el("optgroup", { label: "Names" }, el("option", { value: "uri" }, "name"), el("option", { value: "key" }, "key")));
    tabs();
    report.panel.build($("side"));
    report.on("view", refresh);
    report.on("part", () => { report.list.ask(); if ($("detail").open) detail(); });
    report.on("marks", () => { report.list.marks(); counts(); });
    connect();
    theme(stored("theme"));
    report.sortBy(meta.sort || "uri");
    document.documentElement.dataset.ready = "yes";
  };

  const stored = (name) => { try { return localStorage.getItem(`dense-report ${name}`); } catch { return null; } };
  const store = (name, value) => { try { localStorage.setItem(`dense-report ${name}`, value); } catch { /* private window */ } };

  function tabs() {
    $("tabs").replaceChildren(...TABS.map(([name, text]) => {
      const n = name === "labelled" ? state.count : state.others.filter((o) => o.state === name).length;
      return el("button", { role: "tab", "data-tab": name, "aria-selected": state.tab === name, onclick: () => { state.tab = name; tabs(); refresh(); $("scroll").scrollTop = 0; } }, text, el("b", {}, n.toLocaleString("en")));
    }));
    document.body.dataset.tab = state.tab;
  }

  function refresh() {
    $("sort").value = state.sort;
    const column = report.facts(state.sort);
    const worst = column && (column.worst === "high") === state.down;
    $("direction").textContent = column ? (worst ? "worst first" : "best first") : state.down ? "Z to A" : "A to Z";
    if (column && !/uncertainty|residual|coverage|confidence$/.test(column.name)) $("direction").textContent = state.down ? "highest first" : "lowest first";
    $("scroll").scrollTop = 0;
    report.list.reset();
    report.panel.draw();
    counts();
  }

  function counts() {
    const n = report.list.items().length;
    const total = state.tab === "labelled" ? state.count : state.others.filter((o) => o.state === state.tab).length;
    $("count").textContent = n === total ? `${n.toLocaleString("en")} shown` : `${n.toLocaleString("en")} of ${total.toLocaleString("en")} shown`;
    const { keep, drop } = report.tally();
    $("save-button").textContent = keep || drop ? `Save selection (${drop.toLocaleString("en")} dropped, ${keep.toLocaleString("en")} kept)` : "Save selection";
  }

  /* ---- probe: values under the pointer, and the same place in the sample's other pictures */
  function probe(event) {
    const canvas = event.target.closest && event.target.closest("canvas.plane");
    const at = canvas && canvas.probe && report.planes.under(canvas, event);
    const box = $("probe");
    document.querySelectorAll(".cross").forEach((c) => c.remove());
    if (!at) { box.hidden = true; return; }
    const group = canvas.closest(".pictures");
    const lines = [];
    for (const other of group.querySelectorAll("canvas.plane")) {
      if (!other.probe) continue;
      const x = Math.floor((at.x + 0.5) * other.probe.width / canvas.probe.width), y = Math.floor((at.y + 0.5) * other.probe.height / canvas.probe.height);
      const text = report.planes.read(other.probe, x, y);
      lines.push(el("div", { class: other === canvas ? "here" : "", "data-plane": other.probe.name }, el("span", {}, report.planes.title(other.probe.name)), el("b", {}, text)));
      if (other !== canvas) cross(other, x, y);
    }
    box.replaceChildren(...lines);
    box.hidden = false;
    (canvas.closest("dialog") || document.body).append(box);
    const { innerWidth, innerHeight } = window, size = box.getBoundingClientRect();
    box.style.left = `${event.clientX + 18 + size.width > innerWidth ? event.clientX - size.width - 14 : event.clientX + 18}px`;
    box.style.top = `${Math.min(event.clientY + 16, innerHeight - size.height - 8)}px`;
  }

  function cross(canvas, x, y) {
    const { width, height } = canvas.probe, w = canvas.clientWidth, h = canvas.clientHeight;
    const scale = Math.min(w / width, h / height);
    const mark = el("i", { class: "cross" });
    mark.style.left = `${canvas.offsetLeft + (w - width * scale) / 2 + (x + 0.5) * scale}px`;
    mark.style.top = `${canvas.offsetTop + (h - height * scale) / 2 + (y + 0.5) * scale}px`;
    canvas.parentElement.append(mark);
  }

  /* ---- the large view */
  function detail() {
    const index = state.view[state.cursor], box = $("detail");
    if (index === undefined) { box.close(); return; }
    const { key, uri, columns, shard } = state.rows, sample = report.sample(index);
    const pictures = el("div", { class: "pictures large" });
    if (!sample) report.want([index]);
    else if (sample.damaged) pictures.append(el("p", { class: "damaged" }, `cannot be read: ${sample.damaged}`));
    else {
      for (const [name, plane] of Object.entries(sample.planes)) {
        const canvas = el("canvas", { class: "plane", "data-plane": name, width: 4, height: 3 });
        const range = plane.kind === "scalar" ? `${report.number(plane.low)} – ${report.number(plane.high)}${name === "depth" ? " m" : ""}` : "";
        pictures.append(el("figure", {}, canvas, el("figcaption", {}, report.planes.title(name), el("span", {}, range))));
        report.planes.paint(canvas, name, plane).catch(() => canvas.classList.add("absent"));
      }
    }
    const numbers = el("dl", { class: "numbers" });
    for (const column of state.meta.columns) numbers.append(el("div", {}, el("dt", {}, column.label), el("dd", {}, `${report.number(columns[column.name][index])} ${column.unit === "m" || column.unit === "deg" ? column.unit : ""}`)));
    const camera = sample && sample.camera;
    const name = uri[index] || key[index], now = ["none", "keep", "drop"][state.marks[index]];
    const button = (mark, text, hint) => el("button", { class: mark, "data-mark": mark, "aria-pressed": now === mark, title: hint, onclick: () => { markHere(mark, false); } }, text);
    box.replaceChildren(
      el("div", { class: "bar" }, el("button", { title: "Previous (←)", onclick: () => step(-1) }, "←"), el("button", { title: "Next (→)", onclick: () => step(1) }, "→"),
        el("strong", {}, el("bdi", {}, name)), el("span", { class: "small" }, `${state.cursor + 1} of ${state.view.length.toLocaleString("en")}`), el("span", { class: "push" }),
        button("drop", "Drop (x)", "Mark: drop"), button("keep", "Keep (k)", "Mark: keep"), el("button", { title: "Close (Esc)", onclick: () => box.close() }, "Close")),
      el("div", { class: "body" }, pictures, el("div", { class: "about" }, el("h2", {}, "Numbers"), numbers,
        camera ? el("h2", {}, "Camera") : null, camera ? el("p", {}, `${camera.width} × ${camera.height} px, focal length ${report.number(camera.fx)}${camera.fx === camera.fy ? "" : ` × ${report.number(camera.fy)}`} px, centre ${report.number(camera.cx)}, ${report.number(camera.cy)}; ${camera.source}`) : null,
        el("h2", {}, "Where"), el("p", {}, el("code", {}, key[index]), el("br"), `shard ${shard[index]}`),
        sample && sample.about ? el("h2", {}, "Provenance") : null, sample && sample.about ? el("pre", {}, sample.about) : null)));
    if (!box.open) box.showModal();
  }

  function step(by) {
    report.list.moveTo(state.cursor + by);
    if ($("detail").open) { detail(); $("probe").hidden = true; }
  }

  function markHere(name, advance) {
    const index = state.view[state.cursor];
    if (state.tab !== "labelled" || index === undefined) return;
    report.mark([index], ["none", "keep", "drop"][state.marks[index]] === name ? "none" : name);
    if (advance) step(1);
    else if ($("detail").open) detail();
  }

  /* ---- saving */
  function save() {
    const box = $("save"), { keep, drop } = report.tally(), n = state.count;
    const choice = (value, text, count, on) => el("label", { class: "choice" }, el("input", { type: "radio", name: "only", value, checked: on ? "checked" : false }), el("span", {}, text, el("b", {}, count === 1 ? "1 image" : `${count.toLocaleString("en")} images`)));
    box.replaceChildren(el("form", { method: "dialog" }, el("h2", {}, "Save a selection"),
      el("p", {}, "A file for distill train. It names the images to learn from; the label set is not changed."),
      choice("", "Everything that is not dropped", n - drop, true), choice("only", "Only what is marked keep", keep, false),
      el("div", { class: "bar" }, el("span", { class: "push" }), el("button", { value: "" }, "Cancel"), el("button", { value: "save", class: "primary", id: "download" }, "Download"))));
    box.onclose = () => { if (box.returnValue === "save") download(Boolean(box.querySelector("input:checked").value)); };
    box.returnValue = "";
    box.showModal();
  }

  function download(only) {
    const blob = new Blob([JSON.stringify(report.selection(only), null, 1) + "\n"], { type: "application/json" });
    const link = el("a", { href: URL.createObjectURL(blob), download: `${state.meta.title.replace(/[^\w.-]+/g, "_")}.selection.json` });
    document.body.append(link);
    link.click();
    link.remove();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  }

  /* ---- help, theme, keyboard */
  const KEYS = [["↑ ↓ or j", "previous, next"], ["Enter", "large view; ← → walk, Esc closes"], ["x", "drop and go on"], ["k", "keep and go on"], ["u", "no mark"], ["z", "undo the last marking"],
    ["/", "search"], ["r", "reverse the order"], ["t", "dark, light"], ["s", "save the selection"], ["?", "this help"]];

  function help() {
    const box = $("help"), swatch = (table) => el("i", { class: "ramp", style: `background: linear-gradient(90deg, ${[0, 64, 128, 192, 255].map((i) => `rgb(${table[3 * i]},${table[3 * i + 1]},${table[3 * i + 2]})`).join(",")})` });
    box.replaceChildren(el("form", { method: "dialog" }, el("h2", {}, "How to read this"),
      el("p", {}, "depth: near ", swatch(report.planes.DEPTH), " far; sky is light blue, unknown is chequered. Each picture uses its own range unless you tick “one depth scale”."),
      el("p", {}, "uncertainty: certain ", swatch(report.planes.SPREAD), " uncertain, one range for the whole set."),
      el("p", {}, "Point at a picture: every value of that pixel, depth in metres. The pictures are smaller than the labels; values are picked, never averaged, and depth is exact to a fraction of a percent."),
      el("table", {}, ...KEYS.map(([key, text]) => el("tr", {}, el("td", {}, el("kbd", {}, key)), el("td", {}, text)))),
      el("p", { class: "small" }, "Marks stay in this browser until you save them. Nothing is sent anywhere."), el("div", { class: "bar" }, el("span", { class: "push" }), el("button", { class: "primary" }, "Close"))));
    box.showModal();
  }

  function theme(name) {
    if (name) document.documentElement.dataset.theme = name;
    report.panel.draw();
  }

  function toggleTheme() {
    const dark = document.documentElement.dataset.theme ? document.documentElement.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    store("theme", dark ? "light" : "dark");
    theme(dark ? "light" : "dark");
  }

  function keyboard(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const typing = event.target.matches("input[type=search], select, textarea");
    if (typing) { if (event.key === "Escape") event.target.blur(); return; }
    if ($("help").open || $("save").open) return;
    const open = $("detail").open, here = state.tab === "labelled";
    const deeds = {
      ArrowDown: () => step(1), j: () => step(1), ArrowUp: () => step(-1),
      ArrowRight: () => open && step(1), ArrowLeft: () => open && step(-1),
      Enter: () => here && (open ? $("detail").close() : detail()), " ": () => here && (open ? $("detail").close() : detail()),
      x: () => markHere("drop", true), k: () => markHere("keep", true), u: () => markHere("none", false),
      z: () => report.undo(), "/": () => $("search").focus(), r: () => report.sortBy(state.sort, !state.down),
      t: toggleTheme, s: save, "?": help, Home: () => report.list.moveTo(0), End: () => report.list.moveTo(Infinity),
      PageDown: () => step(5), PageUp: () => step(-5),
    };
    if (event.target.matches("button") && ["Enter", " "].includes(event.key)) return;
    if (deeds[event.key]) { event.preventDefault(); deeds[event.key](); if (open && "xku".includes(event.key)) detail(); }
  }

  function connect() {
    $("scroll").addEventListener("scroll", () => { $("probe").hidden = true; report.list.scrolled(); }, { passive: true });
    $("scroll").addEventListener("click", (event) => {
      const row = event.target.closest("article[data-place]");
      if (!row) return;
      report.list.moveTo(Number(row.dataset.place));
      const mark = event.target.closest("button[data-mark]");
      if (mark) markHere(mark.dataset.mark, false);
      else if (event.target.closest("canvas, .title")) detail();
    });
    document.addEventListener("mousemove", probe);
    document.addEventListener("keydown", keyboard);
    $("search").addEventListener("input", (event) => { state.search = event.target.value; state.cursor = 0; report.update(); });
    $("sort").addEventListener("change", (event) => report.sortBy(event.target.value));
    $("direction").addEventListener("click", () => report.sortBy(state.sort, !state.down));
    $("marks").addEventListener("change", (event) => { state.markFilter = event.target.value; state.cursor = 0; report.update(); });
    $("shared").addEventListener("change", (event) => {
      shared = event.target.checked;
      report.list.reset();
    });
    $("bulk").addEventListener("click", (event) => { const button = event.target.closest("button"); if (button) report.mark(state.view, button.dataset.mark); });
    $("save-button").addEventListener("click", save);
    $("help-button").addEventListener("click", help);
    $("theme-button").addEventListener("click", toggleTheme);
    window.addEventListener("resize", () => { report.list.reset(); report.panel.draw(); });
    if (!state.meta.ranges.depth) $("shared").parentElement.hidden = true;
  }
})();
